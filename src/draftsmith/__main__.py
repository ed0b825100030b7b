"""`draftsmith`, `python -m draftsmith`, and what torchrun starts."""

import os
import sys

try:
    from draftsmith.core import terminal
except KeyboardInterrupt:
    os._exit(130)


def main() -> int:
    terminal.on_interrupt(terminal.leave_at_once)  # libraries take seconds to import
    terminal.keep_interrupts()
    results = terminal.last()
    from draftsmith import cli
    from draftsmith.core.progress import say

    try:
        code = cli.main()
        terminal.on_interrupt(terminal.leave_at_once)
    except KeyboardInterrupt:  # once more, while the first was being told of
        terminal.leave_at_once()
    results.flush()
    if code == terminal.EXIT_INTERRUPTED:  # all is put in order; threads may wait for servers yet
        os._exit(code)
    if results.lost is None or isinstance(results.lost, BrokenPipeError):  # somebody who has read enough
        return code
    say(f"draftsmith: stdout: {results.lost.strerror}; not all that was to be printed is there", error=True)
    return code or 2


if __name__ == "__main__":
    sys.exit(main())
