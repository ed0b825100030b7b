"""The only seam to a target model: generate token ids, capture hidden states, lend the head and embedding rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from draftsmith.core.records.run import TargetIdentity
from draftsmith.decoding.generation import Generation
from draftsmith.decoding.sampling import Sampling

# T tokens of all documents, K taps, H hidden size, V vocabulary


Follow = Callable[[int, Generation], list[int] | None]
"""(index of the prompt, its answer) -> what the conversation goes on with; None where it ends."""
Written = Callable[[int], None]
"""Told how many tokens have come since it was told last."""


def nobody(tokens: int) -> None:
    """Nobody wants to be told."""


@dataclass(frozen=True)
class Capture:
    """Hidden states of packed documents, in the target's dtype.

    taps_TKH: residual stream entering each tapped layer (HF `hidden_states[t]`).
    last_TH: the head's own input, after the target's final norm.
    """

    taps_TKH: Tensor
    last_TH: Tensor


class Target(Protocol):
    identity: TargetIdentity
    logit_softcap: float | None
    tokenizer: Any
    eos_ids: frozenset[int]
    independent: bool
    """Whether an answer does not depend on those that are decoded beside it."""
    weights_hash: str | None
    """Of the files that it was loaded from in this process."""

    @property
    def identity_logprobs(self) -> list[float]:
        """Of the probe text of targets/identity.py; servers tell them once one has answered."""
        ...

    def generate(
        self,
        prompts: Iterable[list[int]],
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        seed: int = 0,
        stop_loops: bool = False,
        max_tokens: int | None = None,
        follow: Follow | None = None,
        written: Written = nobody,
    ) -> Iterator[tuple[int, Generation]]:
        """Completions as (index of the prompt, generation), each as soon as it ends, and those of the turns that
        `follow`; once `max_tokens` are written, none is begun. `written` is told of tokens as they come."""
        ...

    def logprobs(self, document: list[int]) -> list[float]:
        """Log-probability of every token of a text after the first."""
        ...

    def capture(self, documents: list[list[int]], taps: tuple[int, ...]) -> Capture: ...

    def head_rows(self, ids: Tensor) -> Tensor:
        """Rows [len(ids), H] of the output head."""
        ...

    def norm_gain(self) -> Tensor:
        """Gain [H] of the final norm, as a plain RMSNorm has it."""
        ...

    def embedding_rows(self) -> Tensor:
        """The raw input embedding [V, H], without any scale that the model applies."""
        ...
