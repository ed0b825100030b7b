"""Every file of a run is a model, validated when it is written and when it is read (docs/files.md)."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, ValidationError

from draftsmith.core import files
from draftsmith.core.errors import DataError
from draftsmith.core.progress import say
from draftsmith.core.recipe import EngineName
from draftsmith.core.recipe_model import Model

Points = tuple[tuple[float, float], ...]
"""(x, y) of a measured curve, ascending in x."""
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""JSON has no NaN: null stands for what is not known."""
Decodes = Literal["embedded"] | EngineName

_told: set[str] = set()  # what is wrong with records, each said once


class Record(Model):
    """One file, or a part of one."""

    def save(self, path: Path) -> None:
        files.write_atomic(path, f"{self.model_dump_json(indent=2)}\n")

    def line(self) -> bytes:
        """As a row of a .jsonl file, without what has its default."""
        return f"{self.model_dump_json(exclude_defaults=True)}\n".encode()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises `DataError` of one line for a file that is damaged or of another version."""
        return cls._parsed(path.read_bytes(), str(path))

    @classmethod
    def found(cls, path: Path) -> Self | None:
        """The file where there is one."""
        return cls.load(path) if path.exists() else None

    @classmethod
    def readable(cls, path: Path) -> Self | None:
        """The file where there is one and it can be read; says what is wrong with it otherwise. For records that a run
        can do without: what they speak of counts as not done."""
        try:
            return cls.found(path)
        except (DataError, OSError) as error:
            if str(error) not in _told:
                _told.add(str(error))
                say(f"{error}; it counts as missing")
            return None

    @classmethod
    def read_rows(cls, path: Path) -> Iterator[Self]:
        """Of a .jsonl file."""
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield cls._parsed(line, f"{path}:{number}")

    @classmethod
    def whole_rows(cls, path: Path) -> list[Self]:
        """Of a .jsonl file that grows: the rows before the first that cannot be read, as a kill or a power cut tears
        the end. The file is cut off there, and what is dropped is told."""
        rows = []
        if path.exists():
            try:
                for row in cls.read_rows(path):
                    rows.append(row)
            except DataError as error:
                say(f"{error}; what follows is dropped and made again")
                write_rows(path, rows)
        return rows

    @classmethod
    def _parsed(cls, text: bytes, where: str) -> Self:
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"])
            raise DataError(f"{where}: is no {cls.__name__} ({key + ': ' if key else ''}{problem['msg']})") from None


def write_rows(path: Path, rows: Iterable[Record]) -> None:
    files.write_atomic(path, (row.line() for row in rows))
