"""Evaluation sets that people quote, each a declaration: where it lies, how its rows look, whose terms hold.

Questions are asked as they stand in the set, no instruction is added to them. Column layouts: the sets' own pages on
the hub and FastChat's `question.jsonl`, in which MT-Bench, Spec-Bench and the EAGLE repositories keep theirs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from draftsmith.core.errors import DataError
from draftsmith.core.files import digest
from draftsmith.core.progress import Meter, say
from draftsmith.core.records.data import EvaluationPrompts, Prompt
from draftsmith.core.sources import EvaluationSet, Source
from draftsmith.data.prompts import Tally, opening
from draftsmith.data.rows import IDS, label, map_columns, read_row
from draftsmith.data.sources import HubSource, Row, data_files, file_rows, remote_rows

TURNS = 16  # of a conversation; MT-Bench has 2, SPEED-Bench up to 5
QUESTIONS = ("question_id", "category", "turns")
# What SPEED-Bench's hub rows hold until they are prepared.
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED"


@dataclass(frozen=True)
class NamedSet:
    licence: str
    place: HubSource | str | None
    """The hub's, a URL, or None: read from a folder that the user prepared."""
    keys: tuple[str, ...]
    """Of its rows there; a file may have QUESTIONS instead."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Ours to theirs, of rows that lack ours."""
    category: str = "other"
    categories: Mapping[str, str] = field(default_factory=dict)
    """Those that are told as one."""
    rows: int | None = None
    """The first ones are taken, unless EvaluationSet.limit says how many."""

    @property
    def source(self) -> str:
        if isinstance(self.place, HubSource):
            return f"{self.place.path}, {self.place.split}, revision {(self.place.revision or 'main')[:12]}"
        return self.place or ""


_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
_HUMANEVAL = HubSource(
    "openai/openai_humaneval",
    "test",
    configs=("openai_humaneval",),
    revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
)
SETS = {
    "mt-bench": NamedSet(
        "apache-2.0",
        HubSource("HuggingFaceH4/mt_bench_prompts", "train", revision="e3a795c5e9a82ee40611c416b8a7786c73198991"),
        ("prompt_id", "category", "prompt"),
        {"turns": "prompt"},
    ),
    "humaneval": NamedSet("mit", _HUMANEVAL, ("task_id", "prompt", "entry_point"), category="code"),
    "gsm8k": NamedSet(
        "mit",
        HubSource("openai/gsm8k", "test", configs=("main",), revision="740312add88f781978c0658806c59bc2815b9866"),
        ("question", "answer"),
        category="math",
    ),
    "math500": NamedSet(
        "mit",
        HubSource("HuggingFaceH4/MATH-500", "test", revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"),
        ("problem", "subject", "unique_id"),
        {"category": "subject", "id": "unique_id"},
    ),
    "alpaca": NamedSet(
        "cc-by-nc-4.0",
        HubSource("tatsu-lab/alpaca", "train", revision="dce01c9b08f87459cf36a430d809084718273017"),
        ("instruction", "input"),
        category="chat",
        rows=80,
    ),
    "spec-bench": NamedSet(
        "apache-2.0",
        "https://raw.githubusercontent.com/hemingkx/Spec-Bench/fd2c1cd7d2201ef71db4c5f4e455008f017967bf/data/spec_bench/"
        "question.jsonl",
        QUESTIONS,
        categories=dict.fromkeys(_MT_BENCH, "mt-bench"),
    ),
    "speed-bench": NamedSet("nvidia-evaluation-dataset-license", None, QUESTIONS),
}


def read_set(chosen: EvaluationSet, training: Path, folder: Path, skip_bad: bool) -> EvaluationPrompts:
    """The set without what training prompts begin with; read once and kept in `folder`. Raises `DataError`."""
    known = SETS.get(chosen.name)
    files = _files(chosen) if chosen.path else []
    trained_on = [training] if training.exists() else []
    key = digest(chosen.model_dump(mode="json"), known.source if known else "", skip_bad, *files, *trained_on)
    kept = folder / f"{chosen.name}-{key}.json"
    if (found := EvaluationPrompts.readable(kept)) is not None:
        return found
    tally = Tally()
    prompts = list(_prompts(chosen, files, skip_bad, tally))
    trained = {opening(prompt) for path in trained_on for prompt in Prompt.read_rows(path)}
    fresh = [prompt for prompt in prompts if opening(prompt) not in trained]
    if not fresh:
        lost = f"{len(prompts)} prompts that were trained on" if prompts else str(tally) or "no rows"
        raise DataError(f"evaluate.sets: {chosen.name}: nothing to ask ({lost}); give another path, or leave it out")
    read = EvaluationPrompts(
        name=chosen.name,
        source=chosen.path.name if chosen.path else SETS[chosen.name].source,  # where it lies is nobody's business
        licence=known.licence if known else "not stated",
        prompts=fresh,
        trained_on=len(prompts) - len(fresh),
        left_out=dict(tally.left_out),
    )
    read.save(kept)
    say(
        f"evaluate: {chosen.name}: {len(fresh)} prompts of {read.source}; left out: {read.trained_on} that were "
        f"trained on{', ' if tally.left_out else ''}{tally}"
    )
    return read


def _files(chosen: EvaluationSet) -> list[Path]:
    files = data_files(Source(name=str(chosen.path)))
    if not files:
        raise DataError(
            f"evaluate.sets: {chosen.name}: {chosen.path} is no file, and no folder that has .json, .jsonl, .csv, "
            ".parquet or .arrow files in it; give such a path (of SPEED-Bench the folder of one configuration)"
        )
    return files


def _rows(chosen: EvaluationSet, files: list[Path]) -> Iterator[Row]:
    if files:
        yield from file_rows(files)
        return
    try:
        yield from remote_rows(SETS[chosen.name].place or "")
    except DataError as error:
        reason = str(error).removesuffix("; give another source")
        raise DataError(
            f"evaluate.sets: {chosen.name}: {reason}; where there is no network give it as a file: "
            f"{{name: {chosen.name}, path: FILE}}"
        ) from None


def _prompts(chosen: EvaluationSet, files: list[Path], skip_bad: bool, tally: Tally) -> Iterator[Prompt]:
    known = SETS.get(chosen.name)
    rows = islice(_rows(chosen, files), chosen.limit or known.rows) if known and known.rows else _rows(chosen, files)
    default = chosen.category or (known.category if known else "other")
    merged: Mapping[str, str] = known.categories if known else {}
    ids: set[str] = set()
    mend = "give the set's own file, name its columns, or pass --prompts.skip-bad"
    with Meter(f"set {chosen.name}", None, "rows") as meter:
        for number, (where, row) in enumerate(rows):
            meter.advance()
            with tally.reading(f"evaluate.sets: {chosen.name}: {where}", skip_bad, mend):
                row = _ours(chosen, row)
                conversation = read_row(row, TURNS)
                tally.left_out.update(conversation.left_out)
                category = label(row, "category") or default
                name = label(row, *IDS)
                name = f"{name or chosen.name}-{number}" if not name or name in ids else name
                ids.add(name)
                yield Prompt(
                    id=name,
                    category=merged.get(category, category),
                    source=chosen.name,
                    messages=conversation.messages,
                    tools=conversation.tools,
                )
    if tally.bad:
        tally.left_out["malformed row"] = tally.bad


def _ours(chosen: EvaluationSet, row: Any) -> Any:
    """The row under our names; raises `DataError` where it is no row of the set."""
    known, own = SETS.get(chosen.name), {str(ours): theirs for ours, theirs in chosen.columns.items()}
    if own or known is None or not isinstance(row, dict):
        return map_columns(row, own)
    if not any(all(key in row for key in keys) for keys in (known.keys, QUESTIONS)):
        wanted = " or ".join(", ".join(keys) for keys in dict.fromkeys((known.keys, QUESTIONS)))
        raise DataError(f"is no row of {chosen.name}: it has {', '.join(row) or 'no columns'}, wanted are {wanted}")
    if PLACEHOLDER in str(row.get("turns")):
        raise DataError("holds a placeholder in the place of its text; prepare the set as its page says")
    return map_columns(row, {ours: theirs for ours, theirs in known.columns.items() if ours not in row})
