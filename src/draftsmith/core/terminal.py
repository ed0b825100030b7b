"""What a program owes to its terminal: lines that nobody can read any more end no work, and Ctrl-C ends it at once."""

import _thread
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from draftsmith.core.secrets import masked

INTERRUPTED = "draftsmith: interrupted; what is finished is kept, the same command goes on from there"
EXIT_INTERRUPTED = 130  # as shells have it


class Lasting(io.TextIOWrapper):
    """A terminal, pipe or file that may be closed or full: what it does not take is left out, and so are secrets."""

    lost: OSError | None = None
    """Why something was left out."""

    def write(self, text: str) -> int:
        try:
            super().write(masked(text))
        except OSError as error:
            self.lost = error
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.lost = error


def last() -> Lasting:
    """Make stdout, which is returned, and stderr last. One that was closed before we began is opened to nowhere: the
    first file that is opened would take its number, and what libraries print would be written there."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)

    def lasting(number: int, old: Any) -> Lasting:
        buffer = open(number, "wb", closefd=False)  # noqa: SIM115 - lives as long as the process
        return Lasting(buffer, getattr(old, "encoding", "utf-8"), "backslashreplace", line_buffering=True)

    results = lasting(1, sys.stdout)
    sys.stdout, sys.stderr = results, lasting(2, sys.stderr)
    return results


def on_interrupt(act: Callable[[int, Any], Any]) -> None:
    """What Ctrl-C does from here on; a program that was told to ignore it goes on to."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, act)


def keep_interrupts() -> None:
    """A Ctrl-C that comes while something is being taken down is printed and lost; have it come once more."""
    plain = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            plain(unraisable)
        else:
            threading.Timer(0.05, _thread.interrupt_main).start()

    sys.unraisablehook = hook


def leave_at_once(*_: object) -> NoReturn:
    """For moments in which nothing is to be put in order: an exception would be lost in somebody's import."""
    with contextlib.suppress(OSError):
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(EXIT_INTERRUPTED)
