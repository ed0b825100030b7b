"""Writing files so that a crash or a power cut at any moment leaves the old one or the new one, never half of one."""

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from draftsmith.core.errors import DataError

LONGEST_OBJECT = 1 << 24  # bytes
DEEPEST_OBJECT = 100
JsonObject = dict[str, Any]
"""An object of a file or an answer that others wrote: nothing is known of it before it is looked at."""


def sync(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk before anything is built on them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(temporary: Path, path: Path) -> None:
    """Put a finished file or directory in its place. A rename may reach the disk before the content does, so what is
    inside is synced first, and the rename itself after it."""
    for inside in temporary.iterdir() if temporary.is_dir() else (temporary,):
        sync(inside)
    os.replace(temporary, path)
    sync(path.parent)


def write_atomic(path: Path, content: bytes | str | Iterable[bytes]) -> None:
    """Write to a temporary name beside `path`, an iterable piece by piece, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    content = content.encode() if isinstance(content, str) else content
    with temporary.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
    replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS))


def read_json(path: Path) -> Any:
    return orjson.loads(path.read_bytes())


def refusal(path: Path, inside: Path | None = None) -> str | None:
    """Why a file that others made is not opened: reading of a pipe or a device has no end, and a link that leads out of
    the directory (`inside`, where given) leads to anything. A snapshot in the hub's cache links to blobs beside it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "is no plain file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if inside is not None:
        place = inside.resolve()
        root = place.parent.parent if place.parent.name == "snapshots" else place
        if not path.resolve().is_relative_to(root):
            return "is a link that leaves its directory"
    return None


def read_object(path: Path, inside: Path | None = None) -> JsonObject:
    """A JSON object that others wrote; a `ValueError` says why there is none. `inside`: see `refusal`."""
    if why := refusal(path, inside):
        raise ValueError(why)
    if (size := path.stat().st_size) > LONGEST_OBJECT:
        raise ValueError(f"has {size:,} bytes, too many for a configuration")
    try:
        value = read_json(path)
    except (OSError, orjson.JSONDecodeError) as error:
        raise ValueError(f"cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("holds no JSON object")
    level, depth = [value], 0
    while level:  # deeper ones cannot even be printed
        level = [v for outer in level for v in (outer.values() if isinstance(outer, dict) else outer)]
        level, depth = [v for v in level if isinstance(v, dict | list)], depth + 1
    if depth > DEEPEST_OBJECT:
        raise ValueError(f"is nested {depth} deep; no configuration is")
    return value


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
    replace(temporary, path)


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
