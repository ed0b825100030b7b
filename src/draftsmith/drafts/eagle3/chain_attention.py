"""Attention of training-time test (EAGLE-3, section 3.2) in memory linear in the chains.

Step i of chain s sees the target-fed positions of its document up to s (step 0's keys) and its own i later steps.
Nothing else: no chain sees another chain's guesses. So a query needs one causal product with step 0's keys, the same
at every step, and i dot products with its own keys. Both parts are merged through their log-sum-exps, and each part's
backward is exact once it is given the merged output and the merged log-sum-exp (as in ring attention).

The product with step 0's keys has three ways: the CPU's flash kernel, segment by segment; CUDA's flash kernel, all
segments in one launch; and plain PyTorch in fp32 for every other device, dtype and head size. That one makes scores of
a bounded number of queries at a time and is what the kernels are held against.

Shapes: T tokens, R chains, I earlier steps, N query heads, M key heads, D head dimension.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from draftsmith.decoding import flash
from draftsmith.drafts.fusion import fused
from draftsmith.drafts.packing import PackIndex, Segment, segment_rows

PLAIN_ROWS = 1024  # queries whose scores exist at once on the plain way
_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Part = tuple[Tensor, Tensor]
"""(output [r, N, D], log-sum-exp [r, N]) over some of the keys."""


def _fp32_zeros(like: Iterable[Tensor]) -> list[Tensor]:
    return [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in like]


# --- the CPU's flash kernel ---------------------------------------------------------------------------------------


def _blocks(segment: Segment) -> list[tuple[slice, bool]]:
    """Key ranges of step 0 that a segment's queries see, and whether the range is causal."""
    before = [(slice(segment.document, segment.first), False)] if segment.first > segment.document else []
    return [*before, (slice(segment.first, segment.last), True)]


def _heads_first(x: Tensor, groups: int = 1) -> Tensor:
    """[T, M, D] -> [1, M * groups, T, D]"""
    x = x.transpose(0, 1)
    return (x if groups == 1 else x[:, None].expand(-1, groups, -1, -1).flatten(0, 1))[None]


def _cpu_forward(query: Tensor, key0: Tensor, value0: Tensor, index: PackIndex, scale: float) -> Any:
    groups = query.shape[1] // key0.shape[1]
    for segment, rows in segment_rows(index.segments):
        q, parts = _heads_first(query[rows]), []
        for keys, causal in _blocks(segment):
            k, v = _heads_first(key0[keys], groups), _heads_first(value0[keys], groups)
            out, lse = _flash_cpu(q, k, v, 0.0, causal, scale=scale)
            parts.append((out[0].transpose(0, 1), lse[0].float().transpose(0, 1)))
        yield rows, parts


def _cpu_backward(grad: Tensor, saved: tuple[Tensor, ...], index: PackIndex, scale: float) -> list[Tensor]:
    query, key0, value0, out, lse = saved
    grad_query, grad_key0, grad_value0 = into = _fp32_zeros(saved[:3])
    kv_heads = key0.shape[1]
    groups = query.shape[1] // kv_heads
    for segment, rows in segment_rows(index.segments):
        q, g, o = _heads_first(query[rows]), _heads_first(grad[rows]), _heads_first(out[rows])
        s = lse[rows].transpose(0, 1)[None].contiguous()
        for keys, causal in _blocks(segment):
            k, v = _heads_first(key0[keys], groups), _heads_first(value0[keys], groups)
            gq, gk, gv = _flash_cpu_backward(g, q, k, v, o, s, 0.0, causal, scale=scale)
            grad_query[rows] += gq[0].transpose(0, 1)
            grad_key0[keys] += gk[0].unflatten(0, (kv_heads, groups)).sum(1, dtype=torch.float32).transpose(0, 1)
            grad_value0[keys] += gv[0].unflatten(0, (kv_heads, groups)).sum(1, dtype=torch.float32).transpose(0, 1)
    return into


# --- CUDA's flash kernel ------------------------------------------------------------------------------------------


def _cuda_forward(query: Tensor, key0: Tensor, value0: Tensor, index: PackIndex, scale: float) -> Any:
    """A segment's queries are the last rows of its keys [document, last), so one bottom-right causal mask fits all."""
    out, lse = flash.forward(query, key0[index.key_rows], value0[index.key_rows], index.sequences, scale)
    yield slice(None), [(out, lse.transpose(0, 1))]


def _cuda_backward(grad: Tensor, saved: tuple[Tensor, ...], index: PackIndex, scale: float) -> list[Tensor]:
    query, key0, value0, out, lse = saved
    k, v, s = key0[index.key_rows], value0[index.key_rows], lse.transpose(0, 1).contiguous()
    gq, gk, gv = flash.backward(grad, query, k, v, out, s, index.sequences, scale)
    into = _fp32_zeros(saved[1:3])
    for whole, part in zip(into, (gk, gv), strict=True):
        whole.index_add_(0, index.key_rows, part.float())  # segments of one document share keys
    return [gq, *into]


# --- plain PyTorch ------------------------------------------------------------------------------------------------


def _chunks(index: PackIndex) -> Iterator[tuple[slice, slice]]:
    """(rows of at most PLAIN_ROWS queries, the keys that the last of them sees)."""
    for segment, rows in segment_rows(index.segments):
        for start in range(0, len(segment), PLAIN_ROWS):
            stop = min(start + PLAIN_ROWS, len(segment))
            yield slice(rows.start + start, rows.start + stop), slice(segment.document, segment.first + stop)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[r, N, D] -> fp32 [M, N/M * r, D]: the heads that share a key head are more rows of it."""
    return x.float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _ungrouped(x: Tensor, rows: int) -> Tensor:
    """[M, N/M * r, ...] -> [r, N, ...]"""
    return x.unflatten(1, (-1, rows)).movedim(2, 0).flatten(1, 2)


def _plain_scores(query: Tensor, key: Tensor, rows: int, scale: float) -> Tensor:
    """[M, N/M * r, k]; the last of the r queries sees all k keys, the one before it all but the last, and so on."""
    scores = (query @ key.transpose(1, 2)).mul_(scale)
    hidden = torch.ones(rows, key.shape[1], dtype=torch.bool, device=key.device).triu_(1 + key.shape[1] - rows)
    scores.unflatten(1, (-1, rows)).masked_fill_(hidden, float("-inf"))
    return scores


def _plain_forward(query: Tensor, key0: Tensor, value0: Tensor, index: PackIndex, scale: float) -> Any:
    for rows, keys in _chunks(index):
        count = rows.stop - rows.start
        k, v = key0[keys].float().transpose(0, 1), value0[keys].float().transpose(0, 1)
        scores = _plain_scores(_grouped(query[rows], key0.shape[1]), k, count, scale)
        lse = scores.logsumexp(-1)
        out = scores.sub_(lse[..., None]).exp_() @ v
        yield rows, [(_ungrouped(out, count), _ungrouped(lse, count))]


def _plain_backward(grad: Tensor, saved: tuple[Tensor, ...], index: PackIndex, scale: float) -> list[Tensor]:
    query, key0, value0, out, lse = saved
    into = _fp32_zeros(saved[:3])
    kv_heads = key0.shape[1]
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    for rows, keys in _chunks(index):
        count = rows.stop - rows.start
        k, v = key0[keys].float().transpose(0, 1), value0[keys].float().transpose(0, 1)
        q, g = _grouped(query[rows], kv_heads), _grouped(grad[rows], kv_heads)
        weights = _plain_scores(q, k, count, scale).sub_(_grouped(lse[rows, :, None], kv_heads)).exp_()
        into[2][keys] += (weights.transpose(1, 2) @ g).transpose(0, 1)
        through = (g @ v.transpose(1, 2)).sub_(_grouped(delta[rows], kv_heads)).mul_(weights).mul_(scale)
        into[0][rows] += _ungrouped(through @ k, count)
        into[1][keys] += (through.transpose(1, 2) @ q).transpose(0, 1)
    return into


def _way(query: Tensor) -> tuple[Any, Any]:
    """(forward, backward) over step 0's keys. A forward yields rows with the parts of their keys; a backward gives the
    gradients of query, key0 and value0 that go through them, from the output and log-sum-exp over *all* keys."""
    if query.device.type == "cpu":
        return _cpu_forward, _cpu_backward
    return (_cuda_forward, _cuda_backward) if flash.takes(query) else (_plain_forward, _plain_backward)


class ChainAttention(torch.autograd.Function):
    """apply(query [R, N, D], key0 [T, M, D], value0, own_keys [I, R, M, D], own_values, index) -> [R, N, D]"""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key0: Tensor, value0: Tensor, own_keys: Tensor, own_values: Tensor, index: PackIndex
    ) -> Tensor:
        chains, heads, dim = query.shape
        scale = dim**-0.5
        attend, ctx.attend_backward = _way(query)
        out = query.new_empty(chains, heads, dim)
        lse = torch.empty(chains, heads, dtype=torch.float32, device=query.device)
        for rows, parts in attend(query, key0, value0, index, scale):
            if len(parts) > 1 or len(own_keys):
                parts = merged(query[rows], own_keys[:, rows], own_values[:, rows], parts, scale)
            [(attended, lse[rows])] = parts
            out[rows] = attended.to(out.dtype)
        ctx.save_for_backward(query, key0, value0, own_keys, own_values, out, lse)
        ctx.index, ctx.scale = index, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key0, value0, own_keys, own_values, out, lse = ctx.saved_tensors
        scale, grad = ctx.scale, grad.contiguous()
        grad_query, grad_key0, grad_value0 = ctx.attend_backward(
            grad, (query, key0, value0, out, lse), ctx.index, scale
        )
        grad_own_keys = grad_own_values = None
        if len(own_keys):
            through, grad_own_keys, grad_own_values = own_gradients(grad, query, out, lse, own_keys, own_values, scale)
            grad_query = grad_query + through
        return (
            grad_query.to(query.dtype),
            grad_key0.to(key0.dtype),
            grad_value0.to(value0.dtype),
            grad_own_keys,
            grad_own_values,
            None,
        )


def _contract(a: Tensor, b: Tensor, over: str) -> Tensor:
    """Sum of a * b over one of the dimensions I, R, M, G (queries of a key head) and D, to which both are broadcast."""
    if torch.compiler.is_compiling():  # a product of matrices would end the kernel
        return (a * b).sum("irmgd".index(over))
    return torch.einsum(f"irmgd,irmgd->{'irmgd'.replace(over, '')}", a, b)


def _by_key_head(x: Tensor, own: Tensor) -> Tensor:
    """fp32 [1, R, M, G, D] of the queries' rows [R, N, D]."""
    return x.float().unflatten(1, (own.shape[2], -1))[None]


def _own_scores(query: Tensor, own_keys: Tensor, scale: float) -> Tensor:
    """[I, R, M, G]"""
    return _contract(_by_key_head(query, own_keys), own_keys.float()[..., None, :], "d") * scale


@fused
def merged(query: Tensor, own_keys: Tensor, own_values: Tensor, parts: list[Part], scale: float) -> list[Part]:
    """Attention over all parts and the chains' own keys, as one part."""
    sums = [s for _, s in parts]
    total = torch.logaddexp(*sums) if len(sums) > 1 else sums[0]
    if len(own_keys):
        mine = _own_scores(query, own_keys, scale).flatten(2)
        total = torch.logaddexp(total, mine.logsumexp(0))
    weighted = [o.float() * (s - total).exp()[..., None] for o, s in parts]
    out = torch.stack(weighted).sum(0) if len(weighted) > 1 else weighted[0]
    if len(own_keys):
        weights = (mine - total).exp().unflatten(2, (own_keys.shape[2], -1))
        out = out + _contract(weights[..., None], own_values.float()[..., None, :], "i").flatten(1, 2)
    return [(out, total)]


@fused
def own_gradients(
    grad: Tensor, query: Tensor, out: Tensor, lse: Tensor, own_keys: Tensor, own_values: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What goes through the chains' own keys: gradients of the query (fp32), own keys and own values."""
    grad_g, query_g = _by_key_head(grad, own_keys), _by_key_head(query, own_keys)
    keys, values = own_keys.float()[..., None, :], own_values.float()[..., None, :]
    weights = (_own_scores(query, own_keys, scale) - lse.unflatten(1, (own_keys.shape[2], -1))).exp()
    delta = (grad_g * _by_key_head(out, own_keys)).sum(-1)
    scores = (weights * (_contract(grad_g, values, "d") - delta) * scale)[..., None]
    return (
        _contract(scores, keys, "i").flatten(1, 2),
        _contract(scores, query_g, "g").to(own_keys.dtype),
        _contract(weights[..., None], grad_g, "g").to(own_values.dtype),
    )
