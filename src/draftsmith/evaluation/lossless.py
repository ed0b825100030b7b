"""Proof that drafting changes nothing: greedy output token by token against plain decoding of the same engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from draftsmith.core.records.evaluation import Difference, Lossless
from draftsmith.core.shape import Shape
from draftsmith.targets.base import Target

# Logits that rounding moves at most between two ways to compute the same text; outputs that part within it are ties.
TIE = {"fp32": 1e-3, "bf16": 0.5, "fp16": 0.1}
WORDS = {"yes": "yes", "ties": "up to ties", "no": "NO", "untested": "not tested"}


@dataclass(frozen=True)
class LosslessVerdict:
    """`yes`: identical; `ties`: outputs part at ties alone; `no`; `untested`."""

    state: Literal["yes", "ties", "no", "untested"]
    detail: str

    def __str__(self) -> str:
        return f"lossless: {WORDS[self.state]}; {self.detail}"


def lossless_verdict(proof: Lossless | None) -> LosslessVerdict:
    if not proof or not proof.tokens:
        return LosslessVerdict("untested", "no output was compared with plain decoding")
    compared = (
        f"greedy output on {proof.prompts} prompts ({proof.tokens:,} tokens, at most {proof.tokens_per_prompt} each) "
        f"in {proof.dtype}, shapes {', '.join(map(str, dict.fromkeys(proof.shapes)))}"
    )
    differences = proof.differences
    if not differences:
        return LosslessVerdict("yes", f"identical {compared}")
    first, gaps = differences[0], [d.logit_gap for d in differences]
    ended = gaps.count(None)  # one of the texts ended there: no two tokens to compare
    widest = max((gap for gap in gaps if gap is not None), default=None)
    detail = f"{len(differences)} differences in {compared}, the first in {first.id} at token {first.token}"
    if widest is not None:
        detail += f"; widest gap between the two tokens' logits {widest:.2g}"
    if ended:
        return LosslessVerdict("no", f"{detail}; {ended} where one text ended")
    if widest is not None and widest <= TIE[proof.dtype]:
        return LosslessVerdict("ties", f"{detail}, which is within what {proof.dtype} rounds")
    return LosslessVerdict("no", detail)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)


def difference(
    session: Target, name: str, shape: Shape, prompt: list[int], plain: list[int], drafted: list[int]
) -> Difference | None:
    """None where the outputs are identical, otherwise where they part and how close the target holds the two tokens."""
    at = first_difference(plain, drafted)
    if at is None:
        return None
    if at == min(len(plain), len(drafted)):  # one of them stopped: no two tokens to compare
        return Difference(id=name, shape=shape, token=at)
    one, other = (session.logprobs([*prompt, *plain[:at], token])[-1] for token in (plain[at], drafted[at]))
    return Difference(id=name, shape=shape, token=at, plain=plain[at], drafted=drafted[at], logit_gap=abs(one - other))


def together(proofs: list[Lossless]) -> Lossless | None:
    """The proofs of several shapes as one."""
    if not proofs:
        return None
    shapes = tuple(shape for proof in proofs for shape in proof.shapes)
    differences = [d for proof in proofs for d in proof.differences]
    return proofs[0].model_copy(update={"shapes": shapes, "differences": differences})
