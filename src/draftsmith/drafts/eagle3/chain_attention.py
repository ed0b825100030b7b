"""Attention of training-time test (EAGLE-3, section 3.2) in time and memory linear in the chains.

Step i of chain s sees the target-fed positions of its document up to s (step 0's keys) and its own i later steps.
Nothing else: no chain sees another chain's guesses. So a query needs one causal product with step 0's keys, the same
at every step, and i dot products with its own keys. Both parts are merged through their log-sum-exps, and each part's
backward is exact once it is given the merged output and the merged log-sum-exp (as in ring attention).

Shapes: T tokens, R chains, I earlier steps, N query heads, M key heads, D head dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from draftsmith.drafts.packing import Segment

_FLASH_DEVICES = ("cpu",)  # elsewhere the block is plain PyTorch
_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if causal:
        size = query.shape[2]
        hidden = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _block_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(output [1, N, R, D], log-sum-exp [1, N, R]) of one block of keys."""
    if query.device.type in _FLASH_DEVICES:
        return _flash_cpu(query, key, value, 0.0, causal, scale=scale)
    scores = _scores(query, key, causal, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def _block_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given the output and log-sum-exp over *all* blocks."""
    if query.device.type in _FLASH_DEVICES:
        return _flash_cpu_backward(grad, query, key, value, out, lse, 0.0, causal, scale=scale)
    weights = (_scores(query, key, causal, scale) - lse[..., None]).exp()
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    grad_scores = (weights * ((grad @ value.transpose(-1, -2)).float() - delta) * scale).to(query.dtype)
    grad_value = weights.to(grad.dtype).transpose(-1, -2) @ grad
    return grad_scores @ key, grad_scores.transpose(-1, -2) @ query, grad_value


def _blocks(segment: Segment) -> list[tuple[slice, bool]]:
    """Key ranges of step 0 that a segment's queries see, and whether the range is causal."""
    before = [(slice(segment.document, segment.first), False)] if segment.first > segment.document else []
    return [*before, (slice(segment.first, segment.last), True)]


def _heads_first(x: Tensor, groups: int = 1) -> Tensor:
    """[T, M, D] -> [1, M * groups, T, D] with stride 0 over the groups."""
    x = x.transpose(0, 1)
    return (x if groups == 1 else x[:, None].expand(-1, groups, -1, -1).flatten(0, 1))[None]


class ChainAttention(torch.autograd.Function):
    """apply(query [R, N, D], key0 [T, M, D], value0, own_keys [I, R, M, D], own_values, segments) -> [R, N, D]"""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key0: Tensor,
        value0: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        segments: Sequence[Segment],
    ) -> Tensor:
        chains, heads, dim = query.shape
        groups = heads // key0.shape[1]
        scale = dim**-0.5
        out = query.new_empty(chains, heads, dim)
        lse = torch.empty(chains, heads, dtype=torch.float32, device=query.device)
        offset = 0
        for segment in segments:
            rows = slice(offset, offset + len(segment))
            offset += len(segment)
            q = _heads_first(query[rows])
            outputs, sums = [], []
            for keys, causal in _blocks(segment):
                o, s = _block_forward(
                    q, _heads_first(key0[keys], groups), _heads_first(value0[keys], groups), causal, scale
                )
                outputs.append(o[0].transpose(0, 1))
                sums.append(s[0].float().transpose(0, 1))
            total = torch.logaddexp(*sums) if len(sums) > 1 else sums[0]
            if len(own_keys):
                mine = ChainAttention._own_scores(query[rows], own_keys[:, rows], scale)
                total = torch.logaddexp(total, mine.logsumexp(0))
            parts = [o.float() * (s - total).exp()[..., None] for o, s in zip(outputs, sums, strict=True)]
            merged = torch.stack(parts).sum(0)
            if len(own_keys):
                weights = (mine - total).exp().unflatten(2, (-1, groups))
                merged += torch.einsum("irmg,irmd->rmgd", weights, own_values[:, rows].float()).flatten(1, 2)
            out[rows], lse[rows] = merged.to(out.dtype), total
        ctx.save_for_backward(query, key0, value0, own_keys, own_values, out, lse)
        ctx.segments, ctx.scale, ctx.groups = segments, scale, groups
        return out

    @staticmethod
    def _own_scores(query: Tensor, own_keys: Tensor, scale: float) -> Tensor:
        """[I, R, N]"""
        grouped = query.float().unflatten(1, (own_keys.shape[2], -1))
        return torch.einsum("rmgd,irmd->irmg", grouped, own_keys.float()).flatten(2) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key0, value0, own_keys, own_values, out, lse = ctx.saved_tensors
        scale, groups = ctx.scale, ctx.groups
        kv_heads = key0.shape[1]
        grad = grad.contiguous()
        grad_query = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        grad_key0 = torch.zeros(key0.shape, dtype=torch.float32, device=query.device)
        grad_value0 = torch.zeros_like(grad_key0)
        offset = 0
        for segment in ctx.segments:
            rows = slice(offset, offset + len(segment))
            offset += len(segment)
            q, g, o = _heads_first(query[rows]), _heads_first(grad[rows]), _heads_first(out[rows])
            s = lse[rows].transpose(0, 1)[None].contiguous()
            for keys, causal in _blocks(segment):
                gq, gk, gv = _block_backward(
                    g, q, _heads_first(key0[keys], groups), _heads_first(value0[keys], groups), o, s, causal, scale
                )
                grad_query[rows] += gq[0].transpose(0, 1)
                grad_key0[keys] += gk[0].unflatten(0, (kv_heads, groups)).sum(1, dtype=torch.float32).transpose(0, 1)
                grad_value0[keys] += gv[0].unflatten(0, (kv_heads, groups)).sum(1, dtype=torch.float32).transpose(0, 1)
        grad_own_keys = grad_own_values = None
        if len(own_keys):
            grad_f = grad.float()
            weights = (ChainAttention._own_scores(query, own_keys, scale) - lse).exp()
            delta = (grad_f * out.float()).sum(-1)
            grouped_grad = grad_f.unflatten(1, (kv_heads, groups))
            grouped_query = query.float().unflatten(1, (kv_heads, groups))
            values = own_values.float()
            reach = torch.einsum("rmgd,irmd->irmg", grouped_grad, values).flatten(2)
            grad_scores = (weights * (reach - delta) * scale).unflatten(2, (kv_heads, groups))
            grad_query += torch.einsum("irmg,irmd->rmgd", grad_scores, own_keys.float()).flatten(1, 2)
            grad_own_keys = torch.einsum("irmg,rmgd->irmd", grad_scores, grouped_query).to(own_keys.dtype)
            weights = weights.unflatten(2, (kv_heads, groups))
            grad_own_values = torch.einsum("irmg,rmgd->irmd", weights, grouped_grad).to(own_values.dtype)
        return (
            grad_query.to(query.dtype),
            grad_key0.to(key0.dtype),
            grad_value0.to(value0.dtype),
            grad_own_keys,
            grad_own_values,
            None,
        )
