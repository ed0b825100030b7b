"""The optimisers of training: AdamW, and Muon (Jordan et al. 2024), scaled to AdamW's step size (arXiv 2502.16982).

Muon is momentum, orthogonalised; torch.optim.Muon does it with another iteration and is fixed to bf16, which a CPU
without bf16 products multiplies ten times slower than fp32: the optimiser then takes nine tenths of a step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from draftsmith.core.recipe import TrainRecipe
from draftsmith.drafts.method import Draft

MOMENTUM = 0.95
SAFETY = 1.01  # rounding must not push a singular value past 1, where the polynomials grow
# Polar Express (Amsel et al. 2025, arXiv 2505.16932, Algorithm 1): the best five quintics for singular values from 1e-3
# to 1, where Newton-Schulz takes the same one five times and ends further from 1.
POLYNOMIALS = [
    (a / SAFETY, b / SAFETY**3, c / SAFETY**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    )
] + [(2.300652019954817, -1.6689039845747493, 0.4188073119525673)]


def orthogonalised(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrix [M, N] of a gradient, roughly: every singular value comes near 1.

    In fp32 the polynomials are multiplied out in the Gram matrix, [M, M] of the smaller side, and only two products are
    of the full width; bf16 would lose small singular values in their squares, so there they are taken one by one.
    """
    wide = gradient.shape[0] <= gradient.shape[1]
    x = (gradient if wide else gradient.T).to(dtype)
    x = x / (x.norm() * SAFETY).clamp(min=1e-7)
    if dtype == torch.float32:
        gram = x @ x.T
        factors: list[Tensor] = []
        for a, b, c in POLYNOMIALS:
            if factors:  # they commute, as all are polynomials of one matrix
                gram = factors[-1] @ gram @ factors[-1]
            factors.append(torch.addmm(gram, gram, gram, beta=b, alpha=c))
            factors[-1].diagonal().add_(a)
        x = torch.linalg.multi_dot([*factors, x])
    else:
        for a, b, c in POLYNOMIALS:
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """`dtype`: of the iteration; moments stay in the parameters' own."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
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
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
                update = orthogonalised(parameter.grad.lerp(buffer, MOMENTUM), self.dtype)
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
        optimizers.append(Muon(matrices, settings.learning_rate, settings.weight_decay, dtype))
    return optimizers
