"""One writer per run directory: a lock that the kernel holds, so that nothing is left to clean after a kill."""

import fcntl
import os
from pathlib import Path
from typing import IO

from draftsmith.core.errors import DataError

NAME = ".lock"


class RunLock:
    """Held inside `with`, at any depth, and until the process ends, however it ends.

    Raises `DataError` of one line with the holder's process where another one writes.
    """

    def __init__(self, root: Path):
        self.root, self._depth = root, 0
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        if self._file is None:
            self._file = self._taken()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._file is not None and not self._depth:
            self._file.close()
            self._file = None

    def _taken(self) -> IO[str]:
        self.root.mkdir(parents=True, exist_ok=True)
        file = (self.root / NAME).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise DataError(
                f"--out: {self.root} is being written by process {holder}; wait for it, or give another --out"
            ) from None
        except OSError as error:
            file.close()
            raise DataError(
                f"--out: {self.root} lies on a file system that cannot lock ({error.strerror}), so two commands could "
                "write there at once; give an --out on another"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file

    def require(self) -> None:
        """A process that slept while its directory was taken away finds out here, before it writes."""
        path = self.root / NAME
        if self._file is None or not path.exists() or path.stat().st_ino != os.fstat(self._file.fileno()).st_ino:
            raise DataError(
                f"--out: {self.root} was taken by another process meanwhile; run the same command again to go on"
            )
