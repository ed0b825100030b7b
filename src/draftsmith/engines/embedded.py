"""The engine of this process: the target as `transformers` has it, decoding one text at a time (decoding/)."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from draftsmith.core.progress import say
from draftsmith.core.shape import Shape
from draftsmith.drafts.directories import ready_draft
from draftsmith.engines.base import Engine, Setup
from draftsmith.targets.local import LocalTarget
from draftsmith.targets.parts import card_room


class Embedded(Engine):
    name = "embedded"
    title = "draftsmith"
    drafts_trees = True
    in_process = True

    @contextlib.contextmanager
    def open(self, setup: Setup, shape: Shape | None, url: str | None = None) -> Iterator[LocalTarget]:
        assert url is None, "no server"
        assert setup.target is not None, "in this process"
        drafter = ready_draft(setup.target, setup.draft, setup.reading).drafter() if shape else None
        asked = setup.recipe.serve.draft_sampling
        yield setup.target.session(drafter, shape, "greedy" if asked == "auto" else asked)


@contextlib.contextmanager
def exact(setup: Setup) -> Iterator[Setup | None]:
    """What losslessness is proved on: in fp32, in which ties do not hide behind rounding; None where the device has no
    room for it, which is said."""
    settings, served = setup.recipe.target, setup.target
    assert served is not None
    if settings.dtype == "fp32":
        yield setup
        return
    device = served.device
    served.lm.to("cpu")  # a card holds one of the two at a time
    try:
        room, needed = card_room(device), 4 * sum(weight.numel() for weight in served.lm.parameters())
        if room and needed > room[0]:
            say(
                f"evaluate: losslessness is not tested; in fp32 the target takes {needed / 1e9:.1f} GB, and "
                f"{room[0] / 1e9:.1f} are free on {device}; --evaluate.engine vllm tests it as it is served"
            )
            yield None
            return
        target = LocalTarget(settings.model_copy(update={"dtype": "fp32"}), str(device))
        try:
            yield replace(setup, target=target)
        finally:
            target.lm.to("meta")  # whoever still holds it, its weights are gone
    finally:
        served.lm.to(device)
