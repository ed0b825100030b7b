"""Rows of a source: a bundled set, a file or folder as people have it, or a data set on the hub."""

import bz2
import codecs
import gzip
import itertools
import json
import lzma
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any

import orjson

from draftsmith.core.errors import DataError
from draftsmith.core.sources import Source

_SETS = Path(str(files("draftsmith.data"))) / "bundled"
BUNDLED = {  # licences: bundled/LICENCES.md
    "bundled": _SETS / "small.jsonl.gz",
    "bundled-train": _SETS / "train.jsonl.gz",
    "bundled-dev": _SETS / "dev.jsonl.gz",
}


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub; `columns` as in a recipe, `licence` as its page states it."""

    path: str
    split: str | None
    category: str = "other"
    columns: dict[str, str] = field(default_factory=dict)
    configs: tuple[str | None, ...] = (None,)
    revision: str | None = None
    licence: str = ""


HUB: dict[str, HubSource] = {
    "ultrachat": HubSource("HuggingFaceH4/ultrachat_200k", "train_sft", "chat", licence="mit"),
    "opencodeinstruct": HubSource("nvidia/OpenCodeInstruct", "train", "code", {"prompt": "input"}, licence="cc-by-4.0"),
    "codealpaca": HubSource("sahil2801/CodeAlpaca-20k", "train", "code", licence="cc-by-4.0"),
    "gsm8k": HubSource("openai/gsm8k", "train", "math", configs=("main",), licence="mit"),
    "hendrycks-math": HubSource(
        "EleutherAI/hendrycks_math",
        "train",
        "math",
        licence="mit",
        configs=(
            "algebra",
            "counting_and_probability",
            "geometry",
            "intermediate_algebra",
            "number_theory",
            "prealgebra",
            "precalculus",
        ),
    ),
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:.*)?")
_SPLIT = re.compile(r"(train|test|valid|dev)\w*(\[.*\])?")

_JSON = {".json", ".jsonl", ".ndjson"}
_SEPARATED = {".csv": ",", ".tsv": "\t"}
_TYPED = {".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}  # what the library `datasets` calls them
_FORMATS = (*sorted(_JSON), *_SEPARATED, *_TYPED)
_PACKED = {".gz", ".bz2", ".xz", ".zst"}
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # beside a saved data set
_CHUNK = 1 << 20  # characters of an array read at once
LONGEST_ROW = 1 << 24  # bytes; four million tokens

Row = tuple[str, Any]  # where it stands, and the row; a row that is no JSON is the error


def hub_source(source: Source) -> HubSource | None:
    """The hub data set that a source names; None where it is a bundled set, a file or a folder."""
    if source.name in HUB:
        return HUB[source.name]
    if source.name in BUNDLED or Path(source.name).exists() or not _HUB_NAME.fullmatch(source.name):
        return None
    path, *parts = source.name.split(":", 2)
    if _suffix(Path(path)) in _FORMATS:  # a file that is not there
        return None
    if len(parts) == 1 and _SPLIT.fullmatch(parts[0]):
        parts.insert(0, "")
    config, split = [*parts, "", ""][:2]
    return HubSource(path, split or None, configs=(config or None,))


def data_files(name: str | Path) -> list[Path]:
    """The local files of a source, in order; none for a data set on the hub."""
    path = BUNDLED.get(str(name)) or Path(name)
    if not path.is_dir():
        return [path] if path.is_file() else []
    found = [p for folder in (path, path / "data") if folder.is_dir() for p in folder.iterdir()]
    return sorted(p for p in found if p.is_file() and p.name not in _NOT_ROWS and _suffix(p) in _FORMATS)


def read_rows(source: Source, seed: int) -> Iterator[Row]:
    """Every row of a source; raises `DataError` of one line for what cannot be read."""
    if hub := hub_source(source):
        yield from hub_rows(hub, source.limit, seed)
        return
    paths = data_files(source.name)
    if not paths:
        raise DataError(
            f"prompts.sources: {source.name!r} is no file; allowed are {', '.join([*BUNDLED, *HUB])}, a path to "
            f"{', '.join(_FORMATS)} (packed as {', '.join(sorted(_PACKED))} or not), a folder of such "
            "files, or a data set on the hub as owner/name[:config][:split]"
        )
    yield from file_rows(paths)


def file_rows(paths: Sequence[Path]) -> Iterator[Row]:
    for path in paths:
        with _one_line(str(path)):
            kind = _suffix(path)
            read = _separated_rows if kind in _SEPARATED else _typed_rows if kind in _TYPED else _json_rows
            yield from read(path)


def downloaded_rows(url: str) -> Iterator[Row]:
    """Of a JSONL file."""
    import httpx2

    with _one_line(url), tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / url.rpartition("/")[2]
        path.write_bytes(httpx2.get(url, timeout=60, follow_redirects=True).raise_for_status().content)
        yield from _json_rows(path)


def _suffix(path: Path) -> str:
    """.jsonl of both x.jsonl and x.jsonl.gz."""
    return (Path(path.stem) if path.suffix.lower() in _PACKED else path).suffix.lower()


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # pandas, pyarrow, decompressors and HTTP clients share no base of their errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{what}: cannot be read: {reason}; give another source") from None


def _opened(path: Path) -> Any:
    """The unpacked bytes, whatever the file's name says about packing."""
    with path.open("rb") as file:
        head = file.read(6)
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if head.startswith(b"BZh"):
        return bz2.open(path)
    if head.startswith(b"\xfd7zXZ"):
        return lzma.open(path)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        return BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


# --- JSON ------------------------------------------------------------------------------------------------------------
# Line by line instead of through `datasets`: its reader takes the columns from the first 10 MB and fails on a key that
# comes later, wants another package for rows that look like agent traces (id, source, model, system_prompt, messages),
# and cannot say which line is broken.


def _json_rows(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        head = file.read(1 << 16)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: is UTF-16; save it as UTF-8")
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    indented = head.partition(b"\n")[0].strip() == b"{"
    with _opened(path) as file:
        if indented or head.startswith(b"["):
            with TextIOWrapper(file, encoding="utf-8-sig") as text:
                yield from _values(path, text)
            return
        for number in itertools.count(1):
            line = file.readline(LONGEST_ROW)
            if not line:
                return
            if len(line) == LONGEST_ROW:
                yield f"{path}:{number}", ValueError(f"a row of more than {LONGEST_ROW:,} bytes")
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_ROW)
                continue
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield f"{path}:{number}", _parsed(line)


def _parsed(line: bytes) -> Any:
    """The value of a line, or the error."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:  # NaN and halves of surrogate pairs: Python's own json writes them, orjson refuses them
            return json.loads(line.decode())
        except (ValueError, RecursionError):
            return error


def _values(path: Path, file: TextIOWrapper) -> Iterator[Row]:
    """Rows of an array, or objects one after the other, over any number of lines; never the whole file in memory."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    text = file.read(_CHUNK)
    line, text = 1 + text[: len(text) - len(text.lstrip())].count("\n"), text.lstrip()
    array, closed = text.startswith("["), False
    position = int(array)
    for number in itertools.count(1):
        while True:
            position = gap.match(text, position).end()  # type: ignore[union-attr]  # it matches the empty text too
            try:
                if array and text.startswith("]", position):
                    closed, array, position = True, False, position + 1
                    continue
                row, end = decoder.raw_decode(text, position)
                if closed:
                    raise json.JSONDecodeError("text after the array", text, position)
                break
            except (json.JSONDecodeError, RecursionError) as error:
                # growing, so that a broken array costs linear time
                more = file.read(max(_CHUNK, len(text))) if len(text) - position < LONGEST_ROW else ""
                if not more:
                    if array or position < len(text):
                        below = text.count("\n", 0, getattr(error, "pos", position))
                        yield f"{path}:{line + below}", ValueError(getattr(error, "msg", error))
                    return
                line += text.count("\n", 0, position)
                text, position = text[position:] + more, 0
        position = end
        yield f"{path} item {number}", row


# --- through libraries -----------------------------------------------------------------------------------------------


def _separated_rows(path: Path) -> Iterator[Row]:
    """Every cell is a text as it is written: neither 007 nor "NA" is a number."""
    import pandas

    settings = {"sep": _SEPARATED[_suffix(path)], "encoding": "utf-8-sig", "dtype": str, "keep_default_na": False}
    number = itertools.count(1)
    with _opened(path) as file, pandas.read_csv(file, chunksize=10_000, **settings) as frames:
        for frame in frames:
            if not isinstance(frame.index, pandas.RangeIndex):  # it takes the first cells for the rows' names
                raise DataError(
                    f"{path}: its first row has more cells than its header; quote cells that hold the separator, or "
                    "name every column"
                )
            for row in frame.fillna("").to_dict("records"):  # a row that is too short ends in NaN
                yield f"{path} row {next(number)}", row


def _typed_rows(path: Path) -> Iterator[Row]:
    import glob

    from datasets import load_dataset

    with tempfile.TemporaryDirectory() as scratch:
        plain = path
        if path.suffix.lower() in _PACKED:  # the library unpacks some of these only
            plain = Path(scratch) / path.stem
            with _opened(path) as packed, plain.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        # escaped, because the library takes a path for a pattern
        rows = load_dataset(_TYPED[_suffix(path)], data_files=[glob.escape(str(plain))], split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{path} row {number}", row


def hub_rows(hub: HubSource, limit: int | None = None, seed: int | None = None) -> Iterator[Row]:
    """Streamed, in order or shuffled by `seed` through a buffer, so a limited source is read only as far as needed; a
    data set of several parts gives an equal share of each."""
    share = -(-limit // len(hub.configs)) if limit and len(hub.configs) > 1 else None
    for config in hub.configs:
        with _one_line(f"prompts.sources: {hub.path} from the hub"):
            yield from itertools.islice(_streamed(hub, config, seed), share)


def _streamed(hub: HubSource, config: str | None, seed: int | None) -> Iterator[Row]:
    from datasets import load_dataset

    rows = load_dataset(hub.path, config, split=hub.split, streaming=True, revision=hub.revision)
    if isinstance(rows, dict):
        name = "train" if "train" in rows else next(iter(rows))
        if name != "train" and len(rows) > 1:
            raise DataError(
                f"prompts.sources: {hub.path} has the splits {', '.join(rows)}; name one, as in "
                f"{hub.path}:{config or ''}:{name}"
            )
        rows = rows[name]
    for number, row in enumerate(rows if seed is None else rows.shuffle(seed=seed, buffer_size=10_000), 1):
        yield f"{hub.path} row {number}", row
