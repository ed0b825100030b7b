"""Progress of anything that takes more than two seconds: a bar on a terminal, log lines otherwise."""

import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

LOG_EVERY_S = 15.0
EARLY = 0.02  # share of the work before which nobody can say how long the rest takes
QUIET_S = 2.0


def say(text: str, error: bool = False) -> None:
    """One line for the user, on stderr so that stdout stays for results; of many processes the first speaks for all,
    but everyone names his errors."""
    if error or os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def short_duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds < 3600 else f"{seconds / 3600:.1f} h"


class Meter:
    """Counts `total` units (`unit`; None where nobody knows) and, beside them, tokens; shows tokens/s and time left."""

    def __init__(self, label: str, total: float | None, unit: str = "steps"):
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self.tokens = 0
        self.note = ""
        self._start = self._last_line = time.monotonic()
        self._skipped = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> "Meter":
        if sys.stderr.isatty():
            columns = "{task.description}", BarColumn(), "{task.fields[detail]}", TimeRemainingColumn()
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, detail="")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None and self.seconds > QUIET_S:
            say(f"{self.label}: {self._detail()} in {short_duration(self.seconds)}")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def resume(self, done: float) -> None:
        """Units finished by an earlier process: they count as done but not towards the rate."""
        self.done = self._skipped = done

    def advance(self, amount: float = 1, tokens: int = 0, note: str = "") -> None:
        self.done += amount
        self.tokens += tokens
        self.note = note or self.note
        if self._bar:
            self._bar.update(self._task, completed=self.done, detail=self._detail())
        elif time.monotonic() - self._last_line > LOG_EVERY_S:
            self._last_line = time.monotonic()
            say(f"{self.label}: {self._detail()}{self._left()}")

    def _left(self) -> str:
        fresh = self.done - self._skipped
        if self.total is None or self.done >= self.total or fresh < EARLY * self.total:
            return ""
        return f", {short_duration((self.total - self.done) * self.seconds / fresh)} left"

    def _detail(self) -> str:
        of_total = "" if self.total is None else f"/{self.total:,.0f}"
        parts = [f"{self.done:,.0f}{of_total} {self.unit}"]
        if self.tokens:
            parts.append(f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s")
        return ", ".join([*parts, self.note] if self.note else parts)
