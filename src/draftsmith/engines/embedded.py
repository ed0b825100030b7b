"""The engine of this process: the target as `transformers` has it, decoding one text at a time (decoding/)."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from draftsmith.core.progress import say
from draftsmith.core.shape import DraftSampling, Shape
from draftsmith.decoding.generation import Generation
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder, Drafter
from draftsmith.decoding.stopping import Ends
from draftsmith.drafts.directories import ready_draft
from draftsmith.engines.base import Engine, Setup
from draftsmith.targets.local import LocalTarget
from draftsmith.targets.parts import card_room


class EmbeddedSession:
    """Implements `Session`. Without a draft, prompts that are given together are decoded as batches."""

    def __init__(
        self,
        target: LocalTarget,
        drafter: Drafter | None = None,
        shape: Shape | None = None,
        draft_sampling: DraftSampling = "greedy",
    ):
        self.target, self.drafter, self.shape = target, drafter, shape
        self.tokenizer, self.identity = target.tokenizer, target.identity
        self._decoder = Decoder(target, drafter, draft_sampling=draft_sampling)

    @property
    def one(self) -> "EmbeddedSession":
        return self

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        seed: int = 0,
        *,
        at_once: int | None = None,
        ignore_end: bool = False,
    ) -> Iterator[tuple[int, Generation]]:
        if self.drafter is None and at_once != 1:
            yield from self.target.generate(prompts, sampling, max_new_tokens, stop, seed, ignore_end=ignore_end)
            return
        ends = Ends(frozenset() if ignore_end else self.target.eos_ids, self.tokenizer, stop)
        for number, prompt in enumerate(prompts):
            yield number, self._decoder.generate(prompt, sampling, max_new_tokens, self.shape, seed + number, ends)

    def logprobs(self, document: list[int]) -> list[float]:
        return self.target.logprobs(document)


class Embedded(Engine):
    name = "embedded"
    title = "draftsmith"
    drafts_trees = True
    in_process = True

    @contextlib.contextmanager
    def open(self, setup: Setup, shape: Shape | None, url: str | None = None) -> Iterator[EmbeddedSession]:
        assert url is None, "no server"
        assert setup.target is not None, "in this process"
        drafter = ready_draft(setup.target, setup.draft, setup.reading).drafter() if shape else None
        asked = setup.recipe.serve.draft_sampling
        yield EmbeddedSession(setup.target, drafter, shape, "greedy" if asked == "auto" else asked)


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
        target = LocalTarget(settings.model, settings.revision, "fp32", str(device), settings.trust_remote_code)
        try:
            yield replace(setup, target=target)
        finally:
            target.lm.to("meta")  # whoever still holds it, its weights are gone
    finally:
        served.lm.to(device)
