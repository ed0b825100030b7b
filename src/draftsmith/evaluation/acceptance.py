"""Accept length as users meet it: by decoding, per category and depth, with bootstrap intervals over prompts.

tau = 1 + accepted draft tokens / verification steps: the bonus token counts, the prefill token does not. Steps that
the end of the completion cuts short are left out, and so is text after the onset of a loop (loops flatter tau).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from draftsmith.data.loops import loop_onset
from draftsmith.decoding.speculate import Decoded

RESAMPLES = 1000
INTERVAL_PROMPTS = 10  # a percentile interval called 95 % covers the truth in 48 % of cases at 2 prompts, 85 % at 6


@dataclass
class PromptAcceptance:
    """Counts of one prompt. `reached[d]` / `accepted_at[d]`: steps in which depth d + 1 could be / was accepted."""

    id: str
    category: str
    tokens: int
    looping_tokens: int
    steps: int = 0
    accepted: int = 0
    reached: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    looping_steps: int = 0
    looping_accepted: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def count(prompt_id: str, category: str, decoded: Decoded, depth: int) -> PromptAcceptance:
    onset = loop_onset(decoded.ids)
    limit = len(decoded.ids) if onset is None else onset
    result = PromptAcceptance(prompt_id, category, len(decoded.ids), len(decoded.ids) - limit)
    result.reached, result.accepted_at = [0] * depth, [0] * depth
    clean = decoded.counted_steps(depth, limit)
    for step in clean:
        result.steps += 1
        result.accepted += step.accepted
        for d in range(depth):
            result.reached[d] += step.accepted >= d
            result.accepted_at[d] += step.accepted > d
    everything = decoded.counted_steps(depth)
    result.looping_steps = len(everything) - len(clean)
    result.looping_accepted = sum(s.accepted for s in everything) - result.accepted
    return result


def bootstrap_tau(accepted: Sequence[int], steps: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """tau with a 95 % percentile interval over prompts (the unit that varies between users); no interval under ten."""
    a, s = np.asarray(accepted, float), np.asarray(steps, float)
    if s.sum() == 0:
        return {"tau": None, "low": None, "high": None, "prompts": 0, "steps": 0}
    a, s = a[s > 0], s[s > 0]
    low = high = None
    if len(s) >= INTERVAL_PROMPTS:
        draws = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
        low, high = np.percentile(1 + a[draws].sum(1) / s[draws].sum(1), [2.5, 97.5]).tolist()
    return {"tau": float(1 + a.sum() / s.sum()), "low": low, "high": high, "prompts": len(s), "steps": int(s.sum())}


def paired_difference(
    ours: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], seed: int = 0
) -> dict[str, Any]:
    """tau of `others` minus tau of `ours` on the prompts that both have, with a 95 % interval: every resample takes the
    same prompts for both, so what makes a prompt easy for any draft cancels out. Rows as `PromptAcceptance` has them.
    """
    known = {row["id"]: row for row in others if row["steps"]}
    pairs = [(row, known[row["id"]]) for row in ours if row["steps"] and row["id"] in known]
    if not pairs:
        return {"difference": None, "low": None, "high": None, "prompts": 0}
    counts = np.array([[a["accepted"], a["steps"], b["accepted"], b["steps"]] for a, b in pairs], float)

    def difference(sums: np.ndarray) -> np.ndarray:
        return sums[..., 2] / sums[..., 3] - sums[..., 0] / sums[..., 1]

    low = high = None
    if len(pairs) >= INTERVAL_PROMPTS:
        draws = np.random.default_rng(seed).integers(0, len(pairs), (RESAMPLES, len(pairs)))
        low, high = np.percentile(difference(counts[draws].sum(1)), [2.5, 97.5]).tolist()
    return {"difference": float(difference(counts.sum(0))), "low": low, "high": high, "prompts": len(pairs)}


def tau_text(value: Mapping[str, Any] | None) -> str:
    """`2.10 [2.02, 2.19]`; without the interval where there is none."""
    if value is None or value["tau"] is None:
        return "-"
    return f"{value['tau']:.2f}" + ("" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]")


def summarise(rows: Sequence[PromptAcceptance]) -> dict[str, Any]:
    """One setting's table: tau over all and per category, acceptance per depth, share of looping text."""
    categories = sorted({row.category for row in rows})
    depth = len(rows[0].reached)
    reached = [sum(row.reached[d] for row in rows) for d in range(depth)]
    hits = [sum(row.accepted_at[d] for row in rows) for d in range(depth)]
    tokens = sum(row.tokens for row in rows)
    with_loops_steps = sum(row.steps + row.looping_steps for row in rows)
    with_loops_accepted = sum(row.accepted + row.looping_accepted for row in rows)
    return {
        "all": bootstrap_tau([r.accepted for r in rows], [r.steps for r in rows]),
        "by_category": {
            c: bootstrap_tau([r.accepted for r in rows if r.category == c], [r.steps for r in rows if r.category == c])
            for c in categories
        },
        "acceptance_by_depth": [h / n if n else None for h, n in zip(hits, reached, strict=True)],
        "looping_share": sum(row.looping_tokens for row in rows) / max(1, tokens),
        "tau_with_loops": 1 + with_loops_accepted / max(1, with_loops_steps),
        "tokens": tokens,
    }


def oracle_walk(hits: Sequence[bool], steps: int, limit: int) -> tuple[int, int]:
    """(accepted, verifications) of chains that always propose the target's own first choice.

    hits[i]: whether token i of the text was that choice. Under target-only sampling verification a chain accepts
    exactly the tokens that the target drew, so on the same text no chain of this length can do better on average.
    """
    accepted = verifications = 0
    root = 0
    while root + steps < limit:
        run = 0
        while run < steps and hits[root + 1 + run]:
            run += 1
        accepted += run
        verifications += 1
        root += run + 1
    return accepted, verifications
