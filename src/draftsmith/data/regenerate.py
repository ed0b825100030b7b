"""Stage 2: the target answers the prompts; its token ids are kept as they were generated (`Completion`)."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from draftsmith.core import run_files
from draftsmith.core.errors import DataError
from draftsmith.core.files import digest
from draftsmith.core.progress import Meter, say
from draftsmith.core.recipe import Recipe
from draftsmith.core.records.base import write_rows
from draftsmith.core.records.data import Completion, CompletionsSummary, IdentityCheck, Prompt, Timing
from draftsmith.core.tables import by_reason
from draftsmith.data.templates import ChatFormat
from draftsmith.decoding.generation import FinishReason, Generation
from draftsmith.decoding.sampling import Sampling
from draftsmith.targets.base import Target
from draftsmith.targets.identity import require_same_logprobs

PAST_LIMIT = "past regenerate.max_tokens"


def read_completions(directory: Path) -> Iterator[Completion]:
    for path in run_files.shards(directory):
        yield from Completion.read_rows(path)


@dataclass
class Conversation:
    """A prompt being answered: ids so far, where the target wrote, user turns still to come.

    Where the history that is rendered for the next turn does not go on from what stands (reasoning dropped, another end
    token, text that is tokenised otherwise), a new document begins; `documents` are those that ended.
    """

    prompt: Prompt
    users: list[str]
    ids: list[int]
    spans: list[tuple[int, int]] = field(default_factory=list)
    last: Generation | None = None
    """The answer after which no other comes."""
    finish_reason: FinishReason | Literal[""] = ""
    documents: list[tuple[list[int], list[tuple[int, int]]]] = field(default_factory=list)
    turns_left_out: dict[str, int] = field(default_factory=dict)
    """User turns that cannot be asked, by reason."""

    def extend(self, generation: Generation, chat: ChatFormat, max_prompt_tokens: int) -> list[int] | None:
        """Add an answer; the ids before the next one, None where no other user turn follows."""
        asked, start = self.ids, len(self.ids)
        self.ids = [*asked, *generation.ids]
        self.finish_reason = generation.finish_reason
        if generation.ids:
            self.spans.append((start, len(self.ids)))
        self.last = generation
        if not self.users:
            return None
        if generation.finish_reason not in ("eos", "stop"):
            self.turns_left_out = {"after an answer that was cut off": len(self.users)}
            return None
        following = chat.next_turn(asked, generation, self.users[0], max_prompt_tokens)
        if isinstance(following, str):  # what was answered before it stands
            self.turns_left_out = {following: len(self.users)}
            return None
        del self.users[0]
        if self.spans and following[: len(self.ids)] != self.ids:
            self.documents.append(self._document())
            self.spans = []
        self.ids, self.last = following, None
        return following

    def _document(self) -> tuple[list[int], list[tuple[int, int]]]:
        """What stands; a user turn that nobody answered is left out."""
        end = self.spans[-1][1] if self.spans else None
        return self.ids[:end], self.spans

    def rows(self, sampling: Sampling) -> list[Completion]:
        """One row for each document."""
        documents = list(self.documents)
        if self.spans or not documents:
            documents.append(self._document())
        name = self.prompt.id
        waiting = {PAST_LIMIT: 1 + len(self.users)} if self.last is None else {}
        return [
            Completion(
                id=f"{name}#{number}" if number else name,
                category=self.prompt.category,
                source=self.prompt.source,
                ids=ids,
                spans=spans,
                finish_reason=self.finish_reason if number == len(documents) - 1 else "eos",
                sampling=(sampling.temperature, sampling.top_p, sampling.top_k),
                document=number,
                turns_left_out=(self.turns_left_out or waiting) if number == len(documents) - 1 else {},
            )
            for number, (ids, spans) in enumerate(documents)
        ]


def open_conversations(
    prompts: Iterable[Prompt],
    chat: ChatFormat,
    max_prompt_tokens: int,
    skip_bad: bool = False,
    left_out: Counter[str] | None = None,
) -> Iterator[Conversation]:
    """The prompts that fit, as ids up to their first answer; `left_out` counts the others by reason.

    A prompt that the chat template refuses is a `DataError` that names it, or counted with `skip_bad`.
    """
    left_out = Counter() if left_out is None else left_out
    for prompt in prompts:
        users = prompt.users
        try:
            ids = chat.first_turn(users[0], prompt.system, prompt.tools or None)
        except DataError as error:
            if not skip_bad:
                raise DataError(f"prompt {prompt.id!r}: {error}; mend it or pass --prompts.skip-bad") from None
            left_out["refused by the chat template"] += 1
            continue
        if len(ids) > max_prompt_tokens:
            left_out["longer than regenerate.max_prompt_tokens"] += 1
            continue
        yield Conversation(prompt, users[1:], ids)


def longest_prompt(recipe: Recipe, target: Target, answer: int) -> int:
    """Tokens that a prompt may have. In this process an answer is cut where the target's context ends; servers refuse
    what has no room for an answer of `answer` tokens."""
    context = target.identity.max_position_embeddings
    served = min(context, recipe.serve.context or context)
    room = served - answer if target.independent else context - 1
    if room < 1:
        raise DataError(
            f"max_new_tokens: answers of {answer} tokens leave no room for a prompt in the {served} that servers take; "
            "give fewer, or a larger serve.context where the target has it"
        )
    return min(recipe.regenerate.max_prompt_tokens, room)


def _prompt_of(row: Completion) -> str:
    return row.id.rsplit("#", 1)[0] if row.document else row.id


def loss_tokens(rows: Iterable[Completion]) -> int:
    return sum(len(row.loss_tokens) for row in rows)


def summarise(completions: Iterable[Completion], left_out: Counter[str]) -> CompletionsSummary:
    """What was written, and told; no completion, or no loss token at all, is a `DataError`."""
    reasons = dict.fromkeys(("eos", "stop", "length", "loop"), 0)
    greedy_tokens = 0
    by_category: Counter[str] = Counter()
    turns: Counter[str] = Counter()
    empty = 0
    for row in completions:
        reasons[row.finish_reason] += 1
        by_category[row.category] += len(row.loss_tokens)
        empty += not row.spans
        greedy_tokens += len(row.loss_tokens) if row.sampling[0] == 0 else 0
        turns.update(row.turns_left_out)
    if not any(reasons.values()):
        raise DataError(
            f"regenerate: no prompt can be asked ({by_reason(left_out)}); raise regenerate.max_prompt_tokens where the "
            "target's context allows it, or give other prompts.sources"
        )
    if not by_category.total():
        raise DataError(
            "regenerate: the completions hold no loss tokens; check target.template (does a stop text come at once?)"
        )
    summary = CompletionsSummary(
        completion_tokens=by_category.total(),
        completions=sum(reasons.values()),
        finish_reasons=reasons,
        empty=empty,
        prompts_too_long=left_out["longer than regenerate.max_prompt_tokens"],
        prompts_refused=left_out["refused by the chat template"],
        tokens_by_category=dict(sorted(by_category.items())),
        turns_left_out=dict(turns),
        greedy_tokens=greedy_tokens,
    )
    ends = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    say(
        f"regenerate: {summary.completion_tokens:,} completion tokens in {summary.completions:,} completions ({ends}; "
        f"{greedy_tokens / summary.completion_tokens:.0%} of the tokens greedily, {empty} empty, "
        f"{summary.prompts_too_long} prompts too long, {summary.prompts_refused} refused by the template)"
        + (f"; {turns.total():,} later user turns were not asked: {by_reason(turns)}" if turns else "")
    )
    return summary


class Regeneration:
    """All prompts answered, in one file per shard of prompts.

    In process an answer depends on those decoded beside it, so a shard is decoded and written whole, and redone where
    it was interrupted: a run that was killed ends with the files of one that ran through. Servers' answers do not, so
    there as many conversations run at once as the replicas take, and each is kept the moment it ends.
    """

    def __init__(self, recipe: Recipe, target: Target, chat: ChatFormat, prompts_file: Path, out: Path):
        self.recipe, self.settings, self.target, self.chat, self.out = recipe, recipe.regenerate, target, chat, out
        out.mkdir(parents=True, exist_ok=True)
        self.prompts = list(Prompt.read_rows(prompts_file))
        self.longest = longest_prompt(recipe, target, self.settings.max_new_tokens)
        if self.longest < self.settings.max_prompt_tokens:
            say(f"regenerate: prompts may have {self.longest:,} tokens, as an answer needs room")
        self.total, self.written = self.settings.max_tokens, 0
        self.sampling = Sampling(self.settings.temperature, self.settings.top_p, self.settings.top_k)
        self.left_out: Counter[str] = Counter()
        self.meter = Meter("regenerate", self.total or len(self.prompts), "tokens" if self.total else "prompts")

    def run(self) -> CompletionsSummary:
        size = self.settings.shard_prompts
        starts = range(0, len(self.prompts), size)
        shards = {self.out / f"{n:05d}.jsonl": self.prompts[at : at + size] for n, at in enumerate(starts)}
        with self.meter:
            if self.target.independent:
                self._prompt_by_prompt(shards)
            else:
                self._keep_identity()
                self._shard_by_shard(shards)
        summary = summarise(read_completions(self.out), self.left_out)
        summary.save(self.out / run_files.SUMMARY)
        if self.written:
            seconds = self.meter.seconds
            timing = Timing(completion_tokens=self.written, seconds=seconds, tokens_per_s=self.written / seconds)
            timing.save(self.out / run_files.TIMING)
        return summary

    def _sampling(self, prompt: Prompt) -> Sampling:
        """Greedy ones are chosen by their names, so that any few prompts hold the share."""
        settings = self.settings
        greedy = int(digest(self.recipe.seed, "greedy", prompt.id), 16) < settings.greedy_share * 2**64
        return Sampling() if greedy else self.sampling

    def _rows(self, conversation: Conversation) -> list[Completion]:
        return conversation.rows(self._sampling(conversation.prompt))

    def _open(self, prompts: Iterable[Prompt]) -> Iterator[Conversation]:
        return open_conversations(prompts, self.chat, self.longest, self.recipe.prompts.skip_bad, self.left_out)

    def _resume(self, rows: list[Completion]) -> None:
        """Rows of an earlier process count as done, but not towards the rate."""
        done = loss_tokens(rows) if self.total else sum(row.document == 0 for row in rows)
        self.meter.resume(self.meter.done + done)

    def _answer(self, opened: Iterable[Conversation], seed: int, left: int | None) -> Iterator[list[Completion]]:
        """The rows of every conversation, as soon as it ends.

        Once `left` tokens are written no turn is begun: what is being written is finished, a conversation that waits
        for its next answer ends with the last one, and one without any answer yields nothing.
        """
        conversations: dict[int, Conversation] = {}

        def asked() -> Iterator[list[int]]:
            for number, conversation in enumerate(opened):
                conversations[number] = conversation
                yield conversation.ids

        for number, answer in self.target.generate(
            asked(),
            self.sampling,
            self.settings.max_new_tokens,
            self.chat.stop,
            seed,
            self.settings.stop_loops,
            left,
            lambda number, answer: conversations[number].extend(answer, self.chat, self.longest),
            written=lambda tokens: self.meter.advance(tokens if self.total else 0, tokens),
            greedily=lambda number: self._sampling(conversations[number].prompt).greedy,
        ):
            self.written += len(answer.ids)
            if conversations[number].last is answer:
                self.meter.advance(0 if self.total else 1)
                yield self._rows(conversations.pop(number))
        yield from map(self._rows, (c for c in conversations.values() if c.spans or c.documents))

    def _shard_by_shard(self, shards: dict[Path, list[Prompt]]) -> None:
        """The shard in which `max_tokens` is reached ends there, within one batch. As that depends on `max_tokens`, it
        is written again where a run goes on with another one."""
        written = 0
        for number, (path, prompts) in enumerate(shards.items()):
            unused = path.with_suffix(".unused")
            left = self.total - written if self.total else None
            if left is not None and left <= 0:  # of an earlier run that wanted more: kept, but read by no stage
                if path.exists():
                    path.replace(unused)
                continue
            if unused.exists():
                unused.replace(path)
            opened = list(self._open(prompts))
            rows = Completion.whole_rows(path)
            complete = sum(row.document == 0 for row in rows) == len(opened)
            complete = complete and not any(PAST_LIMIT in row.turns_left_out for row in rows)
            if complete and (left is None or loss_tokens(rows) < left):
                self._resume(rows)
            else:
                seed = int(digest(int(digest(self.recipe.seed, number), 16), 0), 16) % 2**63
                rows = list(itertools.chain(*self._answer(opened, seed, left)))
                rows.sort(key=lambda row: row.id)
                write_rows(path, rows)
            written += loss_tokens(rows)

    def _prompt_by_prompt(self, shards: dict[Path, list[Prompt]]) -> None:
        """The files are sorted in the end, so that they do not depend on who answered first."""
        place = {prompt.id: path for path, prompts in shards.items() for prompt in prompts}
        done: set[str] = set()
        ended: set[str] = set()  # by an earlier limit, before their last turn
        tokens = 0
        for path in shards:
            held = Completion.whole_rows(path)
            done |= {row.id for row in held if row.document == 0}  # written last, so that the others are there
            ended |= {_prompt_of(row) for row in held if PAST_LIMIT in row.turns_left_out}
            tokens += loss_tokens(row for row in held if _prompt_of(row) in done)
        if self.total is None or tokens < self.total:  # a higher limit now: they are asked anew, with all their turns
            done -= ended
        left = self.total
        for path in filter(Path.exists, shards):
            held = list(Completion.read_rows(path))
            rows = [row for row in held if _prompt_of(row) in done]
            if len(rows) < len(held):
                write_rows(path, rows)
            self._resume(rows)
            left = None if left is None else left - loss_tokens(rows)
        waiting = self._open(prompt for prompt in self.prompts if prompt.id not in done)
        for rows in self._answer(waiting, self.recipe.seed, left):
            self._keep_identity()
            # the first row last, as it says that all are there
            content = b"".join(row.line() for row in reversed(rows))
            with place[rows[0].id].open("ab") as file:
                file.write(content)  # at once
        for path in shards:
            if path.exists():
                kept = sorted(Completion.read_rows(path), key=lambda row: row.id)
                write_rows(path, kept)

    def _keep_identity(self) -> None:
        """Who writes the completions is who they are trained with."""
        path = self.out / run_files.IDENTITY
        if not path.exists():
            target, logprobs = self.target, self.target.identity_logprobs
            require_same_logprobs(logprobs, logprobs, f"target.model: {target.identity.model}")  # they are numbers
            IdentityCheck(target=target.identity, weights_hash=target.weights_hash, logprobs=logprobs).save(path)
