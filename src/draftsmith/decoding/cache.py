"""A key/value cache with static buffers, for one sequence or many of different lengths.

The target's layers call `update`; before each forward the caller says where the new rows go. All layers keep all
positions: a layer's sliding window is a matter of the attention plan, so that rejected rows can be dropped from any
layer by moving a length.

Shapes: B sequences, T packed tokens, W tokens a step, L capacity, N key heads, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor


class StaticCache:
    """Allocated on first use; grows by half when `reserve` asks for more, ahead of need up to `most` columns."""

    def __init__(self, batch_size: int, capacity: int, most: int | None = None):
        self.batch_size = batch_size
        self.capacity, self.most = capacity, most
        self.keys: list[Tensor] = []  # per layer [B, N, L, D]
        self.values: list[Tensor] = []
        self._rows: Tensor | slice = slice(None)
        self._columns: Tensor | slice = slice(0)
        self._visible_length: int | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._visible_length or 0  # asked for by `transformers` only where no position ids are given

    def write(self, rows: Tensor | slice, columns: Tensor | slice, visible_length: int | None) -> None:
        """Where the next forward's tokens go: [rows, columns] as indices of [B, L].

        Attention then sees the first `visible_length` columns of every sequence; None: only what the forward brings.
        """
        self._rows, self._columns, self._visible_length = rows, columns, visible_length

    def reserve(self, length: int) -> None:
        if length <= self.capacity:
            return
        ahead = self.capacity * 3 // 2
        grown = max(length, ahead if self.most is None else min(ahead, self.most))
        for buffers in (self.keys, self.values):
            for i, old in enumerate(buffers):
                new = old.new_zeros(*old.shape[:2], grown, old.shape[3])
                new[:, :, : self.capacity] = old
                buffers[i] = new
        self.capacity = grown

    def keep(self, start: int, columns: list[int]) -> None:
        """Keep only these columns (ascending, at or after `start`), moved to `start`, `start` + 1, ..."""
        if columns == list(range(start, start + len(columns))):
            return
        index = torch.tensor(columns)
        for buffer in (*self.keys, *self.values):
            buffer[:, :, start : start + len(columns)] = buffer[:, :, index]

    def select_rows(self, rows: list[int]) -> None:
        """Keep only these sequences, in this order."""
        index = torch.tensor(rows, dtype=torch.long)
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                buffers[i] = buffer[index.to(buffer.device)]
        self.batch_size = len(rows)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        if layer_idx == len(self.keys):
            shape = (self.batch_size, key.shape[1], self.capacity)
            self.keys.append(key.new_zeros(*shape, key.shape[3]))
            self.values.append(value.new_zeros(*shape, value.shape[3]))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        for buffer, new in ((keys, key), (values, value)):
            # Tensors as indices bring the columns before the heads, slices leave them behind.
            buffer[self._rows, :, self._columns] = new.transpose(1, 2) if isinstance(self._columns, Tensor) else new
        if self._visible_length is None:
            return key, value
        return keys[:, :, : self._visible_length], values[:, :, : self._visible_length]
