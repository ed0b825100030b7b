"""Stage 1: prompts from hub data sets, local files and the bundled set, in one form.

A prompt is {"id", "category", "source", "messages"}: the user turns (and a system turn) that the target will answer.
"""

import gzip
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import orjson

from draftsmith.errors import DataError
from draftsmith.files import digest, write_json, write_jsonl
from draftsmith.progress import Meter, say
from draftsmith.recipe import Recipe, Source

Prompt = dict[str, Any]
_SETS = Path(str(files("draftsmith.data"))) / "bundled"
BUNDLED = {  # licences: bundled/LICENCES.md
    "bundled": _SETS / "small.jsonl.gz",
    "bundled-train": _SETS / "train.jsonl.gz",
    "bundled-dev": _SETS / "dev.jsonl.gz",
}


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub and the mapping of its columns to one row in a form that `messages_of` reads."""

    path: str
    split: str
    category: str
    to_row: Callable[[dict], dict]
    configs: tuple[str | None, ...] = (None,)


HUB: dict[str, HubSource] = {
    "ultrachat": HubSource(
        "HuggingFaceH4/ultrachat_200k", "train_sft", "chat", lambda row: {"messages": row["messages"]}
    ),
    "opencodeinstruct": HubSource("nvidia/OpenCodeInstruct", "train", "code", lambda row: {"prompt": row["input"]}),
    "codealpaca": HubSource(
        "sahil2801/CodeAlpaca-20k",
        "train",
        "code",
        lambda row: {"prompt": "\n\n".join(part for part in (row["instruction"], row["input"]) if part)},
    ),
    "gsm8k": HubSource("openai/gsm8k", "train", "math", lambda row: {"prompt": row["question"]}, ("main",)),
    "hendrycks-math": HubSource(
        "EleutherAI/hendrycks_math",
        "train",
        "math",
        lambda row: {"prompt": row["problem"]},
        (
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

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _list(value: Any) -> list:
    if not isinstance(value, list):
        raise DataError("its turns are no list")
    return value


def _turn(message: Any, role: str, content: str) -> tuple[Any, Any]:
    return (message.get(role), message.get(content)) if isinstance(message, dict) else (None, None)


def messages_of(row: Any, max_turns: int) -> list[dict[str, str]]:
    """The turns to answer, from a row in ShareGPT, `messages` or plain `prompt` form; raises `DataError`."""
    if not isinstance(row, dict):
        raise DataError("not an object")
    if "messages" in row:
        turns = [_turn(m, "role", "content") for m in _list(row["messages"])]
    elif "conversations" in row:
        turns = [_turn(m, "from", "value") for m in _list(row["conversations"])]
        turns = [(_SHAREGPT_ROLES.get(str(role)), content) for role, content in turns]
    elif "prompt" in row:
        turns = [("user", row["prompt"])]
    else:
        raise DataError(f"has none of the keys prompt, messages, conversations (found: {', '.join(row) or 'none'})")
    kept: list[dict[str, str]] = []
    users = 0
    for role, content in turns:
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise DataError("a turn lacks a known role or a text")
        if role == "user" and content.strip() and users < max_turns:
            users += 1
            kept.append({"role": "user", "content": content.strip()})
        elif role == "system" and not kept and content.strip():
            kept.append({"role": "system", "content": content.strip()})
    if not users:
        raise DataError("has no user text")
    return kept


def _raw_rows(source: Source, seed: int) -> Iterator[tuple[str, Any]]:
    """(where it came from, row); a row that is not JSON comes as the error."""
    if source.name in HUB:
        yield from _hub_rows(source, seed)
        return
    path = BUNDLED.get(source.name) or Path(source.name)
    if not path.is_file():
        raise DataError(
            f"prompts.sources: {source.name!r} is no file; allowed are a .jsonl, .jsonl.gz or .parquet path, "
            f"or one of {', '.join([*BUNDLED, *HUB])}"
        )
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        try:
            table = parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not Parquet: {str(error).splitlines()[0]}") from None
        for number, row in enumerate(table.to_pylist(), 1):
            yield f"{path} row {number}", row
        return
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path}:{number}", orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    yield f"{path}:{number}", error


def _hub_rows(source: Source, seed: int) -> Iterator[tuple[str, Any]]:
    """Streamed and shuffled through a buffer, so a limited source is read only as far as needed; a data set of several
    parts gives an equal share of each."""
    from datasets import load_dataset

    hub = HUB[source.name]
    for config in hub.configs:
        try:
            rows = load_dataset(hub.path, config, split=hub.split, streaming=True).shuffle(
                seed=seed, buffer_size=10_000
            )
            share = -(-source.limit // len(hub.configs)) if source.limit else None
            for number, row in enumerate(itertools.islice(rows, share), 1):
                yield f"{hub.path} row {number}", {"category": hub.category, **hub.to_row(row)}
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"prompts.sources: cannot read {hub.path} from the hub: {str(error).splitlines()[0]}"
            ) from None


def read_source(source: Source, max_turns: int, skip_bad: bool, seed: int) -> tuple[list[Prompt], int]:
    """(prompts of one source, number of bad rows skipped)."""
    prompts: list[Prompt] = []
    bad = 0
    total = source.limit if source.name in HUB else None  # of a file every row is read
    with Meter(f"prompts {source.name}", total, "rows") as meter:
        for where, row in _raw_rows(source, seed):
            meter.advance()
            try:
                if isinstance(row, Exception):
                    raise DataError(f"not JSON: {row}")
                messages = messages_of(row, max_turns)
            except DataError as error:
                if not skip_bad:
                    raise DataError(f"{where}: {error}; mend the line or pass --prompts.skip-bad") from None
                bad += 1
                continue
            prompts.append(
                {
                    "id": str(row.get("id") or f"{Path(source.name).stem}-{digest(messages)[:10]}"),
                    "category": str(row.get("category") or source.category or "other"),
                    "source": str(row.get("source") or Path(source.name).stem),
                    "messages": messages,
                }
            )
    if not prompts:
        raise DataError(f"prompts.sources: {source.name} holds no prompts ({bad} bad rows); give another source")
    if source.limit and len(prompts) > source.limit:
        prompts = random.Random(f"{seed}-{source.name}").sample(prompts, source.limit)
    return prompts, bad


def normalised(prompt: Prompt) -> str:
    """What makes two prompts the same: the words of the first user turn."""
    first = next(m["content"] for m in prompt["messages"] if m["role"] == "user")
    return " ".join(re.findall(r"\w+|[^\w\s]", first.casefold()))


def gather(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Stage `prompts`: writes prompts.jsonl, evaluation.jsonl and summary.json; returns the summary."""
    settings = recipe.prompts

    def read(sources: tuple[Source, ...]) -> tuple[list[Prompt], int]:
        batches = [read_source(source, settings.max_turns, settings.skip_bad, recipe.seed) for source in sources]
        return [prompt for prompts, _ in batches for prompt in prompts], sum(bad for _, bad in batches)

    prompts, bad = read(settings.sources)
    evaluation, bad_evaluation = read(settings.evaluation)
    shuffler = random.Random(f"{recipe.seed}-prompts")
    shuffler.shuffle(prompts)  # any beginning of the file is a fair sample of the mix
    unique = list({normalised(prompt): prompt for prompt in reversed(prompts)}.values())[::-1]
    duplicates = len(prompts) - len(unique)
    if evaluation:
        evaluated = {normalised(prompt) for prompt in evaluation}
        kept = [prompt for prompt in unique if normalised(prompt) not in evaluated]
    else:
        taken: Counter[str] = Counter()
        kept = []
        for prompt in unique:
            held_out = taken[prompt["category"]] < settings.held_out
            (evaluation if held_out else kept).append(prompt)
            taken[prompt["category"]] += held_out
    if not kept:
        raise DataError("prompts.sources: no training prompts are left after de-duplication and decontamination")
    ids = Counter(prompt["id"] for prompt in kept)
    clash = next((name for name, count in ids.items() if count > 1), None)
    if clash:
        raise DataError(f"prompts.sources: the id {clash!r} names two different prompts; make ids unique")
    summary = {
        "prompts": len(kept),
        "evaluation_prompts": len(evaluation),
        "duplicates_dropped": duplicates,
        "contaminated_dropped": len(unique) - len(kept) if settings.evaluation else 0,
        "bad_rows_skipped": bad + bad_evaluation,
        "by_category": dict(Counter(prompt["category"] for prompt in kept)),
        "by_source": dict(Counter(prompt["source"] for prompt in kept)),
    }
    write_jsonl(out / "prompts.jsonl", kept)
    write_jsonl(out / "evaluation.jsonl", evaluation)
    write_json(out / "summary.json", summary)
    say(
        f"prompts: {summary['prompts']} to train on, {summary['evaluation_prompts']} to evaluate; dropped "
        f"{duplicates} duplicates, {summary['contaminated_dropped']} that occur in the evaluation set, "
        f"{summary['bad_rows_skipped']} bad rows"
    )
    return summary
