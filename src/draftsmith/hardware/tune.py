"""Search for the fastest shape by measuring: successive halving over the shapes that `predict` thinks best.

Every round doubles the prompts and keeps the faster half (Jamieson and Talwalkar, arXiv 1502.07943). Plain decoding
runs on the same prompts in the same rounds; a shape that does not beat it is never recommended.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from draftsmith.core.progress import say
from draftsmith.core.records.machine import Tuned
from draftsmith.core.shape import Shape

FIRST_PROMPTS = 2
SURE = 1.02  # the least gain that is recommended: less is within a measurement's noise

# Opens a shape for measuring; the function inside gives plain / drafted seconds per token on the prompt of a number,
# decoded in turns, or None where its answer is too short to be timed.
Trial = Callable[[Shape], AbstractContextManager[Callable[[int], float | None]]]


@dataclass(frozen=True)
class Candidate:
    """A shape with the ratio plain / drafted seconds per token of every prompt it was measured on."""

    shape: Shape
    ratios: list[float]

    @property
    def speedup(self) -> float:
        return statistics.median(self.ratios)


def halve(
    candidates: Sequence[Shape], session: Trial, prompts: int, budget_s: float, first: int = FIRST_PROMPTS
) -> list[Candidate]:
    """Measure until the prompts or the time are used up; fastest first, dropped ones after it."""
    started = time.monotonic()
    alive = [Candidate(shape, []) for shape in candidates]
    dropped: list[Candidate] = []
    done, wanted = 0, first
    while done < prompts:
        until = min(wanted, prompts)
        for tried in alive:
            if time.monotonic() - started > budget_s:
                return _as_measured([*alive, *dropped], budget_s)
            with session(tried.shape) as measure:
                for number in range(done, until):
                    if time.monotonic() - started > budget_s:
                        return _as_measured([*alive, *dropped], budget_s)
                    if ratio := measure(number):
                        tried.ratios.append(ratio)
        done, wanted = until, wanted * 2
        if not any(tried.ratios for tried in alive):
            continue  # every answer so far was too short
        alive = sorted((tried for tried in alive if tried.ratios), key=lambda tried: -tried.speedup)
        say(f"tune: {done} prompts: " + ", ".join(f"{t.shape} {t.speedup:.2f}x" for t in alive))
        kept = alive[: max(1, len(alive) // 2)]
        if not any(t.shape.topk == 1 for t in kept):  # some engines draft chains alone: the best of them goes on
            kept += [t for t in alive if t.shape.topk == 1][:1]
        dropped = [t for t in alive if t not in kept] + dropped
        alive = kept
    return [tried for tried in alive + dropped if tried.ratios]


def _as_measured(tried: Sequence[Candidate], budget_s: float) -> list[Candidate]:
    say(f"tune: {budget_s:.0f} s are used up; what was measured by then decides")
    return sorted((t for t in tried if t.ratios), key=lambda t: (-len(t.ratios), -t.speedup))


def fastest(candidates: Sequence[Candidate], chains_only: bool = False) -> Shape | None:
    """The winner; None where nothing beats plain decoding. Of what was measured longest alone: a rival that was dropped
    early may owe its gain to luck."""
    longest = max((len(c.ratios) for c in candidates), default=0)
    able = [c for c in candidates if len(c.ratios) == longest and (c.shape.topk == 1 or not chains_only)]
    winner = max(able, key=lambda c: c.speedup, default=None)
    return winner.shape if winner and winner.speedup >= SURE else None


def sentence(result: Tuned) -> str:
    if result.shape is None:
        best = max(result.tried, key=lambda tried: tried.speedup)
        return (
            f"nothing beats plain decoding here: the best, {best.shape}, ran at {best.speedup:.2f}x; serve "
            "without a draft on this machine"
        )
    won = next(tried for tried in result.tried if tried.shape == result.shape)
    return f"{won.shape}: {won.speedup:.2f}x over {won.prompts} prompts on {result.engine}"
