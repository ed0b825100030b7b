"""Writing files so that a crash at any moment leaves the old one or the new one, never half of one."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from draftsmith.errors import DataError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write to a temporary name beside `path`, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS))


def read_json(path: Path) -> Any:
    return orjson.loads(path.read_bytes())


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    write_atomic(path, b"".join(orjson.dumps(row) + b"\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[Any]:
    """Rows of a file that draftsmith wrote."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not JSON ({error}); delete the file and run the stage again"
                ) from None


def save_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """safetensors, written beside its place and renamed; a write that fails is a `DataError` of one line."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error}; free space or give another --out") from None
    os.replace(temporary, path)


def digest(*parts: Any) -> str:
    """Content hash of files (given as Path) and JSON values, 16 hex digits."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        else:
            total.update(orjson.dumps(part, option=orjson.OPT_SORT_KEYS))
    return total.hexdigest()[:16]
