"""One completion, whoever wrote it."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["eos", "stop", "length", "loop"]


@dataclass(frozen=True)
class Generation:
    """`finish_reason`: `eos`, `stop` (a stop text, cut off), `loop` or `length`.

    verified: draft tokens accepted by every verification step, of decoders that draft and tell; in order where
    `in_order`, else sorted. seconds: of decoding alone, the prompt's own forward excluded, where that is known.
    """

    ids: list[int]
    finish_reason: FinishReason
    verified: tuple[int, ...] = ()
    in_order: bool = True
    seconds: float | None = None

    @property
    def tau(self) -> float:
        """1 + accepted draft tokens / verification steps."""
        return 1 + sum(self.verified) / max(1, len(self.verified))
