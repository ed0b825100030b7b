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
        self._write: tuple[Any, ...] = ()
        self._visible_length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._visible_length  # asked for by `transformers` only where no position ids are given

    def write_packed(self, rows_T: Tensor, columns_T: Tensor) -> None:
        """The next forward is packed: token i goes to [rows[i], columns[i]] and attention sees only the pack."""
        self._write = ("packed", rows_T, columns_T)

    def write_slice(self, start: int, width: int) -> None:
        """The next forward adds `width` tokens at column `start` of every sequence."""
        self._write = ("slice", start, width)
        self._visible_length = start + width

    def write_ragged(self, columns_BW: Tensor, visible_length: int) -> None:
        """The next forward adds W tokens to every sequence, at its own columns."""
        rows = torch.arange(self.batch_size, device=columns_BW.device)[:, None].expand_as(columns_BW)
        self._write = ("ragged", rows, columns_BW)
        self._visible_length = visible_length

    def reserve(self, length: int) -> None:
        """Make room for `length` columns."""
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
        for buffers in (self.keys, self.values):
            for buffer in buffers:
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
        kind, where, what = self._write
        if kind == "slice":
            keys[:, :, where : where + what] = key
            values[:, :, where : where + what] = value
        elif kind == "packed":
            keys[where, :, what] = key[0].transpose(0, 1)
            values[where, :, what] = value[0].transpose(0, 1)
            return key, value
        else:
            keys[where, :, what] = key.transpose(1, 2)
            values[where, :, what] = value.transpose(1, 2)
        return keys[:, :, : self._visible_length], values[:, :, : self._visible_length]
