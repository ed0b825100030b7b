"""What a target weighs: parameters, bytes, what one forward of w tokens has to read and compute.

Parameters and the rows of the cache are counted on the model itself: `transformers` builds any class it has from a
config.json alone, on torch's meta device: shapes without memory, so 671 B parameters take a fraction of a second on a
laptop. Norms and biases (vectors) are left out: a few thousandths of a percent.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from draftsmith.hardware.quantisation import Quantisation
from draftsmith.targets.configs import EXPERTS_PER_TOKEN, NO_ROWS, expert_count, first_of, layer_types, value_of
from draftsmith.targets.parts import empty_model

STATE_BYTES = 4.0  # engines keep the states of linear attention and Mamba layers in fp32
_KNOWN: dict[str, "TargetSize"] = {}  # by config, scheme and dtype: a command sizes the same target many times


class Mass(NamedTuple):
    parameters: float = 0.0
    bytes: float = 0.0

    def plus(self, parameters: float, bytes_each: float) -> "Mass":
        return Mass(self.parameters + parameters, self.bytes + parameters * bytes_each)


@dataclass(frozen=True, kw_only=True)
class TargetSize:
    """A decoder-only transformer. `Mass` is parameters and bytes of all layers together."""

    layers: int
    hidden: int
    embedding: Mass  # looked up: the tokens', and where a model has them those of its layers
    head: Mass  # multiplied with, stored apart or tied
    tied: bool
    routed: Mass  # all experts of all layers that a router chooses from; nothing for a dense model
    body: Mass  # everything else, each token passes it: attention, dense MLPs, shared experts, routers
    experts: int  # of a sparse layer
    experts_per_token: int
    sparse_layers: int
    cache: tuple[tuple[float, float], ...]  # by layer: bytes of one token, most tokens held
    state_bytes: float  # of a sequence, however long
    assumption: str | None = None  # what could not be counted

    @classmethod
    def of(cls, config: Any, dtype: str = "bf16") -> "TargetSize":
        quantisation = Quantisation.of(config, dtype)
        key = f"{quantisation} {type(config).__name__} {config.to_json_string(use_diff=False)}"
        if key not in _KNOWN:
            lm, text = _build(config), config.get_text_config()
            _KNOWN[key] = _by_formula(text, quantisation) if lm is None else _by_model(lm, text, quantisation)
        return _KNOWN[key]

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


def _build(config: Any) -> Any:
    """The model without its numbers, of a wrapper its decoder where that has a class; None where nothing can be built
    from this config."""
    trusted = type(config).__module__.startswith("transformers_modules")  # its code was allowed to run
    for part in (config.get_text_config(), config):
        try:
            return empty_model(copy.deepcopy(part), "fp32", trusted)
        except Exception:  # a model's code may fail in any way here; what follows from it is told as an assumption
            continue
    return None


def _by_model(lm: Any, text: Any, quantisation: Quantisation) -> TargetSize:
    from torch import nn

    decoder, head = lm.get_decoder(), lm.get_output_embeddings()
    products = {id(m.weight) for m in decoder.modules() if isinstance(m, nn.Linear)}
    lookups = {id(m.weight) for m in decoder.modules() if isinstance(m, nn.Embedding)}
    plain = quantisation.plain_bytes
    embedding, routed, body = Mass(), Mass(), Mass()
    sparse: dict[str, int] = {}
    for name, weight in decoder.named_parameters():
        if weight.ndim < 2 or (head is not None and weight is head.weight and id(weight) not in lookups):
            continue
        if id(weight) in lookups:
            embedding = embedding.plus(weight.numel(), plain)
        elif ".experts." in f".{name}":
            routed = routed.plus(weight.numel(), quantisation.bytes_of(name))
            sparse[name.split("experts.")[0]] = weight.shape[0]
        else:
            body = body.plus(weight.numel(), quantisation.bytes_of(name) if id(weight) in products else plain)
    rows = text.vocab_size * text.hidden_size if head is None else head.weight.numel()
    return _sized(
        text,
        _rows(decoder, text),
        plain,
        expert_count(text) or max(sparse.values(), default=0) if sparse else 0,
        embedding=embedding,
        head=Mass().plus(rows, plain),
        tied=head is None or id(head.weight) in lookups,
        routed=routed,
        body=body,
        sparse_layers=len(sparse),
    )


def _row_by_formula(c: Any) -> float:
    heads = c.num_attention_heads
    head = value_of(c, "head_dim") or c.hidden_size // heads
    if latent := value_of(c, "kv_lora_rank"):  # multi-head latent attention caches one row for all heads
        return latent + (value_of(c, "qk_rope_head_dim") or 0)
    return 2 * (value_of(c, "num_key_value_heads") or heads) * head


def _rows(decoder: Any, c: Any) -> list[float]:
    """Widths of the projections whose outputs are cached; a layer that uses another's keys has none."""
    from torch import nn

    types, usual = layer_types(c), _row_by_formula(c)
    layers = next((m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == len(types)), None)

    def row(layer: Any) -> float:
        latent = [m.kv_a_proj_with_mqa for m in layer.modules() if hasattr(m, "kv_a_proj_with_mqa")]
        if latent:
            return sum(product.out_features for product in latent)
        pairs = [(m.k_proj, getattr(m, "v_proj", None) or m.k_proj) for m in layer.modules() if hasattr(m, "k_proj")]
        if pairs:
            return sum(key.out_features + value.out_features for key, value in pairs)
        borrowed = any(hasattr(m, "q_proj") for m in layer.modules())
        return 0.0 if borrowed else usual

    if layers is None:
        return [0.0 if kind in NO_ROWS else usual for kind in types]
    return [0.0 if kind in NO_ROWS else float(row(m)) for kind, m in zip(types, layers, strict=True)]


def _by_formula(c: Any, quantisation: Quantisation) -> TargetSize:
    """Layers that are all alike: what can be said of a model whose class is not here."""
    heads, hidden, layers = c.num_attention_heads, c.hidden_size, c.num_hidden_layers
    kv_heads = value_of(c, "num_key_value_heads") or heads
    head = value_of(c, "head_dim") or hidden // heads
    experts, dense = expert_count(c), value_of(c, "intermediate_size") or 4 * hidden
    width = value_of(c, "moe_intermediate_size") or dense
    sparse = layers - (value_of(c, "first_k_dense_replace") or 0) if experts else 0
    shared = value_of(c, "shared_expert_intermediate_size") or (value_of(c, "n_shared_experts") or 0) * width
    body = layers * 2.0 * hidden * head * (heads + kv_heads)
    body += (layers - sparse) * 3.0 * hidden * dense + sparse * (3.0 * hidden * shared + hidden * experts)
    each, plain = quantisation.weight_bytes, quantisation.plain_bytes
    ends = Mass().plus(c.vocab_size * hidden, plain)
    return _sized(
        c,
        [0.0 if kind in NO_ROWS else float(_row_by_formula(c)) for kind in layer_types(c)],
        plain,
        experts,
        embedding=ends,
        head=ends,
        tied=bool(getattr(c, "tie_word_embeddings", False)),
        routed=Mass().plus(sparse * experts * 3.0 * hidden * width, each),
        body=Mass().plus(body, each),
        sparse_layers=sparse,
        assumption=f"transformers cannot build {c.model_type} here: its parameters are those of equal Llama layers",
    )


def _sized(c: Any, rows: list[float], value_bytes: float, experts: int, **counted: Any) -> TargetSize:
    """`rows`: values that a token leaves in the cache, by layer."""
    windows = [_window(c, kind) for kind in layer_types(c)]
    return TargetSize(
        layers=len(windows),
        hidden=c.hidden_size,
        experts=experts,
        experts_per_token=min(experts, first_of(c, EXPERTS_PER_TOKEN) or 1),
        cache=tuple((row * value_bytes, most) for row, most in zip(rows, windows, strict=True)),
        state_bytes=_state_bytes(c),
        **counted,
    )


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
