"""How drafts are taken above temperature 0: the ways in which a shape is measured, and which of them is better."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from draftsmith.core.progress import say
from draftsmith.core.records.evaluation import Acceptance
from draftsmith.core.shape import DraftSampling, Shape
from draftsmith.engines.base import Engine, Setup


def taking(setup: Setup, drafts: DraftSampling) -> Setup:
    """The same with drafts taken in this way."""
    serve = setup.recipe.serve.model_copy(update={"draft_sampling": drafts})
    return replace(setup, recipe=setup.recipe.model_copy(update={"serve": serve}))


def takings(engine: Engine, setup: Setup, shape: Shape) -> list[DraftSampling]:
    """How drafts are taken above temperature 0: as serve.draft_sampling says. Where that leaves the choice to what is
    measured: greedily, and chains sampled, too, where the engine can."""
    asked = setup.recipe.serve.draft_sampling
    able = asked != "greedy" and engine.greedy_because(shape, setup.draft) is None
    if asked == "sampled":
        return ["sampled" if able else "greedy"]
    return ["greedy", "sampled"] if able and shape.topk == 1 else ["greedy"]  # no engine samples trees


def ways(engine: Engine, setup: Setup, shape: Shape) -> list[DraftSampling]:
    """How a shape is measured: at every temperature in the first of the ways, above 0 in the others. A server started
    by others has one."""
    asked, settings = setup.recipe.serve.draft_sampling, setup.recipe.evaluate
    if settings.url is not None or not any(settings.temperatures):
        return ["sampled" if asked == "sampled" else "greedy"]
    found = takings(engine, setup, shape)
    if asked == "sampled" and "greedy" in found:
        why = engine.greedy_because(shape, setup.draft)
        say(f"evaluate: serve.draft_sampling: sampled given, but {why}; {shape} is measured greedily")
    return found


def more_accepted(entries: Sequence[Acceptance], shape: Shape) -> DraftSampling | None:
    """The better way for the shape, else for what is a chain or a tree like it; None where not both were measured."""
    taus: dict[tuple[Shape, float], dict[DraftSampling, float]] = defaultdict(dict)
    for entry in entries:
        if entry.temperature and entry.all.tau:
            taus[entry.shape, entry.temperature][entry.drafts] = entry.all.tau
    gains = [(s, both["sampled"] - both["greedy"]) for (s, _), both in taus.items() if len(both) == 2]
    own = [gain for s, gain in gains if s == shape]
    chosen = own or [gain for s, gain in gains if (s.topk == 1) == (shape.topk == 1)]
    return ("sampled" if sum(chosen) > 0 else "greedy") if chosen else None
