"""The optimisers of training: AdamW, and Muon (Jordan et al. 2024), scaled to AdamW's step size (arXiv 2502.16982).

Muon is momentum, orthogonalised; the rule is torch.optim.Muon's. That one is fixed to bf16, which a CPU without bf16
products multiplies ten times slower than fp32: the optimiser then takes nine tenths of a step.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from draftsmith.core.recipe import TrainRecipe
from draftsmith.drafts.method import Draft

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
ITERATIONS = 5


def orthogonalised(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: Newton-Schulz brings every singular value near 1."""
    a, b, c = COEFFICIENTS
    wide = gradient.shape[0] <= gradient.shape[1]
    x = (gradient if wide else gradient.T).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """`dtype`: of the iteration; moments stay in the parameters' own."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(list(parameters), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalised(parameter.grad.lerp(buffer, group["momentum"]), self.dtype)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * max(parameter.shape) ** 0.5 * group["lr"])


def make_optimizers(draft: Draft, settings: TrainRecipe, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the layer's and fc's matrices and AdamW for the head and the norms.

    Muon's steps are scaled to AdamW's size, so one learning rate nearly serves both; `head_rate` is the rest.
    """
    muon = settings.optimizer == "muon"
    matrices = [p for n, p in draft.named_parameters() if muon and p.ndim == 2 and not n.startswith(draft.head)]
    chosen = {id(p) for p in matrices}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [p for p in draft.parameters() if id(p) not in chosen],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    ]
    if matrices:
        optimizers.append(Muon(matrices, settings.learning_rate, settings.weight_decay, dtype=dtype))
    return optimizers
