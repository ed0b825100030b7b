"""How drafts are taken above temperature 0: the ways in which a shape is measured, and which of them is better."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from draftsmith.core.progress import say
from draftsmith.core.records.evaluation import Acceptance
from draftsmith.core.shape import DraftSampling, Shape
from draftsmith.engines.base import Engine, Setup

Way = tuple[DraftSampling, tuple[float, ...]]
"""(how drafts are taken, temperatures to measure it at)"""


def taking(setup: Setup, drafts: DraftSampling) -> Setup:
    """The same with drafts taken in this way."""
    serve = setup.recipe.serve.model_copy(update={"draft_sampling": drafts})
    return replace(setup, recipe=setup.recipe.model_copy(update={"serve": serve}))


def ways(engine: Engine, setup: Setup, shape: Shape) -> list[Way]:
    """As serve.draft_sampling says, at every temperature. Where that leaves the choice to what is measured: greedily,
    and chains sampled, too, above temperature 0, where the engine can. A server started by others drafts in one way."""
    asked, settings = setup.recipe.serve.draft_sampling, setup.recipe.evaluate
    warm = tuple(t for t in settings.temperatures if t)
    if not warm or settings.url is not None:
        return [("sampled" if asked == "sampled" else "greedy", settings.temperatures)]
    why = engine.greedy_because(shape, setup.draft) if asked != "greedy" else None
    if why and asked == "sampled":
        say(f"evaluate: serve.draft_sampling: sampled given, but {why}; {shape} is measured greedily")
    if asked == "sampled" and not why:
        return [("sampled", settings.temperatures)]
    found: list[Way] = [("greedy", settings.temperatures)]
    if asked == "auto" and not why and shape.topk == 1:  # no engine samples trees, so nothing hangs on them
        found.append(("sampled", warm))
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
