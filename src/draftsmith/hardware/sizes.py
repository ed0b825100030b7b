"""What a target and a draft weigh: parameters, bytes, what one forward of w tokens has to read and compute.

Everything comes from the model's config.json; no weight is loaded, so a 230 B target is sized on a laptop.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.drafts.eagle3 import Eagle3Config
from draftsmith.errors import TargetError

# Models that can be planned for without a network; the rest of each is what `transformers` ships for its type.
PUBLISHED: dict[str, dict[str, Any]] = {
    "MiniMaxAI/MiniMax-M2.7": {
        "model_type": "minimax_m2",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
}
SCHEMES = {"fp8": 8.0, "w8a8": 8.0, "mxfp4": 4.25, "nvfp4": 4.5, "w4a16": 4.25}  # bits, scales of groups included
BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0}


def target_config(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The target's configuration; of a directory, the embedded target, the table above or the hub."""
    from transformers import AutoConfig

    from draftsmith.targets.ends import first_line, resolve_model

    place = resolve_model(model)
    if not Path(place).is_dir() and model in PUBLISHED:
        published = dict(PUBLISHED[model])
        return AutoConfig.for_model(published.pop("model_type"), **published)
    try:
        return AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise TargetError(f"target.model: no config.json of {model!r}: {first_line(error)}") from None


def bytes_per_weight(config: Any, dtype: str) -> float:
    """Bytes of one weight of the layers: the quantisation's where the model has one, else the dtype's."""
    quantisation = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantisation, dict):
        quantisation = quantisation.to_dict()
    # compressed-tensors and ModelOpt describe groups of layers; the first that has weights stands for all
    groups = [g for g in (quantisation.get("config_groups") or {}).values() if g.get("weights")]
    scheme = str(quantisation.get("quant_algo") or quantisation.get("quant_method", "")).lower()
    bits = quantisation.get("bits") or (groups[0]["weights"].get("num_bits") if groups else None)
    bits = bits or next((b for name, b in SCHEMES.items() if scheme.startswith(name)), None)
    return bits / 8 if bits else BYTES[dtype]


@dataclass(frozen=True)
class TargetSize:
    """A decoder-only transformer. Parameters are counts; `attention`, `mlp` and `expert` are per layer."""

    name: str
    layers: int
    hidden: int
    vocab: int
    attention: float
    mlp: float  # every token goes through it: the dense MLP, shared experts and the router
    expert: float  # one routed expert; 0 for a dense model
    experts: int
    experts_per_token: int
    kv_bytes_per_token: float
    weight_bytes: float  # of a layer's weights
    end_bytes: float  # of a weight of head and embedding
    tied: bool

    @classmethod
    def of(cls, name: str, config: Any, dtype: str = "bf16") -> "TargetSize":
        c = config.get_text_config()
        heads, hidden = c.num_attention_heads, c.hidden_size
        kv_heads = getattr(c, "num_key_value_heads", None) or heads
        head = getattr(c, "head_dim", None) or hidden // heads
        experts = next(
            (n for key in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(c, key, None))), 0
        )
        width = getattr(c, "moe_intermediate_size", None) or c.intermediate_size
        if experts:
            shared = getattr(c, "shared_expert_intermediate_size", None) or (
                (getattr(c, "n_shared_experts", None) or 0) * width
            )
            mlp = 3.0 * hidden * shared + hidden * experts
        else:
            mlp = 3.0 * hidden * c.intermediate_size
        latent = getattr(c, "kv_lora_rank", None)  # multi-head latent attention caches one row for all heads
        cached = latent + c.qk_rope_head_dim if latent else 2 * kv_heads * head
        return cls(
            name=name,
            layers=c.num_hidden_layers,
            hidden=hidden,
            vocab=c.vocab_size,
            attention=2.0 * hidden * head * (heads + kv_heads),
            mlp=mlp,
            expert=3.0 * hidden * width if experts else 0.0,
            experts=experts,
            experts_per_token=getattr(c, "num_experts_per_tok", 0) if experts else 0,
            kv_bytes_per_token=float(c.num_hidden_layers * cached * BYTES[dtype]),
            weight_bytes=bytes_per_weight(config, dtype),
            end_bytes=BYTES[dtype],
            tied=bool(getattr(c, "tie_word_embeddings", False)),
        )

    @property
    def parameters(self) -> float:
        ends = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.attention + self.mlp + self.experts * self.expert) + ends

    @property
    def active_parameters(self) -> float:
        """Parameters that one token is multiplied with (the embedding is only looked up)."""
        layer = self.attention + self.mlp + self.experts_per_token * self.expert
        return self.layers * layer + self.vocab * self.hidden

    @property
    def bytes(self) -> float:
        """Of all weights, as served."""
        ends = self.vocab * self.hidden * (1 if self.tied else 2)
        return (self.parameters - ends) * self.weight_bytes + ends * self.end_bytes

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
        layer = self.attention + self.mlp + self.distinct_experts(tokens, correlation) * self.expert
        return self.layers * layer * self.weight_bytes + self.vocab * self.hidden * self.end_bytes


@dataclass(frozen=True)
class DraftSize:
    """An EAGLE-3 draft, bf16 as it is served; the embedding is the target's."""

    hidden: int
    layer: float  # attention, MLP
    fuse: float  # fc, used once per verified token
    head: float
    kv_bytes_per_token: float

    @classmethod
    def of(cls, config: Eagle3Config) -> "DraftSize":
        hidden, head = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        attention = 2.0 * hidden * (queries + 2 * keys) + queries * hidden
        return cls(
            hidden=hidden,
            layer=attention + 3.0 * hidden * config.intermediate_size,
            fuse=float(len(config.taps)) * hidden * hidden,
            head=float(config.draft_vocab_size) * hidden,
            kv_bytes_per_token=2.0 * keys * 2,
        )

    @property
    def parameters(self) -> float:
        """Without the few thousand of the norms."""
        return self.layer + self.fuse + self.head

    @property
    def bytes(self) -> float:
        return 2 * self.parameters

    @property
    def step_bytes(self) -> float:
        """Weights that one drafting step reads."""
        return 2 * (self.layer + self.head)
