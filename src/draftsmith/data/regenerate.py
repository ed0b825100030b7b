"""Stage 2: the target answers the prompts; its token ids are kept as they were generated.

A completion is {"id", "category", "source", "ids", "spans", "finish_reason", "sampling", "document"}: `ids` is a
conversation, `spans` are the half-open ranges that the target wrote and that carry the loss. A conversation whose turns
are not prefixes of each other has several: `document` counts them, the first one has the prompt's id.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.data.templates import ChatFormat, Rendered
from draftsmith.decoding.sampling import Sampling
from draftsmith.errors import DataError
from draftsmith.files import digest, read_jsonl, write_json, write_jsonl
from draftsmith.progress import Meter, say
from draftsmith.recipe import Recipe, RegenerateRecipe
from draftsmith.targets.base import Generation, Target

Completion = dict[str, Any]


def completion_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("[0-9]*.jsonl"))


def read_completions(directory: Path) -> Iterator[Completion]:
    for path in completion_files(directory):
        yield from read_jsonl(path)


def loss_tokens(completion: Completion) -> list[int]:
    return [i for start, end in completion["spans"] for i in completion["ids"][start:end]]


def shard_sampling(settings: RegenerateRecipe, shard: int) -> Sampling:
    """Greedy for `greedy_share` of the shards, spread evenly."""
    greedy = int((shard + 1) * settings.greedy_share) > int(shard * settings.greedy_share)
    return Sampling() if greedy else Sampling(settings.temperature, settings.top_p, settings.top_k)


@dataclass
class Conversation:
    """A prompt being answered: ids so far, where the target wrote, user turns still to come.

    Where the history that is rendered for the next turn does not go on from what stands (reasoning dropped, another end
    token, text that is tokenised otherwise), a new document begins; `documents` are those that ended.
    """

    prompt: dict[str, Any]
    users: list[str]
    ids: list[int]
    spans: list[list[int]] = field(default_factory=list)
    finish_reason: str = ""
    documents: list[tuple[list[int], list[list[int]]]] = field(default_factory=list)

    def extend(self, generation: Generation, chat: ChatFormat, max_prompt_tokens: int) -> bool:
        """Add an answer; True if another user turn follows it."""
        asked, start = self.ids, len(self.ids)
        self.ids = [*asked, *generation.ids]
        self.finish_reason = generation.finish_reason
        if generation.ids:
            self.spans.append([start, len(self.ids)])
        if not self.users or generation.finish_reason not in ("eos", "stop"):
            return False
        assert isinstance(asked, Rendered)
        try:
            following = chat.next_turn(asked, generation, self.users.pop(0))
        except DataError:  # the template refuses this turn: what was answered before it stands
            return False
        if len(following) > max_prompt_tokens:
            return False
        if following[: len(self.ids)] != self.ids:
            self._end_document()
        self.ids = following
        return True

    def _end_document(self) -> None:
        if self.spans:
            self.documents.append((self.ids[: self.spans[-1][1]], self.spans))
        self.spans = []

    def rows(self, sampling: Sampling) -> list[Completion]:
        """One row for each document; a user turn that nobody answered is left out."""
        documents = list(self.documents)
        if self.spans or not documents:
            documents.append((self.ids[: self.spans[-1][1]] if self.spans else list(self.ids), self.spans))
        name = self.prompt["id"]
        return [
            {
                "id": f"{name}#{number}" if number else name,
                **{key: self.prompt[key] for key in ("category", "source")},
                "ids": ids,
                "spans": spans,
                "finish_reason": self.finish_reason if number == len(documents) - 1 else "eos",
                "sampling": [sampling.temperature, sampling.top_p, sampling.top_k],
                "document": number,
            }
            for number, (ids, spans) in enumerate(documents)
        ]


def open_conversations(
    prompts: list[dict[str, Any]],
    chat: ChatFormat,
    max_prompt_tokens: int,
    skip_bad: bool = False,
    left_out: Counter[str] | None = None,
) -> list[Conversation]:
    """The prompts that fit, as ids up to their first answer; `left_out` counts the others by reason.

    A prompt that the chat template refuses is a `DataError` that names it, or counted with `skip_bad`.
    """
    opened = []
    left_out = Counter() if left_out is None else left_out
    for prompt in prompts:
        users = [m["content"] for m in prompt["messages"] if m["role"] == "user"]
        system = next((m["content"] for m in prompt["messages"] if m["role"] == "system"), None)
        try:
            ids = chat.first_turn(users[0], system, prompt.get("tools"))
        except DataError as error:
            if not skip_bad:
                raise DataError(f"prompt {prompt['id']!r}: {error}; mend it or pass --prompts.skip-bad") from None
            left_out["refused by the chat template"] += 1
            continue
        if len(ids) > max_prompt_tokens:
            left_out["longer than regenerate.max_prompt_tokens"] += 1
            continue
        opened.append(Conversation(prompt, users[1:], ids))
    return opened


def longest_prompt(settings: RegenerateRecipe, context: int | None) -> int:
    """Tokens that a prompt may have: one of the context is left for the answer."""
    return min(settings.max_prompt_tokens, context - 1) if context else settings.max_prompt_tokens


def answer(
    conversations: list[Conversation],
    target: Target,
    chat: ChatFormat,
    settings: RegenerateRecipe,
    sampling: Sampling,
    seed: int,
    max_tokens: int | None = None,
) -> Iterator[tuple[int, Completion | None]]:
    """Let the target write every turn; yields (tokens written, a finished row if there is one).

    Once `max_tokens` are written no turn is begun: what is being written is finished, a conversation that waits for its
    next answer ends with the last one, and one without any answer yields nothing.
    """
    turn = written = 0
    while conversations:
        following = []
        waiting = dict(enumerate(conversations))
        for index, generation in target.generate(
            [list(conversation.ids) for conversation in conversations],
            sampling,
            settings.max_new_tokens,
            chat.stop,
            int(digest(seed, turn), 16) % 2**63,
            settings.stop_loops,
            **({} if max_tokens is None else {"max_tokens": max(0, max_tokens - written)}),
        ):
            conversation = waiting.pop(index)
            written += len(generation.ids)
            yield len(generation.ids), None
            if conversation.extend(generation, chat, settings.max_prompt_tokens):
                following.append(conversation)
            else:
                yield from ((0, row) for row in conversation.rows(sampling))
        for conversation in waiting.values():
            if conversation.spans or conversation.documents:
                yield from ((0, row) for row in conversation.rows(sampling))
        conversations = following
        turn += 1


class Tally:
    """What a regeneration made: becomes summary.json and, for what this process wrote itself, timing.json."""

    def __init__(self) -> None:
        self.tokens = self.written = 0
        self.left_out: Counter[str] = Counter()
        self.started = time.monotonic()
        self._empty = 0
        self._finish_reasons = dict.fromkeys(("eos", "stop", "length", "loop"), 0)
        self._by_category: Counter[str] = Counter()

    def add(self, row: Completion) -> None:
        size = sum(end - start for start, end in row["spans"])
        self.tokens += size
        self._by_category[row["category"]] += size
        self._finish_reasons[row["finish_reason"]] += 1
        self._empty += not row["spans"]

    def finish(self, out: Path) -> dict[str, Any]:
        """Write the files; returns the summary. No loss token at all is a `DataError`."""
        if not self.tokens:
            raise DataError(
                "regenerate: the completions hold no loss tokens; check target.template (does a stop text come at "
                "once?)"
            )
        summary = {
            "completion_tokens": self.tokens,
            "completions": sum(self._finish_reasons.values()),
            "finish_reasons": self._finish_reasons,
            "empty": self._empty,
            "prompts_too_long": self.left_out["longer than regenerate.max_prompt_tokens"],
            "prompts_refused": self.left_out["refused by the chat template"],
            "tokens_by_category": dict(sorted(self._by_category.items())),
        }
        write_json(out / "summary.json", summary)
        if self.written:
            seconds = time.monotonic() - self.started
            timing = {
                "completion_tokens": self.written,
                "seconds": seconds,
                "tokens_per_s": self.written / seconds,
            }
            write_json(out / "timing.json", timing)
        say(
            f"regenerate: {self.tokens:,} completion tokens in {summary['completions']:,} completions "
            f"({', '.join(f'{n} {r}' for r, n in self._finish_reasons.items() if n)}; {self._empty} empty, "
            f"{summary['prompts_too_long']} prompts too long, {summary['prompts_refused']} refused by the template)"
        )
        return summary


def regenerate(recipe: Recipe, target: Target, chat: ChatFormat, prompts_file: Path, out: Path) -> dict[str, Any]:
    """Stage `regenerate`: one file per shard of prompts, each written whole; finished shards are never redone.

    The shard in which `max_tokens` is reached ends there, within one batch. As that depends on `max_tokens`, it is
    written again where a run goes on with another one: an interrupted or continued run ends with the files of one that
    ran through.
    """
    settings = recipe.regenerate
    prompts = list(read_jsonl(prompts_file))
    out.mkdir(parents=True, exist_ok=True)
    shards = [prompts[i : i + settings.shard_prompts] for i in range(0, len(prompts), settings.shard_prompts)]
    total, tally = settings.max_tokens, Tally()
    longest = longest_prompt(settings, getattr(target.identity, "max_position_embeddings", None))
    with Meter("regenerate", total or len(prompts), "tokens" if total else "prompts") as meter:
        for number, shard in enumerate(shards):
            path = out / f"{number:05d}.jsonl"
            unused = path.with_suffix(".unused")
            left = total - tally.tokens if total else None
            if left is not None and left <= 0:  # of an earlier run that wanted more: kept, but read by no stage
                if path.exists():
                    path.replace(unused)
                continue
            if unused.exists():
                unused.replace(path)
            opened = open_conversations(shard, chat, longest, recipe.prompts.skip_bad, tally.left_out)
            rows = list(read_jsonl(path)) if path.exists() else []
            tokens = sum(len(loss_tokens(row)) for row in rows)
            if sum(row["document"] == 0 for row in rows) == len(opened) and (left is None or tokens < left):
                meter.resume(meter.done + (tokens if total else len(shard)))
            else:
                sampling, seed = shard_sampling(settings, number), int(digest(recipe.seed, number), 16)
                rows = []
                for new_tokens, row in answer(opened, target, chat, settings, sampling, seed, left):
                    tally.written += new_tokens
                    if row:
                        rows.append(row)
                    answered = row is not None and row["document"] == 0
                    meter.advance(new_tokens if total else int(answered), new_tokens)
                rows.sort(key=lambda row: row["id"])
                write_jsonl(path, rows)
            for row in rows:
                tally.add(row)
    return tally.finish(out)
