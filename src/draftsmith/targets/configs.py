"""A target's config.json: where it comes from, and what it says of layers and experts under its many names."""

import re
from pathlib import Path
from typing import Any

from draftsmith.core import files
from draftsmith.core.errors import TargetError
from draftsmith.core.files import JsonObject

# Models that can be planned for without a network; the rest of each is what `transformers` ships for its type.
PUBLISHED: dict[str, JsonObject] = {
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
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
NO_ROWS = {"linear_attention", "mamba", "conv", "recurrent", "moe", "mlp"}  # layer types that cache nothing per token
MOST = {  # of what a model is built from one by one, at any depth of its config
    r"(layers?|blocks|depth)$": 1024,
    r"(experts|heads)$": 1 << 13,
    r"(_size|_dim|_rank|d_model|n_embd)$": 1 << 24,
}
NEEDED = ("num_hidden_layers", "hidden_size", "vocab_size")  # Mamba has no heads
LEAST = {**dict.fromkeys(NEEDED, 1), "num_attention_heads": 1}
LEAST |= dict.fromkeys(("num_key_value_heads", "head_dim", "intermediate_size"), 0)


def target_config(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The target's configuration; of a directory, the embedded target, the table above or the hub."""
    from transformers import AutoConfig

    from draftsmith.targets.parts import resolve_model

    place = resolve_model(model)
    if not Path(place).is_dir() and model in PUBLISHED:
        published = dict(PUBLISHED[model])
        return AutoConfig.for_model(published.pop("model_type"), **published)
    config = read_config(place, revision, trust_remote_code)
    if getattr(config, "quantization_config", None) is None and (found := _modelopt(place, revision)):
        config.quantization_config = found
    return config


def read_config(place: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The library's configuration, of sizes that a model can have; raises `TargetError`."""
    from transformers import AutoConfig, PreTrainedConfig

    try:
        raw, _ = PreTrainedConfig.get_config_dict(place, revision=revision)
        if not isinstance(raw, dict):
            raise ValueError("it holds no JSON object")
        _check_sizes(raw)
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)
        for key, least in LEAST.items():
            value = value_of(config.get_text_config(), key)
            if (value is not None or key in NEEDED) and (not isinstance(value, int) or value < least):
                raise ValueError(f"{key} is {value!r}, wanted a whole number of {least} or more")
    except Exception as error:  # a model's own code, and transformers' checks of values, raise what they like
        raise TargetError(f"target.model: {_complaint(place, revision, trust_remote_code, error)}") from None
    return config


def _check_sizes(config: JsonObject) -> None:
    """Before anything is built of them: a list with an entry for each of 10^9 layers is 8 GB already."""
    for key, value in config.items():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                _check_sizes(inner)
            elif type(inner) is int and any(inner > most and re.search(name, key) for name, most in MOST.items()):
                raise ValueError(f"{key} is {inner}, more than any model has")


def _complaint(place: str, revision: str | None, trusted: bool, error: Exception) -> str:
    """Why a config cannot be read: not there, custom code, an unknown type, or what transformers says of it."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig, __version__

    from draftsmith.targets.parts import first_line

    try:
        raw, _ = PreTrainedConfig.get_config_dict(place, revision=revision)
    except Exception:  # as above; this is about the first error
        raw = {}
    raw = raw if isinstance(raw, dict) else {}
    kind = raw.get("model_type")
    if not raw and not Path(place, "config.json").exists():
        return f"no config.json of {place!r}: {first_line(error)}"
    if "AutoConfig" in str(raw.get("auto_map")) and not trusted:
        return (
            f"{place!r} comes with code of its own ({kind}), which target.trust_remote_code: true "
            "(--target.trust-remote-code) lets run here"
        )
    if isinstance(kind, str) and kind not in CONFIG_MAPPING and "auto_map" not in raw:
        return f"{place!r} is of type {kind}, which transformers {__version__} does not know; a newer one may"
    return f"config.json of {place!r} cannot be read: {first_line(error)}"


def _modelopt(place: str, revision: str | None) -> JsonObject | None:
    """The quantisation that ModelOpt's older checkpoints keep beside a config.json without any."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(place, "hf_quant_config.json", revision=revision)
        told = files.read_object(Path(path or "")).get("quantization")
    except (OSError, ValueError):
        return None
    return {"quant_method": "modelopt", **told} if isinstance(told, dict) else None


def per_layer(config: Any, key: str) -> list[Any] | None:
    """The values of a key that differs from layer to layer; None of one that is the same for all, or missing."""
    try:
        value = getattr(config, key, None)
    except RuntimeError:  # transformers' way to say that layers differ
        return [getattr(layer, key, None) for layer in config.per_layer_config]
    return list(value) if isinstance(value, (list, tuple)) else None


def value_of(config: Any, key: str) -> Any:
    """A key's number, the largest where layers differ; None where it is missing. `TargetError` for what is none."""
    values = per_layer(config, key)
    values = [getattr(config, key, None)] if values is None else values
    numbers = [value for value in values if value is not None]
    if odd := [value for value in numbers if not isinstance(value, int | float)]:
        raise TargetError(f"target.model: {key} of its config.json is {odd[0]!r}; wanted a number")
    return max(numbers, default=None)


def first_of(config: Any, keys: tuple[str, ...]) -> int:
    """The first of these keys that is set; 0 where none is."""
    return next((int(value) for key in keys if (value := value_of(config, key))), 0)


def layer_types(config: Any) -> list[str]:
    """Of every layer; `full_attention` where the config tells of no others."""
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if types and not (isinstance(types, list | tuple) and all(isinstance(kind, str) for kind in types)):
        raise TargetError(f"target.model: layer_types of its config.json is {types!r}; wanted a list of names")
    return list(types) if types else ["full_attention"] * config.num_hidden_layers


def expert_count(config: Any) -> int:
    """Routed experts of a sparse layer; 0 for a dense model, whatever default its class may have."""
    types = set(layer_types(config))
    unused = "mlp" in types and "moe" not in types  # Nemotron-H names its dense and sparse layers
    return 0 if unused or getattr(config, "enable_moe_block", True) is False else first_of(config, EXPERTS)
