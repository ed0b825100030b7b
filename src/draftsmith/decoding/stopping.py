"""Where a completion ends: stop texts and loops, decided on token ids.

Small models repeat themselves, and loops flatter every accept length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from draftsmith.decoding.generation import FinishReason

STOP_TAIL = 12  # tokens decoded to look for a stop text
LOOP_EVERY = 16  # tokens between looks for a loop
MAX_PERIOD = 64  # of a loop, in tokens
MIN_REPEATS = 3
MIN_TOKENS = 24


def stop_length(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> int | None:
    """Length to cut `ids` to if their last tokens hold a stop text, else None."""
    tail = list(ids[-STOP_TAIL:])

    def stopped() -> bool:
        text = tokenizer.decode(tail)
        return any(s in text for s in stop)

    if not stop or not stopped():
        return None
    before = len(ids) - len(tail)
    while tail and stopped():
        tail.pop()
    return before + len(tail)


def loop_onset(ids: Sequence[int]) -> int | None:
    """Index where the second repetition of the first loop begins, or None.

    A loop is a stretch of at least 24 tokens after the first repetition in which a period of at most 64 tokens
    comes at least three times in all.
    """
    tokens = np.asarray(ids)
    best: int | None = None
    for period in range(1, min(MAX_PERIOD, len(tokens) - 1) + 1):
        equal = np.concatenate([[False], tokens[period:] == tokens[:-period], [False]]).astype(np.int8)
        edges = np.flatnonzero(np.diff(equal))
        starts, ends = edges[::2], edges[1::2]
        long = starts[(ends - starts) >= max((MIN_REPEATS - 1) * period, MIN_TOKENS)]
        if len(long) and (best is None or long[0] + period < best):
            best = int(long[0]) + period
    return best


def loops(ids: Sequence[int]) -> bool:
    """Whether the text has come to a loop. Looked for at every 16th token: one that began to be one since the last look
    repeats the nine tokens that end 15 before the last, and few texts do, so few are looked at as a whole."""
    if len(ids) % LOOP_EVERY:
        return False
    start = len(ids) - MIN_TOKENS
    seen = list(ids[start : start + MIN_TOKENS - LOOP_EVERY + 1])
    if not any(list(ids[i : i + len(seen)]) == seen for i in range(max(0, start - MAX_PERIOD), start)):
        return False
    return loop_onset(ids) is not None


@dataclass(frozen=True)
class Ends:
    """What ends the completions of a target: its end tokens, stop texts, loops."""

    eos_ids: frozenset[int]
    tokenizer: Any = None
    texts: Sequence[str] = ()
    loops: bool = False

    def reason(self, ids: list[int], room: int) -> FinishReason | None:
        """Why the completion ends with its last token, cut to where it does; None: it goes on. Asked after every
        token; `room`: tokens that it may have."""
        if ids[-1] in self.eos_ids:
            return "eos"
        if (cut := stop_length(self.tokenizer, ids, self.texts)) is not None:
            del ids[cut:]
            return "stop"
        if self.loops and loops(ids):
            return "loop"
        return "length" if len(ids) >= room else None

    def of_answer(self, written: list[int], finish_reason: str) -> tuple[list[int], FinishReason]:
        """The same of a whole answer, as if it had been asked after every token."""
        for end in range(1 if self.texts or self.loops else max(1, len(written)), len(written) + 1):
            ids = written[:end]
            if reason := self.reason(ids, len(written) + 1):
                return ids, reason
        return written, "length" if finish_reason == "length" else "stop"
