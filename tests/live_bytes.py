"""Bytes of a training step at sizes that no CPU test could run: every tensor on the device `meta`, which has shapes and
no numbers, and every storage counted while it lives."""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from draftsmith.core.recipe import TrainRecipe
from draftsmith.core.records.data import Completion
from draftsmith.decoding import flash
from draftsmith.drafts import layers, objectives
from draftsmith.drafts.eagle3.config import Eagle3Config
from draftsmith.drafts.eagle3.model import Eagle3Draft
from draftsmith.drafts.eagle3.ttt import TTTLoss
from draftsmith.drafts.objectives import pack_inputs
from draftsmith.drafts.packing import Pack, make_pack

META = torch.device("meta")
STEPS, DRAFT_VOCAB, PROMPT = 7, 32000, 200
QWEN3_8B = dict(
    hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8, vocab_size=151936
)
MINIMAX_M27 = dict(
    hidden_size=3072, intermediate_size=6144, num_attention_heads=48, num_key_value_heads=8, vocab_size=200064
)


class LiveBytes(TorchDispatchMode):
    """`live` now and `peak` since it was last set, of storages on the device that were made inside."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device == self.device:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, key):
        self.live -= self._sizes.pop(key)


@dataclass(frozen=True)
class StepBytes:
    """Of one pack. `base`: bf16 weights, embedding and rows of the head; the others come on top of it."""

    base: int
    prepare: int
    inputs: int
    forward: int
    held: int
    backward: int

    @property
    def peak(self) -> int:
        return max(self.prepare, self.forward, self.backward)


class KeptByCuda(torch.autograd.Function):
    """A result of the first argument's shape; the arguments are kept, and nothing that lies between."""

    @staticmethod
    def forward(ctx, *given):
        ctx.save_for_backward(*given)
        return torch.empty_like(given[0])

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


@contextlib.contextmanager
def as_on_cuda(by_flash: bool = True) -> Iterator[None]:
    """CUDA's fused norm, flash attention and compiled functions hold less than what PyTorch falls back to elsewhere, so
    stand-ins of their shapes take their places."""

    def weighted(logits, p, teacher_rows, weights, kl_weights, objective):
        return weights.sum(), torch.empty_like(logits), torch.empty_like(weights)

    with (
        mock.patch.object(flash, "takes", lambda query: by_flash and query.dtype == torch.bfloat16),
        mock.patch.object(torch.nn.RMSNorm, "forward", lambda self, x: KeptByCuda.apply(x, self.weight)),
        mock.patch.object(layers, "gated", KeptByCuda.apply),
        mock.patch.object(objectives, "weighted", weighted),
        mock.patch.object(objectives, "accepted", lambda logits, p, rows: rows.new_empty(len(rows), dtype=torch.float)),
    ):
        yield


def draft_config(dimensions: dict, length: int) -> Eagle3Config:
    return Eagle3Config(
        **dimensions,
        head_dim=128,
        draft_vocab_size=DRAFT_VOCAB,
        taps=(1, 2, 3),
        rope_theta=1e4,
        max_position_embeddings=length,
    )


def long_pack(documents: int, length: int) -> Pack:
    rows = [Completion(id=str(i), ids=[1] * length, spans=[(PROMPT, length)]) for i in range(documents)]
    return make_pack(rows)


def step_bytes(dimensions: dict, documents: int, length: int, device: torch.device = META) -> StepBytes:
    """One pack's forward and backward in bf16; gradients of the bf16 weights are among the bytes."""
    pack, config = long_pack(documents, length), draft_config(dimensions, length)
    size, vocabulary, tokens = config.hidden_size, config.vocab_size, len(pack.ids_T)
    bf16 = dict(dtype=torch.bfloat16, device=device)
    bytes_ = LiveBytes(device)
    # A real one counts for itself: under such a mode torch.compile would step aside.
    with contextlib.nullcontext() if device.type == "cuda" else bytes_:
        with device:
            loss = TTTLoss(Eagle3Draft(config).bfloat16(), TrainRecipe(ttt_steps=STEPS))
        embedding, head = torch.empty(vocabulary, size, **bf16), torch.empty(DRAFT_VOCAB, size, **bf16)
        base = bytes_.peak = bytes_.live
        taps, last = torch.empty(tokens, 3, size, **bf16), torch.empty(tokens, size, **bf16)
        inputs = pack_inputs(pack, taps, last, embedding, head, None, None, torch.bfloat16)
        del taps, last
        prepare, bytes_.peak, held_inputs = bytes_.peak - base, bytes_.live, bytes_.live - base
        value, _ = loss(inputs, [1e-4] * STEPS)
        forward, bytes_.peak, held = bytes_.peak - base, bytes_.live, bytes_.live - base
        value.backward()
        return StepBytes(base, prepare, held_inputs, forward, held, bytes_.peak - base)
