"""Speculative decoding of one sequence: draft a tree, verify it in one target forward, keep what was right.

The same loop with no drafter is plain decoding, so both are measured on equal terms.

Shapes: W verified tokens, K taps, H hidden, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from draftsmith.decoding.sampling import Sampling, probabilities
from draftsmith.decoding.tree import DraftTree, Shape, grow_tree
from draftsmith.decoding.verify import Verdict, verify_greedy, verify_sampling
from draftsmith.drafts.eagle3 import DraftCache, Eagle3Draft


class VerifyingTarget(Protocol):
    """What decoding needs of a target; `LocalTarget` has it."""

    device: torch.device
    eos_ids: frozenset[int]

    @property
    def context(self) -> int: ...
    def new_cache(self, capacity: int) -> Any: ...
    def prefill(
        self, cache, rows: list[int], prompts: list[list[int]], taps: Sequence[int]
    ) -> tuple[Tensor, Tensor]: ...
    def verify(
        self, cache, length: int, ids: list[int], depths: Tensor, ancestors: Tensor, taps: Sequence[int]
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

    def propose(self, root: int, shape: Shape) -> DraftTree: ...


class Eagle3Drafter:
    """Drives an EAGLE-3 draft step by step."""

    def __init__(self, draft: Eagle3Draft, ids_D: Tensor, embedding_VH: Tensor):
        self.draft = draft.eval()
        self.taps = draft.config.taps
        self.ids = ids_D.tolist()
        self.embedding_VH = embedding_VH
        self.dtype = draft.fc.weight.dtype
        self.device = draft.fc.weight.device
        self.start()

    def start(self) -> None:
        self._cache = DraftCache(self.draft.config, 256, self.dtype, self.device)
        self._verified = 0
        self._output: Tensor | None = None

    def _embed(self, ids: list[int]) -> Tensor:
        return self.embedding_VH[torch.tensor(ids, device=self.embedding_VH.device)].to(self.device, self.dtype)

    @torch.inference_mode()
    def extend(self, taps_WKH: Tensor, next_ids: list[int]) -> None:
        width, start = len(next_ids), self._verified
        self._cache.length = start  # drops the rows of the guesses
        positions = torch.arange(start, start + width, device=self.device)
        visible = None
        if width > 1:
            visible = torch.arange(start + width, device=self.device)[None] <= positions[:, None]
        features = self.draft.fuse(taps_WKH.to(self.dtype))
        self._output = self.draft.step(self._embed(next_ids), features, positions, self._cache, visible)[-1:]
        self._verified = start + width

    @torch.inference_mode()
    def propose(self, root: int, shape: Shape) -> DraftTree:
        assert self._output is not None, "extend comes first"
        k, base = shape.topk, self._verified
        self._cache.length = base  # a tree proposed before is forgotten
        outputs = self._output
        own = torch.zeros(k, 0, dtype=torch.bool, device=self.device)  # guess rows that each beam node sees

        def expand(tokens: list[int], beam_parents: list[int]) -> Tensor:
            nonlocal outputs, own
            step = own.shape[1] // k
            if beam_parents[0] < 0:
                features, seen = outputs.expand(k, -1), own
            else:
                index = torch.tensor(beam_parents, device=self.device)
                features, seen = outputs[index], own[index]
            own = torch.cat([seen, torch.eye(k, dtype=torch.bool, device=self.device)], dim=1)
            visible = None
            if k > 1:
                visible = torch.cat([own.new_ones(k, base), own], dim=1)
            positions = torch.full((k,), base + step, device=self.device)
            outputs = self.draft.step(self._embed(tokens), features, positions, self._cache, visible)
            return torch.softmax(self.draft.logits(outputs).float(), dim=-1)

        first = torch.softmax(self.draft.logits(self._output)[0].float(), dim=-1)
        return grow_tree(root, first, expand, self.ids.__getitem__, shape)


@dataclass
class Step:
    """One verification: index of its root in the completion, drafted depth, accepted draft tokens."""

    root: int
    depth: int
    accepted: int


@dataclass
class Decoded:
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""  # eos, stop or length; empty while decoding
    steps: list[Step] = field(default_factory=list)
    seconds: float = 0.0  # decoding only, the prompt's own forward excluded

    def counted_steps(self, steps: int, limit: int | None = None) -> list[Step]:
        """Steps that could have accepted `steps` tokens before the completion (or `limit`) ended."""
        end = len(self.ids) if limit is None else min(limit, len(self.ids))
        return [s for s in self.steps if s.root + steps < end]


class Decoder:
    """One target, with or without a drafter, batch 1."""

    def __init__(self, target: VerifyingTarget, drafter: Drafter | None = None, capacity: int = 1024):
        self.target, self.drafter = target, drafter
        self._cache = target.new_cache(capacity)  # buffers are kept between sequences
        self._taps = tuple(drafter.taps) if drafter else ()

    @torch.inference_mode()
    def generate(
        self,
        prompt: list[int],
        sampling: Sampling,
        max_new_tokens: int,
        shape: Shape | None = None,
        seed: int = 0,
        ends: Callable[[list[int]], int | None] | None = None,
    ) -> Decoded:
        """Decode until an end token, `max_new_tokens`, or `ends(ids)`, which returns the length to cut to."""
        target, drafter = self.target, self.drafter
        max_new_tokens = min(max_new_tokens, target.context - len(prompt))  # no text runs past the context
        generator = torch.Generator().manual_seed(seed)
        result = Decoded()
        taps, last = target.prefill(self._cache, [0], [prompt], self._taps)
        length = len(prompt)
        root = self._verify(DraftTree([0], [-1]), last[-1:], sampling, generator).bonus
        if drafter:
            drafter.start()
            drafter.extend(taps, [*prompt[1:], root])
        started = time.perf_counter()
        self._emit(result, [root], max_new_tokens, ends)
        while not result.finish_reason:
            tree = drafter.propose(root, shape) if drafter and shape else DraftTree([root], [-1])
            taps, last = target.verify(
                self._cache, length, tree.tokens, torch.tensor(tree.depths), tree.ancestors(), self._taps
            )
            verdict = self._verify(tree, last, sampling, generator)
            path = verdict.path
            result.steps.append(Step(len(result.ids) - 1, max(tree.depths), len(path) - 1))
            self._cache.keep(length, [length + node for node in path])
            length += len(path)
            new = [*(tree.tokens[node] for node in path[1:]), verdict.bonus]
            if drafter:
                drafter.extend(taps[path], new)
            self._emit(result, new, max_new_tokens, ends)
            root = verdict.bonus
        result.seconds = time.perf_counter() - started
        return result

    def _verify(self, tree: DraftTree, last: Tensor, sampling: Sampling, generator: torch.Generator) -> Verdict:
        logits = self.target.logits(last)
        if sampling.greedy:
            return verify_greedy(tree, logits.argmax(-1).tolist())
        return verify_sampling(tree, lambda node: probabilities(logits[node][None], sampling)[0].cpu(), generator)

    def _emit(self, result: Decoded, tokens: list[int], max_new_tokens: int, ends) -> None:
        """Append tokens one by one, so that an end inside a step cuts the rest of it."""
        for token in tokens:
            result.ids.append(token)
            if token in self.target.eos_ids:
                result.finish_reason = "eos"
            elif ends is not None and (cut := ends(result.ids)) is not None:
                del result.ids[cut:]
                result.finish_reason = "stop"
            elif len(result.ids) >= max_new_tokens:
                result.finish_reason = "length"
            else:
                continue
            return
