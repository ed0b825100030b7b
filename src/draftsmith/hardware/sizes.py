"""What a target weighs: parameters, bytes, what one forward of w tokens has to read and compute.

Everything comes from the model's config.json; no weight is loaded, so a 230 B target is sized on a laptop.
"""

import math
from dataclasses import dataclass
from typing import Any

from draftsmith.hardware.counting import Counts, count
from draftsmith.hardware.quantisation import BYTES, Quantisation
from draftsmith.targets.configs import EXPERTS_PER_TOKEN, first_of, layer_types, value_of

STATE_BYTES = 4.0  # engines keep the states of linear attention and Mamba layers in fp32


@dataclass(frozen=True, kw_only=True)
class TargetSize(Counts):
    """A decoder-only transformer. `Mass` is parameters and bytes of all layers together."""

    layers: int
    hidden: int
    experts_per_token: int
    cache: tuple[tuple[float, float], ...]  # by layer: bytes of one token, most tokens held
    state_bytes: float  # of a sequence, however long

    @classmethod
    def of(cls, config: Any, dtype: str = "bf16") -> "TargetSize":
        c, counts = config.get_text_config(), count(config, Quantisation.of(config, dtype))
        windows = [_window(c, kind) for kind in layer_types(c)]
        return cls(
            **vars(counts),
            layers=len(windows),
            hidden=c.hidden_size,
            experts_per_token=min(counts.experts, first_of(c, EXPERTS_PER_TOKEN) or 1),
            cache=tuple((row * BYTES[dtype], most) for row, most in zip(counts.rows, windows, strict=True)),
            state_bytes=_state_bytes(c),
        )

    @property
    def parameters(self) -> float:
        """Without norms and biases."""
        ends = self.embedding.parameters + (0.0 if self.tied else self.head.parameters)
        return self.body.parameters + self.routed.parameters + ends

    @property
    def active_body(self) -> float:
        """Parameters of the layers that one token is multiplied with."""
        share = self.experts_per_token / self.experts if self.experts else 0.0
        return self.body.parameters + share * self.routed.parameters

    @property
    def active_parameters(self) -> float:
        """Parameters that one token is multiplied with (embeddings are only looked up)."""
        return self.active_body + self.head.parameters

    @property
    def bytes(self) -> float:
        """Of all weights, as served."""
        ends = self.embedding.bytes + (0.0 if self.tied else self.head.bytes)
        return self.body.bytes + self.routed.bytes + ends

    @property
    def kv_bytes_per_token(self) -> float:
        """What one token adds to the cache of a short text."""
        return sum(row for row, _ in self.cache)

    def cache_bytes(self, tokens: float) -> float:
        """Cache of one sequence: windows hold no more than they are wide, states are as large as ever."""
        return sum(row * min(tokens, most) for row, most in self.cache) + self.state_bytes

    def distinct_experts(self, tokens: float, correlation: float = 0.0) -> float:
        """Expected experts per layer that `tokens` tokens touch.

        Independent routing: E (1 - (1 - k/E)^n) (MoESD, arXiv 2505.19645, section 3). Neighbouring tokens share
        experts: with `correlation` r, every token after the first counts as 1 - r of an independent one (r = 1: all
        take the first one's experts).
        """
        if not self.experts:
            return 0.0
        independent = 1 + (tokens - 1) * (1 - correlation)
        return self.experts * (1 - (1 - self.experts_per_token / self.experts) ** independent)

    def read_bytes(self, tokens: float, correlation: float = 0.0) -> float:
        """Weights that one forward of `tokens` tokens reads."""
        share = self.distinct_experts(tokens, correlation) / self.experts if self.experts else 0.0
        return self.body.bytes + share * self.routed.bytes + self.head.bytes


def _window(c: Any, kind: str) -> float:
    """Tokens that a layer of this type keeps at most."""
    most = None
    if kind == "chunked_attention":
        most = value_of(c, "attention_chunk_size")
    elif kind == "sliding_attention" or not getattr(c, "layer_types", None):  # without types it holds for all layers
        most = value_of(c, "sliding_window")
    return float(most or math.inf)


def _state_bytes(c: Any) -> float:
    """Of the layers whose memory does not grow: gated linear attention, Mamba; short convolutions hold next to none."""
    layers = sum(kind in ("linear_attention", "mamba", "hybrid") for kind in layer_types(c))
    shapes = (  # Qwen3-Next and Qwen3.5; Granite 4, Bamba and Falcon-H1; Nemotron-H
        ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
        ("mamba_n_heads", "mamba_d_head", "mamba_d_state"),
        ("mamba_num_heads", "mamba_head_dim", "ssm_state_size"),
    )
    for shape in shapes:
        sizes = [value_of(c, key) for key in shape]
        if all(isinstance(size, int) for size in sizes):
            return layers * math.prod(sizes) * STATE_BYTES
    return 0.0
