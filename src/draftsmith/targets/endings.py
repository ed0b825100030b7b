"""Where a completion ends: stop texts and loops, decided on token ids."""

from collections.abc import Sequence

from draftsmith.data.loops import loop_onset

STOP_TAIL = 12  # tokens decoded to look for a stop text
LOOP_EVERY = 16  # tokens between looks for a loop


def stop_length(tokenizer, ids: Sequence[int], stop: Sequence[str]) -> int | None:
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


def first_stop(tokenizer, ids: Sequence[int], stop: Sequence[str]) -> int | None:
    """Length at which a decoder that looks for stop texts after every token would have cut `ids`, else None."""
    return next(
        (cut for n in range(1, len(ids) + 1) if (cut := stop_length(tokenizer, ids[:n], stop)) is not None), None
    )


def loops(ids: Sequence[int]) -> bool:
    """Looked for at every 16th token, because a look costs as much as a token of a small model."""
    return len(ids) % LOOP_EVERY == 0 and loop_onset(ids) is not None


def loop_length(ids: Sequence[int]) -> int | None:
    """Length at which a decoder that calls `loops` after every token would have stopped, else None."""
    return next((n for n in range(LOOP_EVERY, len(ids) + 1, LOOP_EVERY) if loops(ids[:n])), None)
