"""Parameters of a target by their use, and the rows of its cache, counted on the model itself.

`transformers` builds any class it has from a config alone, on torch's meta device: shapes without memory, so 671 B
parameters take a fraction of a second. Norms and biases (vectors) are left out: a few thousandths of a percent.
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

from draftsmith.hardware.quantisation import Quantisation
from draftsmith.targets.configs import NO_ROWS, expert_count, layer_types, value_of


class Mass(NamedTuple):
    parameters: float = 0.0
    bytes: float = 0.0

    def plus(self, parameters: float, bytes_each: float) -> "Mass":
        return Mass(self.parameters + parameters, self.bytes + parameters * bytes_each)


@dataclass(frozen=True, kw_only=True)
class Counts:
    embedding: Mass  # looked up: the tokens', and where a model has them those of its layers
    head: Mass  # multiplied with, stored apart or tied
    tied: bool
    routed: Mass  # all experts of all layers that a router chooses from; nothing for a dense model
    body: Mass  # everything else, each token passes it: attention, dense MLPs, shared experts, routers
    experts: int  # of a sparse layer
    sparse_layers: int
    rows: tuple[float, ...]  # values that a token leaves in the cache, by layer
    assumption: str | None = None  # what could not be counted


_KNOWN: dict[str, Counts] = {}  # by config, scheme and dtype: a command sizes the same target many times


def count(config: Any, quantisation: Quantisation) -> Counts:
    key = f"{quantisation} {type(config).__name__} {config.to_json_string(use_diff=False)}"
    if key not in _KNOWN:
        lm = _build(config)
        text = config.get_text_config()
        _KNOWN[key] = _by_formula(text, quantisation) if lm is None else _by_model(lm, text, quantisation)
    return _KNOWN[key]


def _build(config: Any) -> Any:
    """The model without its numbers; None where no class can be built from this config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    trusted = type(config).__module__.startswith("transformers_modules")  # its code was allowed to run
    text = config.get_text_config()
    for auto, part in (
        (AutoModelForCausalLM, text),
        (AutoModelForCausalLM, config),
        (AutoModelForImageTextToText, config),
    ):
        try:
            with torch.device("meta"):
                return auto.from_config(copy.deepcopy(part), trust_remote_code=trusted, attn_implementation="eager")
        except Exception:  # a model's code may fail in any way here; what follows from it is told as an assumption
            continue
    return None


def _by_model(lm: Any, text: Any, quantisation: Quantisation) -> Counts:
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
    return Counts(
        embedding=embedding,
        head=Mass().plus(rows, plain),
        tied=head is None or id(head.weight) in lookups,
        routed=routed,
        body=body,
        experts=expert_count(text) or max(sparse.values(), default=0) if sparse else 0,
        sparse_layers=len(sparse),
        rows=_rows(decoder, text),
    )


def _row_by_formula(c: Any) -> float:
    heads = c.num_attention_heads
    head = value_of(c, "head_dim") or c.hidden_size // heads
    if latent := value_of(c, "kv_lora_rank"):  # multi-head latent attention caches one row for all heads
        return latent + (value_of(c, "qk_rope_head_dim") or 0)
    return 2 * (value_of(c, "num_key_value_heads") or heads) * head


def _rows(decoder: Any, c: Any) -> tuple[float, ...]:
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
        return tuple(0.0 if kind in NO_ROWS else usual for kind in types)
    return tuple(0.0 if kind in NO_ROWS else float(row(m)) for kind, m in zip(types, layers, strict=True))


def _by_formula(c: Any, quantisation: Quantisation) -> Counts:
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
    return Counts(
        embedding=ends,
        head=ends,
        tied=bool(getattr(c, "tie_word_embeddings", False)),
        routed=Mass().plus(sparse * experts * 3.0 * hidden * width, each),
        body=Mass().plus(body, each),
        experts=experts,
        sparse_layers=sparse,
        rows=tuple(0.0 if kind in NO_ROWS else float(_row_by_formula(c)) for kind in layer_types(c)),
        assumption=f"transformers cannot build {c.model_type} here: its parameters are those of equal Llama layers",
    )
