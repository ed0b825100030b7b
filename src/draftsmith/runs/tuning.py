"""How `tune` measures a shape: plain and drafted decoding of the same prompts, on whatever engine."""

import contextlib
import time
from collections.abc import Callable, Iterator

from draftsmith.core.errors import DataError
from draftsmith.core.history import draft_digest
from draftsmith.core.records.base import Decodes
from draftsmith.core.records.machine import Tried, Tuned
from draftsmith.core.shape import Shape
from draftsmith.decoding.sampling import Sampling
from draftsmith.engines import ENGINES
from draftsmith.engines.base import Session, Setup
from draftsmith.evaluation.evaluate import SHORTEST_TIMED, Evaluation, complete, time_group
from draftsmith.hardware.cost_model import Costs, MeasuredCosts
from draftsmith.hardware.predict import candidate_shapes, predict_all
from draftsmith.hardware.presets import preset
from draftsmith.hardware.tune import FIRST_PROMPTS, fastest, halve
from draftsmith.runs.estimates import accept_of, probed, read_probe, roofline
from draftsmith.runs.run import Run

SHAPES = 8
SERVED_SHAPES, SERVED_PROMPTS = 4, 6  # starts cost more than measurements: few shapes, each started once


def _seeds(run: Run, engine: Decodes, setup: Setup) -> list[Shape]:
    """The shapes that `predict` thinks best, two chains among them; without a probe of drafting, those of one GPU."""
    accept, own = accept_of(run), run.files.probe(engine)
    path = own if own.exists() else probed(run)
    costs: Costs = read_probe(run, path) if path else roofline(run, preset("h100-1"))
    if isinstance(costs, MeasuredCosts) and costs.times.draft is None:
        costs = roofline(run, preset("h100-1"))
    trees = ENGINES[engine].drafts_trees and (setup.target is None or setup.target.library is None)
    shapes = candidate_shapes(accept.deepest, trees)
    best = [row[0].shape for row in predict_all(costs, accept, shapes, [1], 512)]
    chains = [shape for shape in best if shape.topk == 1][:2]  # all that some engines draft
    count = SHAPES if ENGINES[engine].in_process else SERVED_SHAPES
    return [shape for shape in best if shape not in chains][: count - len(chains)] + chains


def tune(run: Run, name: Decodes, budget_s: float) -> Tuned:
    """In this process plain and drafted decoding take turns. Servers take the whole machine: the target alone comes
    first, then one for every shape."""
    started, engine, logs = time.monotonic(), ENGINES[name], run.files.root / f"tune-{name}"
    logs.mkdir(parents=True, exist_ok=True)
    setup = run.setup(name, logs)
    evaluation, seeds = Evaluation(engine, setup, run.files.evaluation_prompts, logs), _seeds(run, name, setup)

    def per_token(session: Session, number: int) -> float | None:
        timed = time_group(session, [prompts[number]], run.recipe.evaluate.max_new_tokens, evaluation.chat.stop)
        return timed.seconds / timed.tokens if timed.tokens >= SHORTEST_TIMED else None

    def warm(session: Session) -> None:
        complete(session, questions, "warm", Sampling(), 1, session.capacity)
        per_token(session, 0)

    with contextlib.ExitStack() as stack:
        alone = stack.enter_context(engine.open(setup, None))
        questions = evaluation.questions(alone)[: None if engine.in_process else SERVED_PROMPTS]
        prompts = [question.ids for question in questions]
        plain: list[float | None] = []
        if not engine.in_process:
            warm(alone)
            plain = [per_token(alone, number) for number in range(len(prompts))]
            stack.close()

        @contextlib.contextmanager
        def trial(shape: Shape) -> Iterator[Callable[[int], float | None]]:
            with engine.open(setup, shape) as drafted:

                def ratio(number: int) -> float | None:
                    before = plain[number] if plain else per_token(alone, number)
                    drafting = per_token(drafted, number)
                    return before / drafting if before and drafting else None

                if plain:
                    warm(drafted)
                ratio(0)
                yield ratio

        starts_s = time.monotonic() - started if plain else 0.0
        tried = halve(seeds, trial, len(prompts), budget_s - starts_s, len(prompts) if plain else FIRST_PROMPTS)
    if not tried:
        raise DataError("tune: no shape could be measured in the time given; raise --budget-s")
    return Tuned(
        engine=name,
        draft=draft_digest(run.files.draft),
        shape=fastest(tried),
        chain=fastest(tried, chains_only=True),
        tried=[Tried(shape=t.shape, speedup=t.speedup, prompts=len(t.ratios)) for t in tried],
        created_with=run.created_with,
    )
