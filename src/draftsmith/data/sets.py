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
from draftsmith.core.sources import EvaluationSet
from draftsmith.data.prompts import Tally, opening
from draftsmith.data.rows import IDS, label, map_columns, read_row
from draftsmith.data.sources import HubSource, Row, data_files, downloaded_rows, file_rows, hub_rows

TURNS = 16  # of a conversation; MT-Bench has 2, SPEED-Bench up to 5
QUESTIONS = ("question_id", "category", "turns")
# What SPEED-Bench's hub rows hold until they are prepared.
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED"


@dataclass(frozen=True)
class NamedSet(HubSource):
    """`path`: on the hub; without a split a URL, or "" where it is read from a folder that the user prepared. `columns`
    are of rows that lack ours."""

    keys: tuple[str, ...] = QUESTIONS
    """Of its rows there; a file may have QUESTIONS instead."""
    categories: Mapping[str, str] = field(default_factory=dict)
    """Those that are told as one."""
    rows: int | None = None
    """The first ones are taken, unless EvaluationSet.limit says how many."""

    @property
    def source(self) -> str:
        return f"{self.path}, {self.split}, revision {(self.revision or 'main')[:12]}" if self.split else self.path


_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
SETS = {
    "mt-bench": NamedSet(
        "HuggingFaceH4/mt_bench_prompts",
        "train",
        columns={"turns": "prompt"},
        revision="e3a795c5e9a82ee40611c416b8a7786c73198991",
        licence="apache-2.0",
        keys=("prompt_id", "category", "prompt"),
    ),
    "humaneval": NamedSet(
        "openai/openai_humaneval",
        "test",
        "code",
        configs=("openai_humaneval",),
        revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        licence="mit",
        keys=("task_id", "prompt", "entry_point"),
    ),
    "gsm8k": NamedSet(
        "openai/gsm8k",
        "test",
        "math",
        configs=("main",),
        revision="740312add88f781978c0658806c59bc2815b9866",
        licence="mit",
        keys=("question", "answer"),
    ),
    "math500": NamedSet(
        "HuggingFaceH4/MATH-500",
        "test",
        columns={"category": "subject", "id": "unique_id"},
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        licence="mit",
        keys=("problem", "subject", "unique_id"),
    ),
    "alpaca": NamedSet(
        "tatsu-lab/alpaca",
        "train",
        "chat",
        revision="dce01c9b08f87459cf36a430d809084718273017",
        licence="cc-by-nc-4.0",
        keys=("instruction", "input"),
        rows=80,
    ),
    "spec-bench": NamedSet(
        "https://raw.githubusercontent.com/hemingkx/Spec-Bench/fd2c1cd7d2201ef71db4c5f4e455008f017967bf/data/spec_bench/"
        "question.jsonl",
        None,
        licence="apache-2.0",
        categories=dict.fromkeys(_MT_BENCH, "mt-bench"),
    ),
    "speed-bench": NamedSet("", None, licence="nvidia-evaluation-dataset-license"),
}
OWN = NamedSet("", None, licence="not stated")  # of any other name


def local_files(chosen: EvaluationSet) -> list[Path]:
    """Those of a set that does not come from the hub. Raises `DataError` where its path has none."""
    files = data_files(chosen.path) if chosen.path else []
    if chosen.path and not files:
        raise DataError(
            f"evaluate.sets: {chosen.name}: {chosen.path} is no file, and no folder that has .json, .jsonl, .csv, "
            ".parquet or .arrow files in it; give such a path (of SPEED-Bench the folder of one configuration)"
        )
    return files


def read_set(chosen: EvaluationSet, training: Path, folder: Path, skip_bad: bool) -> EvaluationPrompts:
    """The set without what training prompts begin with; read once and kept in `folder`. Raises `DataError`."""
    known = SETS.get(chosen.name, OWN)
    files = local_files(chosen)
    trained_on = [training] if training.exists() else []
    key = digest(chosen.model_dump(mode="json"), known.source, skip_bad, *files, *trained_on)
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
        source=chosen.path.name if chosen.path else known.source,  # where it lies is nobody's business
        licence=known.licence,
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


def _rows(chosen: EvaluationSet, known: NamedSet, files: list[Path]) -> Iterator[Row]:
    if files:
        yield from file_rows(files)
        return
    try:
        yield from hub_rows(known) if known.split else downloaded_rows(known.path)
    except DataError as error:
        reason = str(error).removeprefix("prompts.sources: ").removesuffix("; give another source")
        raise DataError(
            f"evaluate.sets: {chosen.name}: {reason}; where there is no network give it as a file: "
            f"{{name: {chosen.name}, path: FILE}}"
        ) from None


def _prompts(chosen: EvaluationSet, files: list[Path], skip_bad: bool, tally: Tally) -> Iterator[Prompt]:
    known = SETS.get(chosen.name, OWN)
    rows = islice(_rows(chosen, known, files), chosen.limit or known.rows if known.rows else None)
    ids: set[str] = set()
    mend = "give the set's own file, name its columns, or pass --prompts.skip-bad"
    with Meter(f"set {chosen.name}", None, "rows") as meter:
        for number, (where, row) in enumerate(rows):
            meter.advance()
            with tally.reading(f"evaluate.sets: {chosen.name}: {where}", skip_bad, mend):
                row = _ours(chosen, known, row)
                messages, tools, left_out = read_row(row, TURNS)
                tally.left_out.update(left_out)
                category = label(row, "category") or chosen.category or known.category
                name = label(row, *IDS)
                name = f"{name or chosen.name}-{number}" if not name or name in ids else name
                ids.add(name)
                yield Prompt(
                    id=name,
                    category=known.categories.get(category, category),
                    source=chosen.name,
                    messages=messages,
                    tools=tools,
                )
    if tally.bad:
        tally.left_out["malformed row"] = tally.bad


def _ours(chosen: EvaluationSet, known: NamedSet, row: Any) -> Any:
    """The row under our names; raises `DataError` where it is no row of the set."""
    if chosen.columns or known is OWN or not isinstance(row, dict):
        return map_columns(row, chosen.columns)
    if not any(all(key in row for key in keys) for keys in (known.keys, QUESTIONS)):
        wanted = " or ".join(", ".join(keys) for keys in dict.fromkeys((known.keys, QUESTIONS)))
        raise DataError(f"is no row of {chosen.name}: it has {', '.join(row) or 'no columns'}, wanted are {wanted}")
    if PLACEHOLDER in str(row.get("turns")):
        raise DataError("holds a placeholder in the place of its text; prepare the set as its page says")
    return map_columns(row, {ours: theirs for ours, theirs in known.columns.items() if ours not in row})
