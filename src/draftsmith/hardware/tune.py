"""Search for the fastest way to draft by measuring: successive halving over what `predict` thinks best.

Every round doubles the prompts and keeps the faster half (Jamieson and Talwalkar, arXiv 1502.07943). Plain decoding
runs on the same prompts in the same rounds; what does not beat it is never recommended.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from draftsmith.core.progress import say
from draftsmith.core.records.machine import Tried, Tuned
from draftsmith.core.shape import DraftSampling, Shape

FIRST_PROMPTS = 2
SURE = 1.02  # the least gain that is recommended: less is within a measurement's noise


class Way(NamedTuple):
    """What is tried: a shape with its drafts taken in one way."""

    shape: Shape
    drafts: DraftSampling = "greedy"


# Opens a way for measuring; the function inside gives plain / drafted seconds per token on the prompt of a number,
# decoded in turns, or None where its answer is too short to be timed.
Trial = Callable[[Way], AbstractContextManager[Callable[[int], float | None]]]


class Candidate(NamedTuple):
    """With the ratio plain / drafted seconds per token of every prompt that it was measured on."""

    way: Way
    ratios: list[float]

    @property
    def tried(self) -> Tried:
        shape, drafts = self.way
        return Tried(shape=shape, drafts=drafts, speedup=statistics.median(self.ratios), prompts=len(self.ratios))


def halve(
    candidates: Sequence[Way], session: Trial, prompts: int, budget_s: float, first: int = FIRST_PROMPTS
) -> list[Tried]:
    """Measure until the prompts or the time are used up; fastest first, dropped ones after it."""
    started = time.monotonic()
    alive = [Candidate(way, []) for way in candidates]
    dropped: list[Candidate] = []
    done, wanted = 0, first
    while done < prompts:
        until = min(wanted, prompts)
        for one in alive:
            if time.monotonic() - started > budget_s:
                return _as_measured([*alive, *dropped], budget_s)
            with session(one.way) as measure:
                for number in range(done, until):
                    if time.monotonic() - started > budget_s:
                        return _as_measured([*alive, *dropped], budget_s)
                    if ratio := measure(number):
                        one.ratios.append(ratio)
        done, wanted = until, wanted * 2
        if not any(one.ratios for one in alive):
            continue  # every answer so far was too short
        alive = sorted((one for one in alive if one.ratios), key=lambda one: -one.tried.speedup)
        say(f"tune: {done} prompts: " + ", ".join(f"{one.tried} {one.tried.speedup:.2f}x" for one in alive))
        kept = alive[: max(1, len(alive) // 2)]
        # some engines draft chains alone, and some take drafts greedily alone: the best of those goes on
        chains = [one for one in alive if one.way.shape.topk == 1]
        for able in (chains, [one for one in chains if one.way.drafts == "greedy"]):
            if able and not any(one in able for one in kept):
                kept.append(able[0])
        dropped = [one for one in alive if one not in kept] + dropped
        alive = kept
    return [one.tried for one in alive + dropped if one.ratios]


def _as_measured(candidates: Sequence[Candidate], budget_s: float) -> list[Tried]:
    say(f"tune: {budget_s:.0f} s are used up; what was measured by then decides")
    found = [one.tried for one in candidates if one.ratios]
    return sorted(found, key=lambda tried: (-tried.prompts, -tried.speedup))


def fastest(tried: Sequence[Tried], able: Callable[[Tried], bool] = lambda _: True) -> Tried | None:
    """The winner of the able ones; None where nothing beats plain decoding. Of what was measured longest alone: a rival
    that was dropped early may owe its gain to luck."""
    longest = max((one.prompts for one in tried), default=0)
    winner = max((one for one in tried if one.prompts == longest and able(one)), key=lambda t: t.speedup, default=None)
    return winner if winner and winner.speedup >= SURE else None


def sentence(result: Tuned) -> str:
    best = result.best
    if best is None:
        best = max(result.tried, key=lambda tried: tried.speedup)
        return (
            f"nothing beats plain decoding here: the best, {best}, ran at {best.speedup:.2f}x; serve without a draft "
            "on this machine"
        )
    where = f"on {result.engine} at T={result.temperature:g}"
    return f"{best}: {best.speedup:.2f}x over {best.prompts} prompts {where}"
