"""config.json of an EAGLE-3 draft: what it says, what of it our forward does not do, what an engine reads otherwise.

Facts about the engines: docs/engines.md. Nothing here trusts a value: those that no draft can have are left out and
named, before anything is computed with them.
"""

import math
from collections.abc import Callable
from typing import Any

from draftsmith.core.files import JsonObject
from draftsmith.core.taps import engine_default, of_outputs, to_outputs
from draftsmith.drafts.eagle3.config import Eagle3Config
from draftsmith.drafts.eagle3.shape import ENOUGH_CONTEXT
from draftsmith.drafts.layers import rope_frequencies
from draftsmith.targets.parts import UNBOUNDED

IDS = "eagle_aux_hidden_state_layer_ids"
"""The key of the taps: layer inputs at the top level (vLLM), layer outputs in `eagle_config` (SGLang)."""
ROPE_NUMBERS = {
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
}
ROPE_NEEDS = {"linear": ("factor",), "yarn": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
Rule = tuple[Callable[[Any], bool], str]


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _whole(most: int, least: int = 1) -> Rule:
    return lambda v: type(v) is int and least <= v <= most, f"a whole number of {least} to {most}"


FLAG: Rule = (lambda v: v in (True, False), "true or false")
TEXT: Rule = (lambda v: isinstance(v, str), "a text")
TABLE: Rule = (lambda v: isinstance(v, dict), "an object")
POSITIVE: Rule = (lambda v: _number(v) and 0 < v < 1e12, "a number above 0")
LAYERS: Rule = (
    lambda v: isinstance(v, list) and 0 < len(v) <= 256 and all(type(i) is int and 0 <= i < 4096 for i in v),
    "a list of layer numbers",
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(("eagle_config", "rope_parameters", "rope_scaling", "draftsmith", "draftsmith.target"), TABLE),
    **dict.fromkeys(("hidden_size", "target_hidden_size"), _whole(2**17)),
    **dict.fromkeys(("intermediate_size", "vocab_size", "draft_vocab_size"), _whole(2**24)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), _whole(2**12)),
    **dict.fromkeys(("num_hidden_layers", "draftsmith.target.num_layers"), _whole(2**12)),
    **dict.fromkeys(("max_position_embeddings", "draftsmith.target.max_position_embeddings"), _whole(2**31)),
    "num_aux_hidden_states": _whole(256),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "rope_parameters.rope_theta"), POSITIVE),
    **dict.fromkeys(("rope_scaling.rope_theta", "logit_scale", "partial_rotary_factor"), POSITIVE),
    **dict.fromkeys((IDS, f"eagle_config.{IDS}", "draftsmith.taps"), LAYERS),
    **dict.fromkeys(("norm_before_fc", "fc_norm", "use_aux_norm", "eagle_config.norm_before_fc"), FLAG),
    **dict.fromkeys(("norm_before_residual", "norm_output", "attention_bias", "mlp_bias", "bias"), FLAG),
    **dict.fromkeys(("tie_word_embeddings", "parallel_drafting", "eagle_config.use_aux_hidden_state"), FLAG),
    **dict.fromkeys(("hidden_act", "model_type", "speculators_model_type"), TEXT),
    **dict.fromkeys(
        ("architectures", "layer_types"),
        (lambda v: isinstance(v, list) and all(isinstance(part, str) for part in v), "a list of texts"),
    ),
}


def _plain_layout(config: JsonObject) -> JsonObject:
    """A config.json of the `speculators` package as engines have it; any other as it is."""
    layer = config.get("transformer_layer_config")
    if isinstance(layer, dict) and config.get("speculators_model_type", "eagle3") == "eagle3":
        # What vLLM takes for granted in that layout.
        usual = {"norm_before_residual": True, "num_hidden_layers": 1}
        return {**usual, **layer, **config, "architectures": ["LlamaForCausalLMEagle3"]}
    return config


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def sound(config: JsonObject) -> tuple[JsonObject, list[str]]:
    """(config.json as engines have it, without the values that no draft can have, a line for each of them); null is as
    good as absent."""
    plain = _plain_layout(config)
    kept: JsonObject = {key: dict(value) if isinstance(value, dict) else value for key, value in plain.items()}
    problems = []
    for path, (allows, wanted) in RULES.items():
        *places, key = path.split(".")
        holder: Any = kept
        for place in places:
            holder = holder.get(place) or {}
        value = holder.get(key)
        if value is not None and not allows(value):
            problems.append(f"{path} is {_short(value)}; wanted {wanted}")
            del holder[key]
    return kept, problems


def layer_ids(config: JsonObject) -> tuple[list[int] | None, list[int] | None]:
    """(ids at the top level, ids in eagle_config)"""
    return config.get(IDS), (config.get("eagle_config") or {}).get(IDS)


def taps_of(config: JsonObject) -> list[int] | None:
    """The trained taps where draftsmith wrote them, else the ids as they stand."""
    top, nested = layer_ids(config)
    return (config.get("draftsmith") or {}).get("taps") or top or nested


def rope_scaling(config: JsonObject, problems: list[str]) -> JsonObject | None:
    """The scaling with its `rope_type`, or None for plain RoPE; what cannot be computed is named in `problems`.

    `rope_scaling` comes before `rope_parameters`, as in transformers' configs, which both engines use.
    """
    tables = [config.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    kinds = [table.get("rope_type") or table.get("type") or "default" for table in tables]
    if all(tables) and kinds[0] != kinds[1]:
        problems.append(f"RoPE is {_short(kinds[0])} in rope_scaling but {_short(kinds[1])} in rope_parameters")
    table, kind = (tables[0], kinds[0]) if tables[0] else (tables[1], kinds[1])
    part = table.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    if part != 1:
        problems.append(f"RoPE over a part of the head (partial_rotary_factor {_short(part)}) is not computed here")
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in ROPE_NEEDS:
        problems.append(f"RoPE scaling {_short(kind)} is not computed here; only {', '.join(ROPE_NEEDS)} are")
        return None
    odd = [key for key in ROPE_NUMBERS if table.get(key) is not None and not (_number(table[key]) and table[key] >= 0)]
    odd += [key for key in ROPE_NEEDS[kind] if not table.get(key)]
    if odd:
        problems.append(f"RoPE scaling {kind}: {odd[0]} is {_short(table.get(odd[0]))}; wanted a number above 0")
        return None
    numbers = {key: table[key] for key in sorted(ROPE_NUMBERS) if table.get(key) is not None}
    truncate = {} if table.get("truncate") is None else {"truncate": bool(table["truncate"])}
    return {"rope_type": kind, **numbers, **truncate}


def to_draft_config(config: JsonObject, taps: tuple[int, ...], problems: list[str]) -> Eagle3Config | None:
    """The draft that a sound config.json describes; None, and why in `problems`, where there can be none."""
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    lacking = [key for key in needed if config.get(key) is None]
    if lacking:
        problems.append(f"{lacking[0]} is missing from config.json")
        return None
    size, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or size // heads
    if heads % kv_heads or head_dim % 2 or not head_dim:
        problems.append(f"{heads} heads with {kv_heads} key heads of {head_dim}: no attention has such a shape")
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    context = config.get("max_position_embeddings") or 0
    scaling = rope_scaling(config, problems)
    if scaling and not _computable(head_dim, theta, scaling, context):
        problems.append(f"RoPE scaling {scaling} leads to no finite frequencies")
        return None
    target_size = config.get("target_hidden_size")
    eagle = config.get("eagle_config") or {}
    return Eagle3Config(
        hidden_size=size,
        intermediate_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        draft_vocab_size=config.get("draft_vocab_size") or config["vocab_size"],
        taps=taps,
        rope_theta=theta,
        max_position_embeddings=context,
        rms_norm_eps=config.get("rms_norm_eps") or 1e-6,
        norm_before_fc=bool(eagle.get("norm_before_fc", config.get("norm_before_fc", False))),
        fc_norm=bool(config.get("fc_norm") or config.get("use_aux_norm")),
        target_hidden_size=None if target_size == size else target_size,
        rope_scaling=scaling,
    )


def _computable(head_dim: int, theta: float, scaling: JsonObject, context: int) -> bool:
    try:
        frequencies, gain = rope_frequencies(head_dim, theta, scaling, context or 2048)
    except (ArithmeticError, ValueError):  # log of 0, theta of 1
        return False
    return bool(frequencies.isfinite().all() and (frequencies > 0).all()) and math.isfinite(gain)


def uncomputed(config: JsonObject) -> list[str]:
    """What makes it another computation than ours."""
    theta, inner = config.get("rope_theta"), (config.get("rope_parameters") or {}).get("rope_theta")
    activation, scale, kinds = config.get("hidden_act"), config.get("logit_scale"), config.get("layer_types") or ()
    fuses = (config.get("eagle_config") or {}).get("use_aux_hidden_state")
    layers = config.get("num_hidden_layers")
    other = {
        f"rope_theta is {theta} at the top level but {inner} in rope_parameters": theta and inner and theta != inner,
        "norm_before_residual is not supported by SGLang": config.get("norm_before_residual"),
        "attention_bias is not supported by SGLang's draft layer": config.get("attention_bias"),
        "mlp_bias is set, which is not computed here": config.get("mlp_bias"),
        "bias is set, which is not computed here": config.get("bias"),
        "parallel_drafting is set, which is not computed here": config.get("parallel_drafting"),
        "norm_output feeds back the normed state, which is not supported here": config.get("norm_output"),
        f"hidden_act is {activation}, where the draft layer here has silu": activation not in (None, "silu", "swish"),
        f"logit_scale is {scale}, which is not computed here": scale not in (None, 1),
        f"layer_types is {kinds}; only full_attention is computed here": set(kinds) - {"full_attention"},
        "use_aux_hidden_state is false: it reads the last hidden state, where EAGLE-3 fuses taps": fuses is False,
        f"num_hidden_layers is {layers}; an EAGLE-3 draft has 1": layers != 1,
    }
    return [problem for problem, holds in other.items() if holds]


def misread(config: JsonObject) -> list[str]:
    """What an engine would read otherwise than it was meant."""
    problems = []
    if config.get("architectures") != ["LlamaForCausalLMEagle3"]:
        problems.append(f"architectures is {config.get('architectures')}; SGLang wants ['LlamaForCausalLMEagle3']")
    if "draft_vocab_size" not in config:
        problems.append(
            "draft_vocab_size is missing: SGLang stops with an AttributeError, vLLM assumes the full vocabulary"
        )
    if config.get("tie_word_embeddings", False):
        problems.append("tie_word_embeddings is true: SGLang would use the embedding as the draft's head")
    problems += _misread_own_taps(config) if (config.get("draftsmith") or {}).get("taps") else _misread_taps(config)
    if not (config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")):
        problems.append("rope_theta is missing: engines assume 10000")
    context = config.get("max_position_embeddings") or 0
    target = (config.get("draftsmith") or {}).get("target") or {}
    target_context = target.get("max_position_embeddings") or 2049
    if target_context >= UNBOUNDED:  # it counts no positions
        target_context = ENOUGH_CONTEXT
    if context < target_context:  # of a target unknown to us, only that 2048 is too short for any served today
        problems.append(f"max_position_embeddings {context} is short: it must reach the target's context")
    return problems


def _misread_own_taps(config: JsonObject) -> list[str]:
    """The taps that each engine would capture against those that draftsmith trained with."""
    trained, (top, nested) = config["draftsmith"]["taps"], layer_ids(config)
    layers = (config["draftsmith"].get("target") or {}).get("num_layers")
    # of a target that is not told: could they be any one's default?
    default = list(engine_default(layers or trained[-1] + 3)) if layers or not (top or nested) else None
    reads = (("vLLM", top, IDS, top), ("SGLang", nested, f"eagle_config.{IDS}", list(of_outputs(nested or ()))))
    problems = []
    if layers and max(trained) >= layers:
        problems.append(f"trained with taps {trained}, but its target has {layers} layers")
    for engine, ids, place, taps in reads:
        if ids is None and to_outputs(trained) is None and engine == "SGLang":
            continue  # it cannot serve this draft
        taps = default if ids is None else taps
        if taps != trained:
            told = f"its default {taps if layers else '[2, L//2, L-3]'}" if ids is None else f"{taps}"
            problems.append(f"{engine} would capture taps {told} ({place} is {ids}), trained with {trained}")
    return problems


def _misread_taps(config: JsonObject) -> list[str]:
    top, nested = layer_ids(config)
    problems = [
        f"taps {ids} are not ascending: vLLM's native models sort them"
        for ids in (top, nested)
        if ids and ids != sorted(set(ids))
    ]
    if top and not nested:
        problems.append(f"{IDS} at the top level is ignored by SGLang; add eagle_config.{IDS}: each id less 1")
    elif nested and not top:
        problems.append(
            f"{IDS} in eagle_config alone is ignored by vLLM's GPU runner; add it at the top level: each id plus 1"
        )
    elif top and nested and top != list(of_outputs(nested)):
        problems.append(f"vLLM would capture taps {top}, SGLang {list(of_outputs(nested))}")
    return problems
