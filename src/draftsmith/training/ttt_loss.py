"""One pack through the draft: loss and acceptance of every training-time-test step.

Shapes: T tokens, R chains, M scored rows of all steps, K taps, H hidden, D draft vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from draftsmith.data.packing import Pack
from draftsmith.drafts.eagle3 import Eagle3Draft
from draftsmith.drafts.ttt import ttt_outputs
from draftsmith.training.objectives import CHUNK_ROWS, HeadLoss, Objective, teacher_probabilities


@dataclass
class PackInputs:
    """What the target contributes to one pack, in the compute dtype."""

    pack: Pack
    taps_TKH: Tensor
    embeds_TH: Tensor
    teacher_RD: Tensor  # row r is the target's distribution after the root of chain r


def scored_rows(pack: Pack, steps: int) -> list[Tensor]:
    return [pack.step_rows(step) for step in range(steps)]


class TTTLoss(nn.Module):
    """The draft as its own training objective; a module, so that parameters can be swapped for bf16 copies."""

    def __init__(self, draft: Eagle3Draft, steps: int, objective: Objective):
        super().__init__()
        self.draft = draft
        self.steps = steps
        self.objective = objective

    def forward(self, inputs: PackInputs, step_weights: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        """(weighted loss, alpha of each step's scored rows).

        step_weights[i] weighs every scored row of step i, so their sums over packs give the batch's mean.
        """
        device = inputs.embeds_TH.device
        outputs = ttt_outputs(self.draft, inputs.pack, inputs.taps_TKH, inputs.embeds_TH, self.steps)
        rows = [r.to(device) for r in scored_rows(inputs.pack, self.steps)]
        x = self.draft.norm(torch.cat([output[r] for output, r in zip(outputs, rows, strict=True)]))
        # The distribution after the root of chain r + i is the one that step i of chain r is judged by.
        teacher_rows = torch.cat([r + step for step, r in enumerate(rows)])
        weights = torch.cat([torch.full((len(r),), w, device=device) for r, w in zip(rows, step_weights, strict=True)])
        loss, alphas = HeadLoss.apply(
            x, self.draft.lm_head.weight, inputs.teacher_RD, teacher_rows, weights, self.objective
        )
        return loss, list(alphas.split([len(r) for r in rows]))


@torch.no_grad()
def greedy_matches(
    draft: Eagle3Draft, inputs: PackInputs, d2t: Tensor, steps: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Per step, over its scored rows: the rows, whether the draft's first choice is the token that the target wrote,
    and alpha."""
    outputs = ttt_outputs(draft, inputs.pack, inputs.taps_TKH, inputs.embeds_TH, steps)
    chains = inputs.pack.chains_R
    all_rows, matches, alphas = scored_rows(inputs.pack, steps), [], []
    for step, (output, rows) in enumerate(zip(outputs, all_rows, strict=True)):
        match, alpha = [torch.zeros(0, dtype=torch.bool)], [torch.zeros(0)]
        for part in rows.split(CHUNK_ROWS):
            logits = draft.logits(output[part.to(output.device)])
            written = inputs.pack.ids_T[chains[part] + 2 + step]
            match.append(d2t[logits.argmax(-1).cpu()] == written)
            q = torch.softmax(logits, -1, dtype=torch.float32)
            p = inputs.teacher_RD[(part + step).to(output.device)].float()
            alpha.append(torch.minimum(p, q).sum(-1).cpu())
        matches.append(torch.cat(match))
        alphas.append(torch.cat(alpha))
    return all_rows, matches, alphas


def chain_walk(pack: Pack, rows: list[Tensor], matches: list[Tensor], length: int) -> tuple[int, int]:
    """(accepted draft tokens, verification steps) of chain decoding along the text of the pack.

    Each verification starts where the one before it ended, after its accepted tokens and the bonus token. A chain that
    reaches the end of its completion is not counted: serving would have drafted beyond it.
    """
    hits = torch.zeros(length, pack.chain_count, dtype=torch.bool)
    for step in range(length):
        hits[step, rows[step]] = matches[step]
    accepted_R = hits.long().cumprod(0).sum(0).tolist()
    accepted = verifications = offset = 0
    for segment in pack.segments:
        chain = 0
        while chain + length <= len(segment):
            accepted += accepted_R[offset + chain]
            verifications += 1
            chain += accepted_R[offset + chain] + 1
        offset += len(segment)
    return accepted, verifications


def prepare(
    pack: Pack,
    taps_TKH: Tensor,
    last_TH: Tensor,
    embedding_VH: Tensor,
    head_rows_DH: Tensor,
    full_head_VH: Tensor | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> PackInputs:
    """Teacher distributions and casts; everything here is computed once per token, not once per step."""
    device = taps_TKH.device
    chains = pack.chains_R.to(device)
    stored = torch.float32 if dtype == torch.float32 else torch.float16
    teacher = teacher_probabilities(last_TH[chains + 1], head_rows_DH, full_head_VH, softcap, stored)
    embeds = embedding_VH[pack.ids_T.to(embedding_VH.device)].to(device, dtype)
    return PackInputs(pack, taps_TKH.to(dtype), embeds, teacher)
