"""The only seam to a target model: generate token ids, capture hidden states, lend the head and embedding rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from draftsmith.decoding.sampling import Sampling

# T tokens of all documents, K taps, H hidden size, V vocabulary


@dataclass(frozen=True)
class Generation:
    """One completion. `finish_reason`: `eos`, `stop` (a stop string, cut off), `loop` or `length`.

    verified: draft tokens accepted by every verification step, of servers that draft and tell; in order where
    `in_order`, else sorted.
    """

    ids: list[int]
    finish_reason: str
    verified: tuple[int, ...] = ()
    in_order: bool = False


@dataclass(frozen=True)
class Capture:
    """Hidden states of packed documents, in the target's dtype.

    taps_TKH: residual stream entering each tapped layer (HF `hidden_states[t]`).
    last_TH: the head's own input, after the target's final norm.
    """

    taps_TKH: Tensor
    last_TH: Tensor


@dataclass(frozen=True)
class TargetIdentity:
    """What a draft belongs to; stored beside every checkpoint and export."""

    model: str
    revision: str | None
    dtype: str
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    tokenizer_hash: str
    template_hash: str  # of the tokenizer's own chat template and the options that it is given
    quantization: str | None  # the model's own, such as fp8


class Target(Protocol):
    identity: TargetIdentity
    logit_softcap: float | None

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        max_new_tokens: int,
        stop: tuple[str, ...],
        seed: int,
        stop_loops: bool,
        max_tokens: int | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """Completions as (index of the prompt, generation), each as soon as it ends; once `max_tokens` are written, no
        further prompt is begun."""
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
