"""A target by `transformers`' own forward, one text at a time: any decoder that the library runs.

Slower than the packed forward of targets/local.py, and right where that one is not: attention with sinks or caps,
linear attention, state-space layers, RoPE that depends on a text's length.

Shapes: T tokens, W tokens a step, K taps, H hidden.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from draftsmith.core.errors import TargetError
from draftsmith.targets.base import Capture
from draftsmith.targets.parts import complaint_of

TEXT = [1, 2, 3, 4, 5, 6]  # what the caches are tried with
Forward = Callable[..., tuple[Tensor, Tensor]]  # of targets/local.py: (taps [1, T, K, H], last [1, T, H])


class LibraryCache:
    """The library's cache of one sequence. Cut back where it can be; a state that has read a token cannot forget it."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self.cache, self.length = make, make(), 0

    def clear(self) -> None:
        self.cache, self.length = self._make(), 0

    def keep(self, start: int, columns: list[int]) -> None:
        """Keep only these columns after `start`: the beginning of what the last forward added."""
        assert columns == list(range(start, start + len(columns))), "a chain keeps a beginning"
        if surplus := self.length - start - len(columns):
            self.cache.crop(-surplus)
            self.length -= surplus


class LibraryForward:
    """Drives `forward` (the decoder with its hooks) text by text."""

    def __init__(self, forward: Forward, config: Any, device: torch.device):
        from transformers import DynamicCache

        self.forward, self.device = forward, device
        # Without a config every layer keeps all its positions, so that any of them can be forgotten; layers with a
        # state need the config, and then there is no going back.
        self._make_cache: Callable[[], Any] = DynamicCache
        if complaint_of(self._carry_on) is not None:
            self._make_cache = partial(DynamicCache, config=config)
            if why := complaint_of(self._carry_on):
                raise ValueError(f"no cache of the library carries it on: {why}")
        self.can_cut_back = complaint_of(self._cut_back) is None

    def _carry_on(self) -> None:
        """Raises unless a text that comes bit by bit gives the states of a whole one."""
        cache = self.new_cache()
        self._run(TEXT[:4], cache)
        # One by one, as generation goes: some state-space layers forget their state where several come in.
        rest = torch.cat([self._run([token], cache)[1] for token in TEXT[4:]])
        if not _close(rest, self._run(TEXT, None)[1][4:]):
            raise ValueError("its cache gives other states than a whole text")

    def _cut_back(self) -> None:
        """Raises unless a sequence goes on from a cut cache as if nothing had been cut."""
        cache = self.new_cache()
        self._run([*TEXT[:3], 3, 2], cache)
        cache.keep(2, [2])
        if not _close(self._run(TEXT[3:], cache)[1], self._run(TEXT, None)[1][3:]):
            raise ValueError("its cut cache gives other states than a whole text")

    def new_cache(self) -> LibraryCache:
        return LibraryCache(self._make_cache)

    def _run(self, ids: Sequence[int], cache: LibraryCache | None, taps: Sequence[int] = ()) -> Capture:
        """Of a text, or of what goes on with it."""
        start = cache.length if cache else 0
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        inputs = torch.tensor([list(ids)], device=self.device)
        tapped, last = self.forward(inputs, positions, cache.cache if cache else None, None, taps)
        if cache:
            cache.length += len(ids)
        return Capture(tapped[0], last[0])

    def prefill(self, cache: LibraryCache | None, prompts: list[list[int]], taps: Sequence[int]) -> Capture:
        """Of all prompts, end to end; a cache has room for one."""
        if cache:
            cache.clear()
        made = [self._run(prompt, cache, taps) for prompt in prompts]
        return Capture(*map(torch.cat, zip(*made, strict=True)))

    def verify(self, cache: LibraryCache, length: int, ids: list[int], depths: Tensor, taps: Sequence[int]) -> Capture:
        if depths.tolist() != list(range(len(ids))):
            raise TargetError("evaluate.shapes: this target runs by transformers' own forward, which verifies chains")
        assert cache.length == length
        return self._run(ids, cache, taps)


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(b.abs().max())
    return float((a - b).abs().max()) <= (1e-3 if a.dtype == torch.float32 else 0.1) * scale
