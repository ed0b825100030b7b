"""The few layers a draft is made of, shared by its training and its serving forward.

Shapes: ... any leading dimensions, N heads, D head dimension, H hidden.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.core.files import JsonObject
from draftsmith.drafts.fusion import fused


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


@fused
def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class Attention(nn.Module):
    """Weights of an attention whose queries, keys and values read [embedding, feature], 2 * H wide."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(2 * hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(2 * hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(2 * hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)


def rope_frequencies(head_dim: int, theta: float, scaling: JsonObject | None, context: int) -> tuple[Tensor, float]:
    """(angle per position [D/2] in fp64, gain of cos and sin).

    `scaling` is a config.json's `rope_scaling` with its `rope_type`, computed by the functions that transformers' own
    models use; `context` is max_position_embeddings, which they take for the original context where none is named.
    """
    if not scaling:
        return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim), 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    logger = logging.getLogger("transformers.modeling_rope_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of contexts that a draft need not have
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=context,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    frequencies, gain = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    logger.setLevel(level)
    return frequencies.double(), gain


@fused
def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [..., N, D] by (cos, sin) [..., 1, D], half-split as Llama in transformers."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
