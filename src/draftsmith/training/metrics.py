"""What training reports about itself: rows that a resumed run goes on with, held-out accept length, the stop rule."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from draftsmith.core.recipe import TrainRecipe
from draftsmith.core.records.base import write_rows
from draftsmith.core.records.training import HeldOut, MetricsRow, StepTiming
from draftsmith.drafts import METHODS
from draftsmith.drafts.method import Draft
from draftsmith.drafts.objectives import chunk_rows
from draftsmith.drafts.packing import Pack, PackInputs, segment_rows


class Measured(NamedTuple):
    """Of one step, over all processes; `alpha`: its sums by depth, over so many scored rows."""

    loss: float
    gradient_norm: float
    alpha: list[float]
    scored: list[int]
    learning_rate: float


def truncate_rows(path: Path, kind: type[MetricsRow | StepTiming], last_step: int) -> None:
    """Drop lines after `last_step` and what a kill tore: the resumed run writes them again."""
    if path.exists():
        write_rows(path, [row for row in kind.whole_rows(path) if row.step <= last_step])


def step_flops(draft: Draft, settings: TrainRecipe, packs: Sequence[Pack]) -> float:
    """Of the draft alone; docs/gpu.md has the formula."""
    tokens, rows = sum(len(p.ids_T) for p in packs), sum(p.chain_count for p in packs)
    pairs = sum(segment.pairs for p in packs for segment in p.segments)
    return draft.config.training_flops(settings, 1, tokens, rows) + draft.config.attention_flops(settings, pairs)


@torch.no_grad()
def greedy_matches(draft: Draft, inputs: PackInputs, d2t: Tensor, steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every depth: scored rows, whether the draft's first choice is the token that the target wrote, and alpha."""
    device = inputs.embeds_TH.device
    outputs = METHODS[draft.method].guesses(draft, inputs.pack, inputs.taps_TKH, inputs.embeds_TH, steps)
    index, ids_D = inputs.pack.index(device), d2t.to(device)
    found = []
    for step, output in enumerate(outputs):
        rows, match, alpha = inputs.pack.step_rows(step), [], []
        for part in rows.to(device).split(chunk_rows(device, len(d2t))):
            logits = draft.logits(output[part])
            match.append(ids_D[logits.argmax(-1)] == index.ids_T[index.chains_R[part] + 2 + step])
            q = torch.softmax(logits, -1, dtype=torch.float32)
            alpha.append(torch.minimum(inputs.teacher_RD[part + step].float(), q).sum(-1))
        found.append((rows, torch.cat(match).cpu(), torch.cat(alpha).cpu()))
    return found


def chain_walk(pack: Pack, matches: Sequence[tuple[Tensor, Tensor, Tensor]], length: int) -> tuple[int, int]:
    """(accepted draft tokens, verification steps) of chain decoding along the text of the pack; `matches`: see above.

    Each verification starts where the one before it ended, after its accepted tokens and the bonus token. A chain that
    reaches the end of its completion is not counted: serving would have drafted beyond it.
    """
    hits = torch.zeros(length, pack.chain_count, dtype=torch.bool)
    for step, (rows, match, _) in enumerate(matches[:length]):
        hits[step, rows] = match
    accepted_R = hits.long().cumprod(0).sum(0).tolist()
    accepted = verifications = 0
    for segment, chains in segment_rows(pack.segments):
        runs, chain = accepted_R[chains], 0
        while chain + length <= len(segment):
            accepted += runs[chain]
            verifications += 1
            chain += runs[chain] + 1
    return accepted, verifications


def evaluate_heldout(
    draft: Draft, packs: Iterable[PackInputs], d2t: Tensor, steps: int, add: Callable[[Sequence[float]], list[float]]
) -> HeldOut:
    """Acceptance per depth and chain accept length on completions that training never sees.

    A depth is scored as serving would reach it, with the target's own tokens before it; tau is that of greedy
    verification of the written text. `add` gives the sums over all processes, each with packs of its own.
    """
    lengths = sorted({min(3, steps), steps})
    by_depth, walked = np.zeros((steps, 3)), np.zeros((len(lengths), 2))
    for inputs in packs:
        matches = greedy_matches(draft, inputs, d2t, steps)
        by_depth += [(float(match.sum()), len(match), float(alpha.sum())) for _, match, alpha in matches]
        walked += [chain_walk(inputs.pack, matches, length) for length in lengths]
    of_all = np.array(add([*by_depth.flat, *walked.flat]))
    hits, scored, alphas = of_all[: by_depth.size].reshape(by_depth.shape).T
    accepted, verified = of_all[by_depth.size :].reshape(walked.shape).T
    return HeldOut(
        match=(hits / np.maximum(1, scored)).tolist(),
        alpha=(alphas / np.maximum(1, scored)).tolist(),
        tau=dict(zip(lengths, (1 + accepted / np.maximum(1, verified)).tolist(), strict=True)),
        verifications=round(verified[0]),
    )


def converged(taus: Sequence[float], patience: int) -> bool:
    """tau - 1, what the draft adds, rose by less than 1 % over the second half of more than `patience` evaluations.

    The end of a cosine is flat whatever the draft could still learn, so the last evaluations alone say nothing.
    """
    half = (len(taus) + 1) // 2
    return len(taus) > patience and max(taus[half:]) - 1 < 1.01 * (max(taus[:half]) - 1)
