"""Speculative decoding of one sequence: draft a tree, verify it in one target forward, keep what was right.

The same loop with no drafter is plain decoding, so both are measured on equal terms.

Shapes: W verified tokens, K taps, H hidden, V vocabulary.
"""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from draftsmith.core.shape import DraftSampling, Shape
from draftsmith.decoding.generation import Generation
from draftsmith.decoding.sampling import Sampling, probabilities
from draftsmith.decoding.stopping import Ends
from draftsmith.decoding.tree import DraftTree, Sampled, Take, first_choices
from draftsmith.decoding.verify import Accepted, verify_greedy, verify_sampling

CAPACITY = 1024  # tokens that a cache has room for before it grows


class VerifyingTarget(Protocol):
    """What decoding needs of a target; `LocalTarget` has it."""

    device: torch.device
    eos_ids: frozenset[int]

    @property
    def context(self) -> int: ...
    def new_cache(self, capacity: int) -> Any: ...
    def prefill(
        self, cache: Any, rows: list[int], prompts: list[list[int]], taps: Sequence[int]
    ) -> tuple[Tensor, Tensor]: ...
    def verify(
        self, cache: Any, length: int, ids: list[int], depths: Tensor, ancestors: Tensor, taps: Sequence[int]
    ) -> tuple[Tensor, Tensor]: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


class Drafter(Protocol):
    @property
    def taps(self) -> Sequence[int]: ...

    def start(self) -> None:
        """Forget the sequence before."""
        ...

    def extend(self, taps_WKH: Tensor, next_ids: list[int]) -> None:
        """Target features of the newly verified tokens, each with the token that followed it."""
        ...

    def propose(self, root: int, shape: Shape, take: Take = first_choices) -> DraftTree:
        """What may follow the root; `take` chooses the children of a node."""
        ...


class Decoder:
    """One target, with or without a drafter, batch 1. `draft_sampling`: how drafts are taken above temperature 0."""

    def __init__(
        self, target: VerifyingTarget, drafter: Drafter | None = None, draft_sampling: DraftSampling = "greedy"
    ):
        self.target, self.drafter, self.draft_sampling = target, drafter, draft_sampling
        self._cache = target.new_cache(CAPACITY)  # buffers are kept between sequences
        self._taps = tuple(drafter.taps) if drafter else ()

    @torch.inference_mode()
    def generate(
        self,
        prompt: list[int],
        sampling: Sampling,
        max_new_tokens: int,
        shape: Shape | None = None,
        seed: int = 0,
        ends: Ends | None = None,
    ) -> Generation:
        """Decode until something of `ends` comes (left out: the target's end tokens), or `max_new_tokens`."""
        target, drafter = self.target, self.drafter
        ends = ends or Ends(target.eos_ids)
        room = min(max_new_tokens, target.context - len(prompt))  # no text runs past the context
        generator = torch.Generator().manual_seed(seed)
        drawing = self.draft_sampling == "sampled" and not sampling.greedy
        take = Sampled(sampling.temperature, generator) if drawing else first_choices
        taps, last = target.prefill(self._cache, [0], [prompt], self._taps)
        length = len(prompt)
        _, root = self._verify(DraftTree([0], [-1]), last[-1:], sampling, generator)
        if drafter:
            drafter.start()
            drafter.extend(taps, [*prompt[1:], root])
        started = time.perf_counter()
        ids, verified = [root], []
        ended = ends.reason(ids, room)
        while ended is None:
            tree = drafter.propose(root, shape, take) if drafter and shape else DraftTree([root], [-1])
            taps, last = target.verify(
                self._cache, length, tree.tokens, torch.tensor(tree.depths), tree.ancestors(), self._taps
            )
            path, root = self._verify(tree, last, sampling, generator)
            verified.append(len(path) - 1)
            self._cache.keep(length, [length + node for node in path])
            length += len(path)
            new = [*(tree.tokens[node] for node in path[1:]), root]
            if drafter:
                drafter.extend(taps[path], new)
            for token in new:  # one by one, so that an end inside a step cuts the rest of it
                ids.append(token)
                if ended := ends.reason(ids, room):
                    break
        steps = tuple(verified) if drafter else ()
        return Generation(ids, ended, steps, seconds=time.perf_counter() - started)

    def _verify(self, tree: DraftTree, last: Tensor, sampling: Sampling, generator: torch.Generator) -> Accepted:
        logits = self.target.logits(last)
        if sampling.greedy:
            return verify_greedy(tree, logits.argmax(-1).tolist())
        return verify_sampling(tree, lambda node: probabilities(logits[node][None], sampling)[0].cpu(), generator)
