"""Losses on draft logits, with their gradients made in the forward pass.

Holding [rows, D] logits of every step for a backward would cost gigabytes, and recomputing them a second product with
the head. Row weights are known beforehand, so each chunk of rows makes its logits, loss and gradients at once and
drops the logits: three products in all (lk_lambda: four), and never more than one chunk of them in memory.

With target probabilities p and draft probabilities q over the draft vocabulary, mass m = sum p:
    soft_ce    -sum p log q, p renormalised (m = 1) or the target's own                            EAGLE-3
    lk_alpha   m * -log alpha,  alpha = sum min(p, q)                                LK losses, arXiv 2602.23881
    lk_lambda  m * (w * KL(p / m | q) + (1 - w) * (1 - alpha)),  w = exp(-eta * mean alpha)             the same
In the LK losses p is the target's own distribution over all its tokens, so that alpha is what speculative sampling
accepts, and p / m the renormalised one. The mean is over all rows of one depth of the pack and carries no gradient. The
authors' code (SpecForge) leaves out rows whose most probable token no draft can guess; here a row counts by its mass,
the chance that the target writes one that it can.

Shapes: M scored rows of all depths, R teacher rows, H hidden, D draft vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftsmith.drafts.fusion import fused
from draftsmith.drafts.packing import Pack, PackInputs

CPU_ROWS = 512  # their logits stay in a CPU's last-level cache
GPU_ROWS, GPU_BYTES = 8192, 2**30  # few launches and wide products, in bounded memory


def chunk_rows(device: torch.device, columns: int) -> int:
    """Rows whose logits over so many columns are made at once."""
    if device.type == "cpu":
        return CPU_ROWS
    return max(128, min(GPU_ROWS, GPU_BYTES // (4 * columns) // 128 * 128))


@dataclass(frozen=True)
class Objective:
    name: str = "soft_ce"
    eta: float = 3.0

    def kl_weights(self, alphas: Tensor, depths: Sequence[int]) -> Tensor:
        """[M] from alpha [M], where so many rows are of each depth; the host waits for none of it."""
        means = torch.cat([part.mean().expand_as(part) for part in alphas.split(list(depths))])
        return torch.exp(-self.eta * means)

    def loss_and_gradient(
        self, logits: Tensor, p: Tensor, kl_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Per row: loss [m], d loss / d logits [m, D] and alpha [m], all fp32."""
        q = torch.softmax(logits, dim=-1, dtype=torch.float32)
        mass = p.sum(-1)
        alpha = torch.minimum(p, q).sum(-1)
        if self.name != "lk_alpha":
            z = logits.float()
            # log sum exp z, read off the softmax at its maximum: saves a pass of exp over [m, D]
            log_sum = z.amax(-1) - q.amax(-1).log()
            cross_entropy = mass * log_sum - torch.linalg.vecdot(p, z)
            if self.name == "soft_ce":
                return cross_entropy, q.mul_(mass[:, None]).sub_(p), alpha
        # d alpha / d z_v = q_v * (b_v - sum_u q_u b_u), b = 1 where q < p
        gated = q * (q < p)
        alpha_gradient = gated - q * gated.sum(-1, keepdim=True)
        if self.name == "lk_alpha":
            safe = alpha.clamp_min(1e-6)
            return mass * -safe.log(), alpha_gradient.mul_((-mass / safe)[:, None]), alpha
        assert kl_weights is not None
        # m * KL(p / m | q) = sum p log(p / m) - sum p log q
        kl = cross_entropy + torch.special.xlogy(p, p).sum(-1) - torch.special.xlogy(mass, mass)
        rest = mass * (1 - kl_weights)
        gradient = q.mul_(mass[:, None]).sub_(p).mul_(kl_weights[:, None]) - alpha_gradient.mul_(rest[:, None])
        return kl_weights * kl + rest * (1 - alpha), gradient, alpha


@fused
def accepted(logits: Tensor, p: Tensor, teacher_rows: Tensor) -> Tensor:
    """alpha [m]."""
    q = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return torch.minimum(p[teacher_rows].float(), q).sum(-1)


@fused
def weighted(
    logits: Tensor, p: Tensor, teacher_rows: Tensor, weights: Tensor, kl_weights: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of weights * loss, its gradient [m, D] in the dtype of the logits, alpha [m])."""
    losses, gradient, alpha = objective.loss_and_gradient(logits, p[teacher_rows].float(), kl_weights)
    return (losses * weights).sum(), gradient.mul_(weights[:, None]).to(logits.dtype), alpha


def teacher_probabilities(
    last_RH: Tensor, rows_DH: Tensor, full_head_VH: Tensor | None, softcap: float | None, dtype: torch.dtype
) -> Tensor:
    """Target probabilities [R, D] of the draft vocabulary.

    Renormalised over it where `full_head_VH` is None, otherwise the target's own: their log-sum-exp runs over the whole
    vocabulary. Stored in `dtype`; fp16 has eleven bits for numbers in [0, 1], bf16 only eight.
    """
    out = last_RH.new_empty(len(last_RH), len(rows_DH), dtype=dtype)

    def capped(logits: Tensor) -> Tensor:
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    if full_head_VH is None:
        chunk = chunk_rows(last_RH.device, len(rows_DH))
    else:  # fewer rows of the whole vocabulary
        chunk = 64 if last_RH.device.type == "cpu" else chunk_rows(last_RH.device, len(full_head_VH))
    for start in range(0, len(last_RH), chunk):
        hidden = last_RH[start : start + chunk]
        logits = capped(hidden @ rows_DH.T)
        if full_head_VH is None:
            out[start : start + chunk] = torch.softmax(logits, -1, dtype=torch.float32)
        else:
            total = capped(hidden @ full_head_VH.T).float().logsumexp(-1, keepdim=True)
            out[start : start + chunk] = (logits.float() - total).exp()
    return out


class HeadLoss(torch.autograd.Function):
    """apply(x [M, H], head [D, H], p [R, D], teacher_rows [M], row_weights [M], objective, depths)
    -> (loss, alpha [M])

    loss = sum of row_weights * per-row loss; alpha carries no gradient. `depths`: how many rows are of each, in order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        head: Tensor,
        p: Tensor,
        teacher_rows: Any,
        row_weights: Tensor,
        objective: Objective,
        depths: Sequence[int],
    ) -> Any:
        grad_x = torch.empty_like(x)
        learns = ctx.needs_input_grad[1]  # a frozen head saves a product
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if learns else None
        alphas = torch.empty(len(x), dtype=torch.float32, device=x.device)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        chunk = chunk_rows(x.device, len(head))
        chunks = [slice(start, start + chunk) for start in range(0, len(x), chunk)]
        kl_weights: Tensor | None = None
        if objective.name == "lk_lambda":  # one product more: no row's gradient is known before every row's alpha
            for rows in chunks:
                alphas[rows] = accepted(x[rows] @ head.T, p, teacher_rows[rows])
            kl_weights = objective.kl_weights(alphas, depths)
        for rows in chunks:
            mix = None if kl_weights is None else kl_weights[rows]
            part, gradient, alphas[rows] = weighted(
                x[rows] @ head.T, p, teacher_rows[rows], row_weights[rows], mix, objective
            )
            loss += part
            grad_x[rows] = gradient @ head
            if grad_head is not None:
                grad_head += gradient.T @ x[rows]
        ctx.save_for_backward(grad_x, None if grad_head is None else grad_head.to(head.dtype))
        ctx.mark_non_differentiable(alphas)
        return loss, alphas

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_alphas: Tensor) -> Any:
        grad_x, grad_head = ctx.saved_tensors
        return grad_x * grad_loss, None if grad_head is None else grad_head * grad_loss, None, None, None, None, None


def pack_inputs(
    pack: Pack,
    taps_TKH: Tensor,
    last_TH: Tensor,
    embedding_VH: Tensor,
    head_rows_DH: Tensor,
    full_head_VH: Tensor | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> PackInputs:
    """Teacher distributions and casts; everything here is computed once per token, not once per depth."""
    device = taps_TKH.device
    index = pack.index(device)
    stored = torch.float32 if dtype == torch.float32 else torch.float16
    teacher = teacher_probabilities(last_TH[index.chains_R + 1], head_rows_DH, full_head_VH, softcap, stored)
    embeds = embedding_VH[index.ids_T.to(embedding_VH.device)].to(device, dtype)
    # A sum is finite where all its terms are; nothing as large as the states is made for it.
    finite = (taps_TKH.sum((1, 2), dtype=torch.float32) + last_TH.sum(1, dtype=torch.float32)).isfinite()
    return PackInputs(pack, taps_TKH.to(dtype), embeds, finite, teacher)
