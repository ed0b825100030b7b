"""Proof that drafting changes nothing: greedy output token by token against plain decoding of the same engine."""

from collections.abc import Sequence
from typing import Any

import torch

from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder
from draftsmith.decoding.tree import Shape
from draftsmith.progress import Meter
from draftsmith.targets.local import LocalTarget


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


@torch.inference_mode()
def logit_gap(target: LocalTarget, prompt: list[int], ids: list[int]) -> float:
    """Distance between the target's two largest logits after prompt + ids: a tie is a gap within rounding."""
    last = target.capture([[*prompt, *ids]], ()).last_TH[-1:]
    top = target.logits(last)[0].float().topk(2).values
    return float(top[0] - top[1])


def compare(
    target: LocalTarget, name: str, prompt: list[int], plain: Sequence[int], drafted: Sequence[int]
) -> dict[str, Any] | None:
    """None where the outputs are identical, otherwise where they part and how close the two tokens were."""
    at = first_difference(plain, drafted)
    if at is None:
        return None
    return {
        "id": name,
        "token": at,
        "plain": plain[at] if at < len(plain) else None,
        "drafted": drafted[at] if at < len(drafted) else None,
        "logit_gap": logit_gap(target, prompt, list(plain[:at])),
    }


def greedy_identity(
    target: LocalTarget,
    plain: Decoder,
    speculative: Decoder,
    shapes: Sequence[Shape],
    prompts: Sequence[tuple[str, list[int]]],
    max_new_tokens: int,
    dtype: str,
) -> dict[str, Any]:
    """Decode each prompt plainly and with every shape; end tokens apply, stop texts do not."""
    differences: list[dict[str, Any]] = []
    tokens = 0
    with Meter(f"lossless ({dtype})", len(prompts), "prompts") as meter:
        for name, prompt in prompts:
            reference = plain.generate(prompt, Sampling(), max_new_tokens)
            tokens += len(reference.ids)
            for shape in shapes:
                drafted = speculative.generate(prompt, Sampling(), max_new_tokens, shape)
                difference = compare(target, name, prompt, reference.ids, drafted.ids)
                if difference:
                    differences.append({"shape": str(shape), **difference})
            meter.advance(1, len(reference.ids))
    return {
        "dtype": dtype,
        "prompts": len(prompts),
        "tokens_per_prompt": max_new_tokens,
        "tokens": tokens,
        "shapes": [str(s) for s in shapes],
        "differences": differences,
        "identical": not differences,
    }
