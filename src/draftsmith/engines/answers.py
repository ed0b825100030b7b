"""What servers answer, validated as it comes: nothing of it is believed before."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from draftsmith.decoding.generation import Generation

MALFORMED = (KeyError, IndexError, TypeError, AttributeError, ValueError)
"""What reading an answer may raise that is not one; pydantic's errors are among them."""
Whole = Annotated[int, Field(ge=0, strict=True)]
Name = Annotated[str, Field(max_length=500)]
whole_numbers = TypeAdapter(list[Whole]).validate_python
_numbers = TypeAdapter(list[Annotated[float, Field(strict=True)]]).validate_python
UNTOLD_STEPS = 8  # verifications beyond the tokens that were written: an engine may have begun them already


class Model(BaseModel):
    """One of /v1/models."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())
    id: Name
    root: Name | None = None
    max_model_len: Whole | None = None

    @property
    def names(self) -> set[str]:
        return {self.id, *([self.root] if self.root else [])}


class Models(BaseModel):
    data: list[Model]


def checked_completion(answer: Generation, vocabulary: int, most: int) -> Generation:
    """Raises `ValueError` unless it is token ids of the vocabulary, at most as many as were asked for."""
    ids = whole_numbers(answer.ids)
    checked_steps(list(answer.verified), len(ids))
    if len(ids) > most:
        raise ValueError(f"{len(ids)} tokens where {most} were asked for")
    if beyond := [token for token in ids if token >= vocabulary]:
        raise ValueError(f"token {beyond[0]} of a vocabulary of {vocabulary}")
    return answer


def checked_steps(steps: Any, tokens: int, counts: bool = False) -> list[int]:
    """What each verification accepted, or, as `counts`, how many accepted 0, 1, ... A step writes a token at least."""
    told = whole_numbers(steps)
    number = sum(told) if counts else len(told)
    if number > tokens + UNTOLD_STEPS:
        raise ValueError(f"{number} verifications for {tokens} tokens")
    return told


def checked_logprobs(found: Any, ids: Sequence[int]) -> list[float]:
    """Raises `ValueError` unless there is a finite number for every token after the first."""
    numbers = _numbers(found)
    if len(numbers) != len(ids) - 1 or not all(map(math.isfinite, numbers)):
        raise ValueError("log-probabilities that are no numbers")
    return numbers
