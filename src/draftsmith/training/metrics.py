"""What training reports about itself: JSON lines, held-out accept length, the stop rule."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson
import torch

from draftsmith.drafts.eagle3 import Eagle3Draft
from draftsmith.files import write_jsonl
from draftsmith.training.ttt_loss import PackInputs, chain_walk, greedy_matches


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(orjson.dumps(row) + b"\n")


def truncate_jsonl(path: Path, last_step: int) -> None:
    """Drop lines after `last_step` (and a torn last line): the resumed run writes them again."""
    if not path.exists():
        return
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            break  # the process died while writing it
        if row["step"] <= last_step:
            rows.append(row)
    write_jsonl(path, rows)


def evaluate_heldout(draft: Eagle3Draft, packs: Iterable[PackInputs], d2t: torch.Tensor, steps: int) -> dict[str, Any]:
    """Acceptance per depth and chain accept length on completions that training never sees.

    `match[i]`: share of step-i first choices that the target wrote, given that serving reached depth i with the
    target's own tokens before it. `alpha[i]`: sum of min(p, q). `tau_K`: 1 + accepted / verifications of a chain of K
    steps along the written text, which is what greedy verification of that text would accept.
    """
    hits, scored, alphas = [0] * steps, [0] * steps, [0.0] * steps
    lengths = sorted({min(3, steps), steps})
    accepted, verified = dict.fromkeys(lengths, 0), dict.fromkeys(lengths, 0)
    for inputs in packs:
        rows, matches, alpha = greedy_matches(draft, inputs, d2t, steps)
        for step in range(steps):
            hits[step] += int(matches[step].sum())
            scored[step] += len(matches[step])
            alphas[step] += float(alpha[step].sum())
        for length in lengths:
            a, v = chain_walk(inputs.pack, rows, matches, length)
            accepted[length] += a
            verified[length] += v
    return {
        "match": [h / max(1, n) for h, n in zip(hits, scored, strict=True)],
        "alpha": [a / max(1, n) for a, n in zip(alphas, scored, strict=True)],
        **{f"tau_{k}": 1 + accepted[k] / max(1, verified[k]) for k in lengths},
        "verifications": verified[lengths[0]],
    }


def converged(taus: Sequence[float], patience: int) -> bool:
    """tau - 1, what the draft adds, rose by less than 1 % over the second half of more than `patience` evaluations.

    The end of a cosine is flat whatever the draft could still learn, so the last evaluations alone say nothing.
    """
    half = (len(taus) + 1) // 2
    return len(taus) > patience and max(taus[half:]) - 1 < 1.01 * (max(taus[:half]) - 1)
