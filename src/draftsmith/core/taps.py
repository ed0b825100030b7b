"""The two ways to count the layers that a draft reads.

A tap t is HF's hidden_states[t]: what enters layer t, which is what layer t - 1 puts out. vLLM counts layers by their
inputs (the tap itself), SGLang by their outputs (one less, so that tap 0 has none). Elsewhere only taps are spoken of.
"""

from collections.abc import Iterable

from draftsmith.core.errors import TargetError

Taps = tuple[int, ...]


def to_outputs(taps: Iterable[int]) -> list[int] | None:
    """The layers whose outputs they are; None where one of them is nobody's output."""
    taps = list(taps)
    return [tap - 1 for tap in taps] if min(taps, default=1) > 0 else None


def of_outputs(layers: Iterable[int]) -> Taps:
    return tuple(layer + 1 for layer in layers)


def engine_default(layers: int) -> Taps:
    """What both engines capture when a draft names no taps."""
    return 2, layers // 2, layers - 3


def default_taps(layers: int) -> Taps:
    """The engines' default; a `TargetError` where a shallow target has none."""
    taps = engine_default(layers)
    if list(taps) != sorted(set(taps)):
        raise TargetError(f"draft.taps: a target of {layers} layers has no default taps; name them")
    return taps
