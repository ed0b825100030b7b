"""Proof that drafting changes nothing: greedy output token by token against plain decoding of the same engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder
from draftsmith.decoding.tree import Shape
from draftsmith.progress import Meter
from draftsmith.targets.local import LocalTarget

# Logits that rounding moves at most between two ways to compute the same text; outputs that part within it are ties.
TIE = {"fp32": 1e-3, "bf16": 0.5, "fp16": 0.1}


@dataclass(frozen=True)
class LosslessVerdict:
    """`yes`: identical; `ties`: outputs part at ties alone; `no`; `untested`."""

    state: Literal["yes", "ties", "no", "untested"]
    detail: str


def lossless_verdict(proof: Mapping[str, Any] | None) -> LosslessVerdict:
    """What a `lossless` entry of results.json proves."""
    if not proof or not proof["tokens"]:
        return LosslessVerdict("untested", "no output was compared with plain decoding")
    compared = (
        f"greedy output on {proof['prompts']} prompts x {proof['tokens_per_prompt']} tokens in {proof['dtype']}, "
        f"shapes {', '.join(dict.fromkeys(proof['shapes']))}"
    )
    differences = proof["differences"]
    if not differences:
        return LosslessVerdict("yes", f"identical {compared}")
    first, gaps = differences[0], [d["logit_gap"] for d in differences]
    ended = gaps.count(None)  # one of the texts ended there: no two tokens to compare
    widest = max((gap for gap in gaps if gap is not None), default=None)
    told = f"{len(differences)} differences in {compared}, the first in {first['id']} at token {first['token']}"
    if widest is not None:
        told += f"; widest gap between the two tokens' logits {widest:.2g}"
    if ended:
        return LosslessVerdict("no", f"{told}; {ended} where one text ended")
    if widest is not None and widest <= TIE[proof["dtype"]]:
        return LosslessVerdict("ties", f"{told}, which is within what {proof['dtype']} rounds")
    return LosslessVerdict("no", told)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


@torch.inference_mode()
def logit_gap(target: LocalTarget, text: list[int], one: int, other: int) -> float:
    """Distance between the target's logits of two tokens after a text: a tie is a gap within rounding."""
    logits = target.logits(target.capture([text], ()).last_TH[-1:])[0].float()
    return abs(float(logits[one] - logits[other]))


def compare(
    target: LocalTarget, name: str, prompt: list[int], plain: Sequence[int], drafted: Sequence[int]
) -> dict[str, Any] | None:
    """None where the outputs are identical, otherwise where they part and how close the two tokens were."""
    at = first_difference(plain, drafted)
    if at is None:
        return None
    if at == min(len(plain), len(drafted)):  # one of them stopped: no two tokens to compare
        return {"id": name, "token": at, "plain": None, "drafted": None, "logit_gap": None}
    gap = logit_gap(target, [*prompt, *plain[:at]], plain[at], drafted[at])
    return {"id": name, "token": at, "plain": plain[at], "drafted": drafted[at], "logit_gap": gap}


def greedy_identity(
    target: LocalTarget,
    plain: Decoder,
    speculative: Decoder,
    shapes: Sequence[Shape],
    prompts: Sequence[tuple[str, list[int]]],
    max_new_tokens: int,
    dtype: str,
) -> dict[str, Any]:
    """Compare every shape's greedy output with plain decoding; end tokens apply, stop texts do not.

    Plain decoding of all prompts runs as one batch, which is many times faster. Where a drafted output differs from
    it, the prompt is decoded again plainly and alone, and that is what counts.
    """
    differences: list[dict[str, Any]] = []
    references = {i: g.ids for i, g in target.generate([ids for _, ids in prompts], Sampling(), max_new_tokens)}
    with Meter(f"lossless ({dtype})", len(prompts) * len(shapes), "outputs") as meter:
        for index, (name, prompt) in enumerate(prompts):
            for shape in shapes:
                drafted = speculative.generate(prompt, Sampling(), max_new_tokens, shape)
                if drafted.ids != references[index]:
                    references[index] = plain.generate(prompt, Sampling(), max_new_tokens).ids
                    difference = compare(target, name, prompt, references[index], drafted.ids)
                    if difference:
                        differences.append({"shape": str(shape), **difference})
                meter.advance(1, len(drafted.ids))
    return {
        "dtype": dtype,
        "prompts": len(prompts),
        "tokens_per_prompt": max_new_tokens,
        "tokens": sum(map(len, references.values())),
        "shapes": [str(s) for s in shapes],
        "differences": differences,
        "identical": not differences,
    }
