"""Stage 1: prompts from hub data sets, files, folders and the bundled sets, in one form (`Prompt`)."""

import hashlib
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import orjson

from draftsmith.core import run_files
from draftsmith.core.errors import DataError
from draftsmith.core.files import digest, write_atomic
from draftsmith.core.progress import Meter, say
from draftsmith.core.recipe import Recipe
from draftsmith.core.records.data import Prompt, PromptsSummary
from draftsmith.core.sources import Source
from draftsmith.data.rows import IDS, NothingToAsk, label, map_columns, read_row
from draftsmith.data.sources import HUB, hub_source, read_rows

_T = TypeVar("_T")


@dataclass
class Tally:
    """What became of the rows that were read."""

    bad: int = 0
    """Malformed rows that were skipped."""
    empty: int = 0
    """Well-formed rows with nothing to ask."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that lost something, or all, by reason."""
    first_bad: str = ""

    def add(self, other: "Tally") -> None:
        self.bad += other.bad
        self.empty += other.empty
        self.left_out += other.left_out

    def __str__(self) -> str:
        return ", ".join(f"{reason}: {count:,}" for reason, count in self.left_out.most_common())

    @contextmanager
    def reading(self, where: str, skip_bad: bool, mend: str) -> Iterator[None]:
        """Counts a row that turns out to have nothing to ask, or to be malformed; without `skip_bad` the latter is a
        `DataError` that says where it is and how to `mend` it."""
        try:
            yield
        except NothingToAsk as error:
            self.empty += 1
            self.left_out.update(error.reasons)
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{where}: {error}; {mend}") from None
            self.bad += 1
            self.first_bad = self.first_bad or f"{where}: {error}"


def prompts_of(source: Source, max_turns: int, skip_bad: bool, seed: int, tally: Tally) -> Iterator[Prompt]:
    """The prompts of one source as they are read; of a file all of them, whatever `limit` says."""
    hub = hub_source(source)
    columns: Mapping[Any, str] = source.columns or (hub.columns if hub else {})
    category = source.category or (hub.category if hub else "other")
    stem = hub.path.rpartition("/")[2] if hub and source.name not in HUB else Path(source.name).stem
    limit = source.limit if hub else None
    keys: dict[str, None] = {}  # of all rows
    count = 0
    with Meter(f"prompts {source.name}", limit, "rows") as meter:
        for where, row in read_rows(source, seed):
            meter.advance()
            with tally.reading(where, skip_bad, "mend the line or pass --prompts.skip-bad"):
                keys.update(dict.fromkeys(row) if isinstance(row, dict) else {})
                row = map_columns(row, columns)
                messages, tools, left_out = read_row(row, max_turns)
                tally.left_out.update(left_out)
                count += 1
                yield Prompt(
                    id=label(row, *IDS) or f"{stem}-{digest(messages)[:10]}",
                    category=label(row, "category") or category,
                    source=label(row, "source") or stem,
                    messages=messages,
                    tools=tools,
                )
            if count == limit:
                break
    for ours, theirs in columns.items() if keys else ():
        if theirs not in keys:
            raise DataError(
                f"prompts.sources: {source.name}: columns: {ours}: {theirs!r} is no column; found are {', '.join(keys)}"
            )
    if not count:
        reasons = [f"{tally.bad:,} bad rows"]
        reasons += [f"the first {tally.first_bad}"] if tally.first_bad else []
        reasons += [f"{tally.empty:,} rows without a prompt ({tally})"] if tally.empty else []
        reasons += [f"keys found: {', '.join(keys)}"] if keys else []
        raise DataError(
            f"prompts.sources: {source.name} holds no prompts ({'; '.join(reasons)}); give another source, or name "
            "its columns with columns"
        )


def chosen(items: Iterable[_T], source: Source, seed: int) -> list[_T]:
    """At most `limit` of them."""
    items = list(items)
    if source.limit and len(items) > source.limit:
        return random.Random(f"{seed}-{source.name}").sample(items, source.limit)
    return items


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+|[^\w\s]", text.casefold()))


def opening(prompt: Prompt) -> bytes:
    """Of the words of the first user turn: prompts with the same are taken for each other's contamination."""
    return _known_by(_words(prompt.users[0]))


def _known_by(*parts: Any) -> bytes:
    return hashlib.blake2b(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS), digest_size=16).digest()


class Held(NamedTuple):
    """A prompt in few bytes: a million of them have to fit into memory."""

    id: str
    category: str
    source: str
    opening: bytes
    """Of the words of the first user turn."""
    whole: bytes
    """Of the words of all turns, the system prompt and the tools: two prompts with the same are duplicates."""
    row: bytes
    """The prompt as JSON."""

    @classmethod
    def of(cls, prompt: Prompt) -> "Held":
        turns = [(message["role"], _words(message["content"])) for message in prompt.messages]
        return cls(
            prompt.id,
            sys.intern(prompt.category),
            sys.intern(prompt.source),
            opening(prompt),
            _known_by(turns, prompt.tools or None),
            # copied, because what orjson returns keeps the far larger block that it was written into
            bytes(memoryview(prompt.line())),
        )


def _distinct(prompts: list[Held]) -> list[Held]:
    """The first of every set of duplicates, in order."""
    seen: set[bytes] = set()
    return [p for p in prompts if not (p.whole in seen or seen.add(p.whole))]  # type: ignore[func-returns-value]


def _with_own_ids(prompts: list[Held]) -> list[Held]:
    """Where an id names several prompts, each gets its source before it, and a digest behind it where that is not
    enough; an id of its own is never changed."""
    ids = Counter(prompt.id for prompt in prompts)
    names = Counter(f"{prompt.source}-{prompt.id}" for prompt in prompts if ids[prompt.id] > 1)

    def own(prompt: Held) -> Held:
        if ids[prompt.id] == 1:
            return prompt
        name = f"{prompt.source}-{prompt.id}"
        name = name if names[name] + ids[name] == 1 else f"{name}-{prompt.whole.hex()}"
        row = Prompt.model_validate_json(prompt.row).model_copy(update={"id": name}).line()
        return prompt._replace(id=name, row=row)

    return [own(prompt) for prompt in prompts]


def _split_off(prompts: list[Held], per_category: int) -> tuple[list[Held], list[Held]]:
    """(held out, kept). Conversations that begin as others do are held out last: that beginning is trained on."""
    openings = Counter(prompt.opening for prompt in prompts)
    taken: Counter[str] = Counter()
    held_out: dict[bytes, Held] = {}
    for prompt in sorted(prompts, key=lambda prompt: openings[prompt.opening] > 1):
        if taken[prompt.category] < per_category:
            taken[prompt.category] += 1
            held_out[prompt.whole] = prompt
    return list(held_out.values()), [prompt for prompt in prompts if prompt.whole not in held_out]


def gather(recipe: Recipe, out: Path) -> PromptsSummary:
    """Stage `prompts`: writes prompts.jsonl, evaluation.jsonl and summary.json."""
    settings, tally = recipe.prompts, Tally()

    def read(sources: tuple[Source, ...]) -> list[Held]:
        held: list[Held] = []
        for source in sources:
            prompts = prompts_of(source, settings.max_turns, settings.skip_bad, recipe.seed, part := Tally())
            held += chosen(map(Held.of, prompts), source, recipe.seed)
            tally.add(part)
        return held

    prompts = read(settings.sources)
    evaluation = read(settings.evaluation)
    random.Random(f"{recipe.seed}-prompts").shuffle(prompts)  # any beginning of the file is a fair sample of the mix
    unique, held_out = _distinct(prompts), _distinct(evaluation)
    duplicates = len(prompts) - len(unique) + len(evaluation) - len(held_out)
    if held_out:
        asked = {prompt.opening for prompt in held_out}
        kept = [prompt for prompt in unique if prompt.opening not in asked]
    else:
        held_out, kept = _split_off(unique, settings.held_out)
    if not kept:
        raise DataError("prompts.sources: no training prompts are left after de-duplication and decontamination")
    summary = PromptsSummary(
        prompts=len(kept),
        evaluation_prompts=len(held_out),
        duplicates_dropped=duplicates,
        contaminated_dropped=len(unique) - len(kept) if settings.evaluation else 0,
        bad_rows_skipped=tally.bad,
        rows_without_prompt=tally.empty,
        left_out=dict(tally.left_out.most_common()),
        by_category=dict(Counter(prompt.category for prompt in kept)),
        by_source=dict(Counter(prompt.source for prompt in kept)),
    )
    write_atomic(out / "prompts.jsonl", (prompt.row for prompt in _with_own_ids(kept)))
    write_atomic(out / "evaluation.jsonl", (prompt.row for prompt in _with_own_ids(held_out)))
    summary.save(out / run_files.SUMMARY)
    say(
        f"prompts: {summary.prompts} to train on, {summary.evaluation_prompts} to evaluate; dropped "
        f"{duplicates} duplicates, {summary.contaminated_dropped} that occur in the evaluation set, "
        f"{tally.bad} bad rows, {tally.empty} rows without a prompt"
    )
    if tally.left_out:
        say(f"prompts: left out, in rows: {tally}")
    return summary
