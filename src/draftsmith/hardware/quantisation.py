"""What a weight takes where a model is quantised, from `quantization_config`; hub models name a dozen schemes.

A weight's bits count the scales of its group: 16 bits per group of an integer scheme, 8 of NVFP4 and MXFP4.
"""

import re
from dataclasses import dataclass
from typing import Any

from draftsmith.core.files import JsonObject
from draftsmith.targets.parts import on_guard

BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0}
# Bits by what a scheme's name contains, scales included; the first that fits.
SCHEMES = {
    "nvfp4": 4.5,
    "mxfp4": 4.25,
    "fp4": 4.5,
    "mxfp8": 8.25,
    "fp8": 8.0,
    "w8a8": 8.0,
    "int8": 8.0,
    "eetq": 8.0,
    "w4": 4.25,
    "int4": 4.25,
}
EXCLUDED = ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers", "llm_int8_skip_modules")


@dataclass(frozen=True)
class Quantisation:
    """Bytes of a quantised weight and of any other, and the modules that a scheme leaves as they are."""

    weight_bytes: float
    plain_bytes: float
    excluded: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Any, dtype: str) -> "Quantisation":
        """Without a scheme all weights are in the dtype."""
        scheme = getattr(config, "quantization_config", None)
        scheme = scheme or getattr(config.get_text_config(), "quantization_config", None) or {}
        with on_guard("quantization_config of its config.json is not understood"):
            if not isinstance(scheme, dict):
                scheme = scheme.to_dict()
            bits = _bits(scheme)
            bytes_each = bits / 8 if bits else BYTES[dtype]
            patterns = [_pattern(name) for key in EXCLUDED for name in scheme.get(key) or ()] if bits else []
            for pattern in patterns:
                re.compile(pattern)
        return cls(bytes_each, BYTES[dtype], tuple(patterns))

    def bytes_of(self, name: str) -> float:
        """Bytes per weight of the product named so."""
        kept = any(re.search(pattern, name) for pattern in self.excluded)
        return self.plain_bytes if kept else self.weight_bytes


def _pattern(name: str) -> str:
    """A scheme's module name, glob or `re:` expression, whatever prefix a wrapper puts before `layers`."""
    if name.startswith("re:"):
        return name[3:].lstrip("^")
    shortened = name[name.index("layers.") :] if "layers." in name else name
    return r"(^|\.)" + re.escape(shortened).replace(r"\*", ".*") + r"(\.|$)"


def _bits(scheme: JsonObject) -> float | None:
    mixed = scheme.get("quantized_layers")  # ModelOpt names the scheme of every layer, and of every expert
    if mixed:
        named = [_named(str(layer.get("quant_algo"))) or 16.0 for layer in mixed.values()]
        return sum(named) / len(named)
    if scheme.get("load_in_4bit"):
        return 4.125 if scheme.get("bnb_4bit_use_double_quant") else 4.5
    if scheme.get("load_in_8bit"):
        return 8.0
    # compressed-tensors and ModelOpt describe groups of layers; the first that has weights stands for all
    groups = [g["weights"] for g in (scheme.get("config_groups") or {}).values() if g.get("weights")]
    if groups and groups[0].get("num_bits"):
        scale = 8 if groups[0].get("type") == "float" else 16
        return groups[0]["num_bits"] + scale / group if (group := _group(groups[0])) else groups[0]["num_bits"]
    if scheme.get("bits"):
        return scheme["bits"] + 16 / group if (group := _group(scheme)) else scheme["bits"]
    return _named(str(scheme.get("quant_algo") or scheme.get("quant_method") or ""))


def _group(scheme: JsonObject) -> int | None:
    """Weights that share a scale, where it is a number and not the whole row."""
    group = scheme.get("group_size")
    return group if isinstance(group, int) and group > 0 else None


def _named(scheme: str) -> float | None:
    return next((bits for name, bits in SCHEMES.items() if name in scheme.lower()), None)
