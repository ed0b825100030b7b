"""Decoder layers of Llama's kind in a third of the operations, for CPUs.

Where one token is computed at a time, the forty small operations of a `transformers` layer take as long as its matrix
products. Queries, keys and values are one product here, gate and up another; weights are packed (decoding/products.py).

Shapes: B sequences, T tokens, N heads, D head dimension, H hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.decoding.attention import attend
from draftsmith.decoding.products import pack

KINDS = {f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}DecoderLayer" for name in
         ("Llama", "Mistral", "Qwen2")}  # fmt: skip


class Rotation:
    """RoPE's table [B, T, 1, D] of one forward, made by its first layer: with the sign in the sine, the rotated half
    of a head is the head rolled by half its width."""

    def __init__(self) -> None:
        self._made_of: Any = None

    def __call__(self, heads_BTND: Tensor, cos_and_sin: tuple[Tensor, Tensor]) -> Tensor:
        half = heads_BTND.shape[-1] // 2
        if self._made_of is not cos_and_sin:
            cos, sin = cos_and_sin
            self._made_of = cos_and_sin
            self._cos = cos[:, :, None]
            self._sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)[:, :, None]
        return torch.addcmul(heads_BTND * self._cos, heads_BTND.roll(half, -1), self._sin)


class LeanLayer:
    """The forward of such a layer. `products`: q/k/v, output, gate/up, down."""

    def __init__(self, layer: Any, products: list[Callable[[Tensor], Tensor]], rotation: Rotation):
        self.attention, self.activation, self.rotation = layer.self_attn, layer.mlp.act_fn, rotation
        norms = layer.input_layernorm, layer.post_attention_layernorm
        self.first, self.second = ((norm.weight, torch.tensor(norm.variance_epsilon)) for norm in norms)
        self.heads = layer.self_attn.q_proj.out_features // layer.self_attn.head_dim
        everywhere = getattr(layer.self_attn.config, "sliding_window", None)  # as Mistral has it
        self.window = getattr(layer.self_attn, "sliding_window", everywhere)
        self.qkv, self.out, self.gate_up, self.down = products

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        plan: Any = None,
        **_options: Any,
    ) -> Tensor:
        attention, residual = self.attention, hidden_states
        rows = self.qkv(_norm(*self.first, residual)).unflatten(-1, (-1, attention.head_dim))
        kv_heads = (rows.shape[2] - self.heads) // 2
        rotated = self.rotation(rows[:, :, :-kv_heads], position_embeddings).transpose(1, 2)
        query, key, value = rotated[:, : self.heads], rotated[:, self.heads :], rows[:, :, -kv_heads:].transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        mixed, _ = attend(
            attention, query, key, value, None, scaling=attention.scaling, sliding_window=self.window, plan=plan
        )
        residual = self.out(mixed.flatten(2)).add_(residual)
        gate, up = self.gate_up(_norm(*self.second, residual)).chunk(2, dim=-1)
        return self.down(self.activation(gate).mul_(up)).add_(residual)


def _norm(weight_H: Tensor, epsilon: Tensor, hidden: Tensor) -> Tensor:
    """RMSNorm; on CPUs `F.rms_norm` is made of twice as many operations."""
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    scale = torch.addcmul(epsilon, length, length, value=1 / hidden.shape[-1]).rsqrt_()
    return (hidden * scale).mul_(weight_H)


def lean_layers(layers: nn.ModuleList) -> list[LeanLayer] | None:
    """Of all layers, or of none: None where they are of another kind or cannot be packed."""
    made, rotation = [], Rotation()
    for layer in layers:
        if f"{type(layer).__module__}.{type(layer).__name__}" not in KINDS:
            return None
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        joined = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        products = [product for linears in joined if (product := pack(*linears)) is not None]
        if len(products) < len(joined):
            return None
        made.append(LeanLayer(layer, products, rotation))
    return made
