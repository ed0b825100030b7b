"""What an attack may end in: a report or one line, soon, within a gigabyte."""

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from hypothesis import HealthCheck, settings

from draftsmith.core.errors import DraftsmithError

SECONDS = 5.0
MEMORY_BYTES = 1 << 30
FUZZED = 1000
fuzzed = settings(
    max_examples=FUZZED, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
ODD = ["text", "", "a\nb", "\x1b[31m", "<script>", -1, 0, 1, 0.5, 2**31, 10**9, 10**30, 1e308, True, False, None]
ODD += [[], [1, "x"], {}, {"a": None}, [[[[]]]], "x" * 5000]


class TooSlow(BaseException):
    pass


@contextlib.contextmanager
def one_gigabyte() -> Iterator[None]:
    """More than that beside what is held already is refused by the kernel."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(work: Callable[[], Any], seconds: float = SECONDS) -> str:
    """The report or the line that it ends in; anything else, a line about memory too, goes up."""
    text, error = _done(work, seconds)
    return text if error is None else str(error)


def refused(work: Callable[[], Any], seconds: float = SECONDS) -> str:
    """The line that it ends in."""
    text, error = _done(work, seconds)
    assert error is not None, f"not refused: {text[:500]}"
    return str(error)


def told(work: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    return refused(lambda: work(*arguments, **options))


def read(pattern: str, text: str) -> Any:
    """What a line says to give: the pattern's group, or several."""
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in: {text}"
    return found[1] if len(found.groups()) == 1 else found.groups()


def _done(work: Callable[[], Any], seconds: float) -> tuple[str, DraftsmithError | None]:
    def stop(*_: Any) -> None:
        raise TooSlow

    text, told = "", None
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 12 * seconds)  # by then something waits for ever
    started = time.process_time()  # a busy machine is nobody's fault
    try:
        text = str(work())
    except DraftsmithError as error:
        told = error
        assert "\n" not in str(told)
        assert not re.search(r"allocat|MemoryError|out of memory", str(told)), told
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - started < seconds, (text, told)
    return text, told


def _socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as held:  # its name may have 108 letters only
        held.bind(path.name)


def _elsewhere(path: Path, content: bytes) -> None:
    other = path.parent.with_name(f"{path.parent.name}-elsewhere")
    other.write_bytes(content)
    path.symlink_to(other)


# What may stand in the place of a plain file, put there in its stead.
KINDS: dict[str, Callable[[Path, bytes], Any]] = {
    "pipe": lambda path, _: os.mkfifo(path),
    "device": lambda path, _: path.symlink_to("/dev/zero"),
    "terminal": lambda path, _: path.symlink_to("/dev/tty"),
    "socket": lambda path, _: _socket(path),
    "directory": lambda path, _: path.mkdir(),
    "link to itself": lambda path, _: path.symlink_to(path.name),
    "link to nothing": lambda path, _: path.symlink_to("nothing"),
    "link that leaves": _elsewhere,
    "sparse terabyte": lambda path, _: (path.touch(), os.truncate(path, 1 << 40)),
    "nothing in it": lambda path, _: path.touch(),
    "noise": lambda path, _: path.write_bytes(os.urandom(4096)),
}


def put(kind: str, path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    KINDS[kind](path, content)


def copied(directory: Path, place: Path) -> Path:
    """A fresh copy to be damaged."""
    shutil.rmtree(place, ignore_errors=True)
    return shutil.copytree(directory, place)
