"""PyTorch's flash attention kernel for CUDA: sequences of different lengths in one launch, with their log-sum-exps.

A mask is causal at the bottom right: the last query of a sequence sees its last key. Grouped heads are read as they
lie, nothing is repeated for them.

Shapes: Q query rows and K key rows of all sequences, one after the other; S sequences, N query heads, M key heads,
D head dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


class Sequences(NamedTuple):
    """Rows [starts[i], starts[i + 1]) are those of sequence i; int32 [S + 1], on the device of the rows. In the order
    of the kernel's arguments."""

    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_keys: int


def takes(query: Tensor) -> bool:
    """Whether the kernel runs on this device (Ampere or newer), in this dtype and for this head size."""
    return (
        query.is_cuda
        and torch.version.cuda is not None  # ROCm's is_cuda, too
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def forward(
    query: Tensor, key: Tensor, value: Tensor, at: Sequences, scale: float | None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """(output [Q, N, D], log-sum-exp [N, Q] in fp32). With a window a query sees itself and the window - 1 before."""
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    out, lse, *_ = _forward(query, key, value, *at, 0.0, window is None, False, scale=scale, **sides)
    return out, lse


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, at: Sequences, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. `out` and `lse` may be those over more keys than are given here: then these
    are the parts of the gradients that go through the given ones."""
    unused = torch.empty(2, dtype=torch.uint64, device=query.device)  # the state of a dropout that there is none of
    return _backward(grad, query, key, value, out, lse, *at, 0.0, True, unused, unused, scale=scale)
