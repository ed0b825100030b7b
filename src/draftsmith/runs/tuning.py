"""Search for the fastest way to draft by measuring: successive halving over what `predict` thinks best.

Every round doubles the prompts and keeps the faster half (Jamieson and Talwalkar, arXiv 1502.07943). Plain decoding
runs on the same prompts in the same rounds, on whatever engine; what does not beat it is never recommended.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from draftsmith.core.errors import DataError, RecipeError
from draftsmith.core.history import draft_digest
from draftsmith.core.progress import say
from draftsmith.core.records.base import Decodes
from draftsmith.core.records.machine import Tried, Tuned
from draftsmith.core.run_files import DECODERS
from draftsmith.core.shape import DraftSampling, Shape
from draftsmith.decoding.sampling import Sampling
from draftsmith.engines import ENGINES
from draftsmith.engines.base import Setup
from draftsmith.evaluation.asking import complete, time_group
from draftsmith.evaluation.draft_sampling import taking, takings
from draftsmith.evaluation.evaluate import SHORTEST_TIMED, Evaluation
from draftsmith.hardware.accept_length import AcceptLength
from draftsmith.hardware.cost_model import Costs, MeasuredCosts
from draftsmith.hardware.predict import candidate_shapes, predict_all
from draftsmith.hardware.presets import preset
from draftsmith.runs.estimates import accept_of, own_probe, roofline
from draftsmith.runs.run import Run, fastest
from draftsmith.targets.base import Target

FIRST_PROMPTS = 2
CANDIDATES, CHAINS = 8, 2
SERVED_CANDIDATES, SERVED_PROMPTS = 4, 6  # starts cost more than measurements: few of them, each for all prompts


class Way(NamedTuple):
    """What is tried: a shape with its drafts taken in one way."""

    shape: Shape
    drafts: DraftSampling = "greedy"


# Opens a way for measuring; the function inside gives plain / drafted seconds per token on the prompt of a number,
# decoded in turns, or None where its answer is too short to be timed.
Trial = Callable[[Way], AbstractContextManager[Callable[[int], float | None]]]


def _accepted(run: Run, temperature: float) -> dict[DraftSampling, AcceptLength]:
    """What each way of taking drafts accepts there; what `evaluate` did not measure there is not tried. Where it left
    the temperature out, as the engine does not draw, greedy texts tell."""
    ways: tuple[DraftSampling, ...] = ("greedy", "sampled") if temperature else ()
    found: dict[DraftSampling, AcceptLength] = {}
    for drafts in ways:
        with contextlib.suppress(RecipeError):
            found[drafts] = accept_of(run, temperature, drafts)
    return found or {"greedy": accept_of(run)}


def _seeds(run: Run, engine: Decodes, setup: Setup, accepted: dict[DraftSampling, AcceptLength]) -> list[Way]:
    """What `predict` thinks best, two chains of each way of taking drafts among it; without a probe of drafting, on one
    GPU."""
    costs: Costs = own_probe(run, engines=tuple(dict.fromkeys((engine, *DECODERS)))) or roofline(run, preset("h100-1"))
    if isinstance(costs, MeasuredCosts) and costs.times.draft is None:
        costs = roofline(run, preset("h100-1"))
    trees = ENGINES[engine].drafts_trees and (setup.target is None or setup.target.library is None)
    speedups: dict[Way, float] = {}
    for drafts, accept in accepted.items():
        # what sampled trees accept is not told, and at temperature 0 there is one way
        shapes = candidate_shapes(accept.deepest, trees and drafts == "greedy")
        able = [s for s in shapes if len(accepted) == 1 or drafts in takings(ENGINES[engine], setup, s)]
        speedups |= {Way(row[0].shape, drafts): row[0].speedup for row in predict_all(costs, accept, able, [1], 512)}
    best = sorted(speedups, key=lambda way: math.inf if math.isnan(speedups[way]) else -speedups[way])
    chains = [way for d in accepted for way in [w for w in best if w.shape.topk == 1 and w.drafts == d][:CHAINS]]
    count = CANDIDATES if ENGINES[engine].in_process else SERVED_CANDIDATES
    return [way for way in best if way not in chains][: count - len(chains)] + chains


class _Timing:
    """Times prompts at the recipe's highest temperature, where the engine draws there, else greedily."""

    def __init__(self, evaluation: Evaluation, temperature: float):
        self.evaluation, self.temperature = evaluation, temperature

    def per_token(self, session: Target, prompt: list[int]) -> float | None:
        settings, stop = self.evaluation.settings, self.evaluation.chat.stop
        sampling = self.evaluation.sampling(self.temperature)
        timed = time_group(session, [prompt], settings.max_new_tokens, stop, sampling)
        return timed.seconds / timed.tokens if timed.tokens >= SHORTEST_TIMED else None

    def warm(self, session: Target, drafted: bool) -> None:
        """A plain token costs the same however it is drawn, so what a drafting server cannot is found out late."""
        questions = self.evaluation.questions(session)[:SERVED_PROMPTS]
        complete(session, questions, "warm", Sampling(), 1, None)
        if drafted and self.temperature and not self.evaluation.draws(session, questions, self.temperature):
            self.temperature = 0.0
        self.per_token(session, questions[0].ids)


def tune(run: Run, name: Decodes, budget_s: float) -> Tuned:
    """In this process plain and drafted decoding take turns. Servers take the whole machine: the target alone comes
    first, then one for every way."""
    started, engine, logs = time.monotonic(), ENGINES[name], run.files.root / f"tune-{name}"
    temperature = max(run.recipe.evaluate.temperatures, default=0.0)
    accepted = _accepted(run, temperature)  # without an evaluation there is nothing to start from
    logs.mkdir(parents=True, exist_ok=True)
    setup = run.setup(name, logs)
    seeds = _seeds(run, name, setup, accepted)
    evaluation = Evaluation(engine, setup, run.files.evaluation_prompts, logs)
    timing = _Timing(evaluation, temperature)

    with contextlib.ExitStack() as stack:
        alone = stack.enter_context(engine.open(setup, None))
        questions = evaluation.questions(alone)[: None if engine.in_process else SERVED_PROMPTS]
        prompts = [question.ids for question in questions]
        plain: list[float | None] = []
        if not engine.in_process:
            timing.warm(alone, drafted=False)
            plain = [timing.per_token(alone, prompt) for prompt in prompts]
            stack.close()

        @contextlib.contextmanager
        def trial(way: Way) -> Iterator[Callable[[int], float | None]]:
            with engine.open(taking(setup, way.drafts), way.shape) as drafted:

                def ratio(number: int) -> float | None:
                    before = plain[number] if plain else timing.per_token(alone, prompts[number])
                    drafting = timing.per_token(drafted, prompts[number])
                    return before / drafting if before and drafting else None

                if plain:
                    timing.warm(drafted, drafted=True)
                ratio(0)
                yield ratio

        starts_s = time.monotonic() - started if plain else 0.0
        tried = halve(seeds, trial, len(prompts), budget_s - starts_s, len(prompts) if plain else FIRST_PROMPTS)
    if not tried:
        raise DataError(
            "tune: no shape could be measured; raise --budget-s, or evaluate.max_new_tokens, as answers of less than "
            f"{SHORTEST_TIMED} tokens are not timed"
        )
    if not timing.temperature:
        tried = [one.model_copy(update={"drafts": "greedy"}) for one in tried]
    return Tuned(
        engine=name,
        draft=draft_digest(run.files.draft),
        temperature=timing.temperature,
        best=fastest(tried),
        tried=tried,
        created_with=run.created_with,
    )


def halve(
    candidates: Sequence[Way], session: Trial, prompts: int, budget_s: float, first: int = FIRST_PROMPTS
) -> list[Tried]:
    """Measure until the prompts or the time are used up; fastest first, dropped ones after it."""
    started = time.monotonic()
    alive = list(candidates)
    dropped: list[Way] = []
    ratios: dict[Way, list[float]] = {way: [] for way in alive}  # by prompts that it was measured on

    def tried(ways: Sequence[Way]) -> list[Tried]:
        known = [(way, ratios[way]) for way in ways if ratios[way]]
        return [Tried(shape=w.shape, drafts=w.drafts, speedup=statistics.median(r), prompts=len(r)) for w, r in known]

    done, wanted = 0, first
    while done < prompts:
        until = min(wanted, prompts)
        for way in alive:
            if time.monotonic() - started > budget_s:
                return _as_measured(tried(alive + dropped), budget_s)
            with session(way) as measure:
                for number in range(done, until):
                    if time.monotonic() - started > budget_s:
                        return _as_measured(tried(alive + dropped), budget_s)
                    if ratio := measure(number):
                        ratios[way].append(ratio)
        done, wanted = until, wanted * 2
        if not any(ratios[way] for way in alive):
            continue  # every answer so far was too short
        alive = sorted((way for way in alive if ratios[way]), key=lambda way: -statistics.median(ratios[way]))
        say(f"tune: {done} prompts: " + ", ".join(f"{one} {one.speedup:.2f}x" for one in tried(alive)))
        kept = alive[: max(1, len(alive) // 2)]
        # some engines draft chains alone, and some take drafts greedily alone: the best of those goes on
        chains = [way for way in alive if way.shape.topk == 1]
        for able in (chains, [way for way in chains if way.drafts == "greedy"]):
            if able and not any(way in able for way in kept):
                kept.append(able[0])
        dropped = [way for way in alive if way not in kept] + dropped
        alive = kept
    return tried(alive + dropped)


def _as_measured(found: Sequence[Tried], budget_s: float) -> list[Tried]:
    say(f"tune: {budget_s:.0f} s are used up; what was measured by then decides")
    return sorted(found, key=lambda tried: (-tried.prompts, -tried.speedup))


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
