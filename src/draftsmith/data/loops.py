"""Finding text that repeats itself: small models loop, and loops flatter every accept length."""

from collections.abc import Sequence

import numpy as np

MAX_PERIOD = 64
MIN_REPEATS = 3
MIN_TOKENS = 24


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
