"""A GPU that is not there: a torch device with CUDA's rules, whose tensors wrap CPU tensors and so have real values.

    with PretendedGPU() as gpu:
        model.to(gpu.device)(ids)
    assert gpu.waits == 0

It refuses what CUDA refuses (a CPU tensor meets one of the device, an unfit argument of the flash kernel) and counts
what CUDA charges for: kernels, and moments at which the host waits for the device. Kernels themselves, streams, several
GPUs and other threads are not covered.
"""

import functools
import os
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default}
FUSED = {aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default, aten.softmax.int}
SIZE_UNKNOWN = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
_setup_privateuseone_for_python_backend(NAME)  # before the first backward: autograd counts devices once


class OnDevice(torch.Tensor):
    """`behind` is the CPU tensor behind it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real):
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=torch.device(NAME, 0),
        )
        out.behind = real
        return out

    def tolist(self):  # torch has none for tensors without memory of their own
        PretendedGPU.current.wait("tolist")
        return self.behind.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendedGPU.current.run(func, args, kwargs or {})


class DeviceMix(RuntimeError):
    pass


def _is_on(device) -> bool:
    return device is not None and torch.device(device).type == NAME


def _each_tensor(change, x):
    """`change` of every tensor of an operator's argument or result."""
    if isinstance(x, torch.Tensor):
        return change(x)
    return type(x)(_each_tensor(change, y) for y in x) if isinstance(x, (list, tuple)) else x


@functools.cache
def _is_composite(func) -> bool:
    return func not in FUSED and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


class PretendedGPU(TorchDispatchMode):
    current: "PretendedGPU"

    def __init__(self):
        super().__init__()
        self.device = torch.device(NAME, 0)
        self.kernels = self._depth = 0
        self.where: Counter[str] = Counter()

    @property
    def waits(self) -> int:
        return sum(self.where.values())

    @contextmanager
    def counted(self):
        """Counts from zero."""
        self.kernels = 0
        self.where.clear()
        yield self

    def wait(self, why: str) -> None:
        """The host waits; counted by the line of the package that makes it."""
        frame = sys._getframe(1)
        while frame and f"{os.sep}draftsmith{os.sep}" not in frame.f_code.co_filename:
            frame = frame.f_back
        line = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" if frame else "elsewhere"
        self.where[f"{why} at {line}"] += 1

    def __enter__(self):
        PretendedGPU.current = self
        self._depth += 1
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is made on the CPU and then moved
        return super().__enter__()

    def __exit__(self, *error):
        self._depth -= 1
        if not self._depth:
            torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        if _is_composite(func):
            with self:  # under inference mode composite operators arrive whole
                return func.decompose(*args, **kwargs)
        found: list[torch.Tensor] = []
        _each_tensor(found.append, (args, tuple(kwargs.values())))
        on = [x for x in found if isinstance(x, OnDevice)]
        off = [x for x in found if not isinstance(x, OnDevice) and x.ndim]  # numbers of the CPU may meet anything
        asked = kwargs.get("device")
        if not on and not _is_on(asked):
            return func(*args, **kwargs)
        self._refuse_mixes(func, args, on, off)
        self._count(func, args, kwargs, on)
        out = self._real(func, args, kwargs)
        if not isinstance(out, torch.Tensor) and not isinstance(out, (tuple, list)):
            return out
        if func._schema.is_mutable and isinstance(out, torch.Tensor):
            for given in (*args, *kwargs.values()):
                if isinstance(given, OnDevice) and given.behind is out:
                    return given
        to_host = (asked is not None and not _is_on(asked)) or (func in COPIES and asked is None and args[0] in off)
        if to_host:
            return out
        # a view that inference mode takes of an ordinary tensor is an ordinary tensor
        ordinary = func.is_view and torch.is_inference_mode_enabled() and on and not on[0].is_inference()
        with torch.inference_mode(False) if ordinary else nullcontext():
            return _each_tensor(OnDevice, out)

    def _refuse_mixes(self, func, args, on, off) -> None:
        if not (on and off) or func in COPIES:
            return
        if func in INDEXING and isinstance(args[0], OnDevice):  # CUDA takes indices from the CPU, at a price
            off = [x for x in args[2:3] if isinstance(x, torch.Tensor) and x.ndim and not isinstance(x, OnDevice)]
        if off:
            raise DeviceMix(f"{func}: tensors of the CPU and of the device, {[tuple(x.shape) for x in off]}")

    def _count(self, func, args, kwargs, on) -> None:
        if not func.is_view:
            self.kernels += 1
        name = func._schema.name.split("::")[1]
        if func is aten._local_scalar_dense.default:
            self.wait("a number read")
        elif func in SIZE_UNKNOWN or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.wait(f"{name}, whose size the device knows")
        elif func in INDEXING:
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype == torch.bool for i in indices):
                self.wait("a boolean index")
            if any(not isinstance(i, OnDevice) and i.ndim for i in indices):
                self.wait("an index of the CPU")
        elif func in COPIES:
            source, target = (args[1], args[0]) if func is aten.copy_.default else (args[0], None)
            goes_on = isinstance(target, OnDevice) if target is not None else _is_on(kwargs.get("device") or NAME)
            free = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
            if isinstance(source, OnDevice) != goes_on and not (free and goes_on):
                self.wait("a copy to the device" if goes_on else "a copy to the host")

    def _real(self, func, args, kwargs):
        def behind(x):
            return x.behind if isinstance(x, OnDevice) else x

        real_args = [_each_tensor(behind, x) for x in args]
        real_kwargs = {name: _each_tensor(behind, x) for name, x in kwargs.items()}
        if real_kwargs.get("device") is not None:
            real_kwargs["device"] = torch.device("cpu")
        if real_kwargs.get("pin_memory"):
            real_kwargs["pin_memory"] = False
        if func is aten.histc.default:  # CUDA has one for integers
            return func(real_args[0].float(), *real_args[1:], **real_kwargs).to(real_args[0].dtype)
        if func in FLASH:
            return FLASH[func](*real_args, **real_kwargs)
        return func(*real_args, **real_kwargs)


# --- the flash kernel, as flash_api.cpp of PyTorch describes it -----------------------------------------------------


def _each(query, key, query_starts, key_starts, causal, window_left):
    """Per sequence: its slices of queries and keys, and what is hidden [q, k]; the mask is aligned at the bottom."""
    assert query.dtype in (torch.bfloat16, torch.float16)
    assert key.dtype == query.dtype
    assert query.shape[-1] % 8 == 0
    assert query.shape[-1] <= 256
    assert query_starts.dtype == key_starts.dtype == torch.int32
    assert query_starts[-1] == len(query)
    assert key_starts[-1] == len(key)
    for sequence in range(len(query_starts) - 1):
        q = slice(*query_starts[sequence : sequence + 2].tolist())
        k = slice(*key_starts[sequence : sequence + 2].tolist())
        ahead = k.stop - k.start - (q.stop - q.start)
        at = torch.arange(q.stop - q.start)[:, None] + ahead - torch.arange(k.stop - k.start)
        hidden = at < 0 if causal or window_left is not None else torch.zeros_like(at, dtype=torch.bool)
        if window_left is not None:
            hidden = hidden | (at > window_left)
        yield q, k, hidden


def _repeated(x, heads):
    return x.float().repeat_interleave(heads // x.shape[1], 1)


def _flash_forward(
    query, key, value, query_starts, key_starts, longest_query, longest_keys, dropout, causal, debug,
    *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    assert longest_query == query_starts.diff().max()
    assert longest_keys == key_starts.diff().max()
    out, lse = torch.empty_like(query), torch.empty(query.shape[1], len(query))
    for q, k, hidden in _each(query, key, query_starts, key_starts, causal, window_size_left):
        keys, values = _repeated(key[k], query.shape[1]), _repeated(value[k], query.shape[1])
        scores = torch.einsum("qnd,knd->nqk", query[q].float(), keys).mul(scale).masked_fill(hidden, float("-inf"))
        lse[:, q] = scores.logsumexp(-1)
        out[q] = torch.einsum("nqk,knd->qnd", scores.softmax(-1), values).to(out.dtype)
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), torch.zeros(0)


def _flash_backward(
    grad, query, key, value, out, lse, query_starts, key_starts, longest_query, longest_keys, dropout, causal,
    state, unused, *, scale=None,
):  # fmt: skip
    heads, kv_heads = query.shape[1], key.shape[1]
    assert lse.shape == (heads, len(query))
    assert lse.is_contiguous()
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for q, k, hidden in _each(query, key, query_starts, key_starts, causal, None):
        keys, values, g = _repeated(key[k], heads), _repeated(value[k], heads), grad[q].float()
        scores = torch.einsum("qnd,knd->nqk", query[q].float(), keys).mul(scale).masked_fill(hidden, float("-inf"))
        weights = (scores - lse[:, q, None]).exp()
        delta = (g * out[q].float()).sum(-1).T[..., None]
        through = weights * (torch.einsum("qnd,knd->nqk", g, values) - delta) * scale
        grads[0][q] = torch.einsum("nqk,knd->qnd", through, keys).to(query.dtype)
        for into, x in (
            (grads[1], torch.einsum("nqk,qnd->knd", through, query[q].float())),
            (grads[2], torch.einsum("nqk,qnd->knd", weights, g)),
        ):
            into[k] = x.unflatten(1, (kv_heads, -1)).sum(2).to(into.dtype)
    return grads


FLASH = {
    aten._flash_attention_forward.default: _flash_forward,
    aten._flash_attention_backward.default: _flash_backward,
}
