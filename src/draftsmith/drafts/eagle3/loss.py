"""Training-time test as an objective: one pack through the draft, all depths of all chains.

Shapes: T tokens, R chains, M scored rows of all steps, K taps, H hidden, D draft vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from draftsmith.core.recipe import TrainRecipe
from draftsmith.drafts.eagle3.model import Eagle3Draft
from draftsmith.drafts.eagle3.ttt import ttt_outputs
from draftsmith.drafts.objectives import HeadLoss, Objective
from draftsmith.drafts.packing import PackInputs, to_device


class TTTLoss(nn.Module):
    """A module, so that parameters can be swapped for bf16 copies."""

    def __init__(self, draft: Eagle3Draft, train: TrainRecipe):
        super().__init__()
        self.draft, self.steps = draft, train.ttt_steps
        self.objective = Objective(train.objective, train.lk_eta)

    def forward(self, inputs: PackInputs, step_weights: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        """(weighted loss, alpha of each step's scored rows).

        step_weights[i] weighs every scored row of step i, so their sums over packs give the batch's mean.
        """
        device = inputs.embeds_TH.device
        outputs = ttt_outputs(self.draft, inputs.pack, inputs.taps_TKH, inputs.embeds_TH, self.steps)
        rows = [to_device(inputs.pack.step_rows(step), device) for step in range(self.steps)]
        x = self.draft.norm(torch.cat([output[r] for output, r in zip(outputs, rows, strict=True)]))
        # The distribution after the root of chain r + i is the one that step i of chain r is judged by.
        teacher_rows = torch.cat([r + step for step, r in enumerate(rows)])
        weights = torch.cat([torch.full((len(r),), w, device=device) for r, w in zip(rows, step_weights, strict=True)])
        depths = [len(r) for r in rows]
        loss, alphas = HeadLoss.apply(
            x, self.draft.lm_head.weight, inputs.teacher_RD, teacher_rows, weights, self.objective, depths
        )
        return loss, list(alphas.split(depths))
