"""What is drafted in one step, written `steps/topk/draft_tokens`, and how."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import core_schema

DraftSampling = Literal["greedy", "sampled"]
"""How drafts are taken at temperatures above 0: a draft's first choices, or draws from its distribution."""


@dataclass(frozen=True)
class Shape:
    """Steps, top-k and draft tokens, as SGLang counts them; top-k 1 is a chain.

    draft_tokens: tokens verified at once, the root included. In recipes, flags and files it is the text `3/4/8`.
    """

    steps: int
    topk: int
    draft_tokens: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.topk < 1:
            raise ValueError(f"{self}: steps and top-k are at least 1")
        if self.topk == 1 and self.draft_tokens != self.steps + 1:
            raise ValueError(f"{self}: a chain of {self.steps} steps verifies {self.steps + 1} tokens")
        most = 1 + self.topk + (self.steps - 1) * self.topk**2
        if not 2 <= self.draft_tokens <= most:
            raise ValueError(f"{self}: {self.steps} steps of top-k {self.topk} verify 2 to {most} tokens")

    @classmethod
    def chain(cls, steps: int) -> "Shape":
        return cls(steps, 1, steps + 1)

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Of `3/4/8`; raises `ValueError`."""
        parts = str(text).split("/")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"{text!r} is no shape; write steps/topk/draft_tokens, such as 3/4/8")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.steps}/{self.topk}/{self.draft_tokens}"

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            lambda value: value if isinstance(value, cls) else cls.parse(value),
            serialization=core_schema.to_string_ser_schema(when_used="json"),
        )
