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


SELF_SCORE = 8.0  # of a position that looks at itself; of the others, e^8 less each, hundreds then have a tenth


class Attention(nn.Module):
    """Weights of an attention whose queries, keys and values read [embedding, feature], 2 * H wide."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(2 * hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(2 * hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(2 * hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    @torch.no_grad()
    def look_at_itself(self, apart_HP: Tensor, embeds_TH: Tensor, values_HV: Tensor, output_HV: Tensor) -> None:
        """Have the first heads add output @ values.T @ embedding of their own position, about.

        apart_HP: directions in which embeddings differ, the widest first; embeds_TH: some of them. Queries and keys are
        the same projection on these, so a position is most like itself.
        """
        size, dim, groups = len(apart_HP), self.head_dim, self.num_heads // self.num_kv_heads
        apart = apart_HP[:, :dim]
        alike = (embeds_TH @ apart).square().sum(-1).mean()
        project = (apart * (SELF_SCORE * dim**0.5 / alike) ** 0.5).T
        for head in range(-(-values_HV.shape[1] // dim)):
            values, output = (x[:, head * dim : (head + 1) * dim] for x in (values_HV, output_HV))
            key_rows = slice(head * dim, head * dim + project.shape[0])
            self.k_proj.weight[head * dim : (head + 1) * dim] = 0
            self.k_proj.weight[key_rows, :size] = project
            self.v_proj.weight[head * dim : head * dim + values.shape[1], :size] = values.T
            self.v_proj.weight[head * dim : (head + 1) * dim, size:] = 0
            for query in range(head * groups, (head + 1) * groups):
                at = slice(query * dim, (query + 1) * dim)
                self.q_proj.weight[at] = self.k_proj.weight[head * dim : (head + 1) * dim]
                self.o_proj.weight[:, query * dim : query * dim + output.shape[1]] = output / groups


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
