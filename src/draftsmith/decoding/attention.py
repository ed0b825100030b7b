"""One attention function for everything a target has to do: packed documents, batches with ragged lengths, trees.

`transformers` hands keyword arguments of the model's forward down to the attention function named in the
configuration. We register one function, `draftsmith`, and pass it a *plan* that says who may see whom. Because no
mask builder is registered under that name, `transformers` builds no mask of its own.

Shapes: B batch, T positions, W query tokens of a step, L cached positions, N heads, D head dimension.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from draftsmith.decoding import flash

ATTENTION_NAME = "draftsmith"


@dataclass
class PackedPlan:
    """Documents one after the other in a single row of the batch; each is causal in itself and sees no other."""

    lengths: list[int]
    _sequences: list[flash.Sequences] = field(default_factory=list)

    def sequences(self, device: torch.device) -> flash.Sequences:
        """Made once per forward, for all layers."""
        if not self._sequences:
            starts = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
            self._sequences.append(flash.Sequences(starts, starts, max(self.lengths), max(self.lengths)))
        return self._sequences[0]


@dataclass
class MaskedPlan:
    """Queries against a cache, with any visibility: ragged batches and token trees.

    visible_BWL: True where the query may look, before a layer's sliding window.
    query_positions_BW, key_positions_BL: sequence positions, for the layers that have a window.
    """

    visible_BWL: Tensor
    query_positions_BW: Tensor
    key_positions_BL: Tensor
    _bias: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [B, 1, groups * W, L], made once per forward and shared by all layers of a kind."""
        key = (window, groups, dtype)
        if key not in self._bias:
            visible = self.visible_BWL
            if window is not None:
                distance = self.query_positions_BW[:, :, None] - self.key_positions_BL[:, None, :]
                visible = visible & (distance < window)
            bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            bias.masked_fill_(~visible, float("-inf"))
            self._bias[key] = bias[:, None].repeat(1, 1, groups, 1)
        return self._bias[key]


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, plan: PackedPlan, scale: float | None, window: int | None
) -> Tensor:
    if flash.takes(query):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return flash.forward(q, k, v, plan.sequences(query.device), scale, window)[0].transpose(0, 1)[None]
    groups = query.shape[1] // key.shape[1]
    outputs, start = [], 0
    for length in plan.lengths:
        document = slice(start, start + length)
        start += length
        q, k, v = query[:, :, document], key[:, :, document], value[:, :, document]
        if groups > 1:  # copies, which flash does without
            k = k[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
            v = v[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
        mask = None
        if window is not None and length > window:
            position = torch.arange(length, device=q.device)
            distance = position[:, None] - position[None, :]
            mask = (distance >= 0) & (distance < window)
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale))
    return torch.cat(outputs, dim=2)


def _attend_masked(
    query: Tensor, key: Tensor, value: Tensor, plan: MaskedPlan, scale: float | None, window: int | None
) -> Tensor:
    batch, query_heads, width, dim = query.shape
    kv_heads = key.shape[1]
    groups = query_heads // kv_heads
    # The query heads that share a key head become more query rows of it, so keys and values are never repeated.
    folded = query.reshape(batch, kv_heads, groups * width, dim)
    out = F.scaled_dot_product_attention(
        folded, key, value, attn_mask=plan.bias(window, groups, query.dtype), scale=scale
    )
    return out.reshape(batch, query_heads, width, dim)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    plan: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with `transformers`; returns ([B, T, N, D], None)."""
    if plan is None:
        raise ValueError("the target's layers do not pass the keyword argument `plan` on to their attention")
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ValueError("attention with soft-capping or sinks is not supported")
    attend_with = _attend_packed if isinstance(plan, PackedPlan) else _attend_masked
    return attend_with(query, key, value, plan, scaling, sliding_window).transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, attend)
