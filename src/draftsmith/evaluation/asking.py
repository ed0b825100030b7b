"""How prompts are asked: as the target reads them, turn by turn, and timed."""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TypeVar

from draftsmith.core.progress import Meter, say
from draftsmith.core.records.data import Completion, Prompt
from draftsmith.core.records.evaluation import TimedGroup
from draftsmith.core.tables import by_reason
from draftsmith.data.regenerate import open_conversations
from draftsmith.data.templates import ChatFormat
from draftsmith.decoding.generation import Generation
from draftsmith.decoding.sampling import Sampling
from draftsmith.evaluation.profile import GREEDY
from draftsmith.targets.base import Target

P = TypeVar("P", Prompt, Completion)


@dataclass(frozen=True)
class Question:
    """An evaluation prompt as the target reads it."""

    id: str
    category: str
    ids: list[int]
    users: list[str] = field(default_factory=list)
    """The user's turns after the next answer."""
    longest: int = 0
    """Tokens that may stand before an answer."""

    def after(self, answer: Generation, chat: ChatFormat, left_out: Counter[str]) -> "Question | None":
        """The next turn, the answer before it as a server's client would send it back; None where there is none, or
        none that can be asked: `left_out` counts those by reason."""
        if not self.users:
            return None
        ids = chat.next_turn(self.ids, answer, self.users[0], self.longest) if answer.ids else "after an empty answer"
        if isinstance(ids, str):
            left_out[ids] += len(self.users)
            return None
        return replace(self, ids=ids, users=self.users[1:])


def balanced(prompts: Sequence[P], limit: int | None) -> list[P]:
    """The first of every category in turn, so that a few are as many of each."""
    queues: dict[str, list[P]] = defaultdict(list)
    for prompt in prompts:
        queues[prompt.category].append(prompt)
    turns = zip_longest(*queues.values())
    return [prompt for turn in turns for prompt in turn if prompt is not None][:limit]


def opened(
    name: str, prompts: Sequence[Prompt], chat: ChatFormat, longest: int, skip_bad: bool, told: set[str]
) -> list[Question]:
    """The prompts of a set (no name: of the run) that can be asked; says what becomes of the others, where that is not
    `told`."""
    left_out: Counter[str] = Counter()
    found = open_conversations(prompts, chat, longest, skip_bad, left_out)
    questions = [Question(c.prompt.id, c.prompt.category, c.ids, c.users, longest) for c in found]
    too_long, why = "regenerate.max_prompt_tokens", by_reason(left_out)
    mend = f"; raise {too_long} where the target's context allows it" if not name and too_long in why else ""
    lacking = f"{name or 'own'}: {len(prompts) - len(questions)} of {len(prompts)} prompts left out"
    line = f"evaluate: {lacking}: {why.replace(too_long, f'{longest} tokens')}{mend}"
    if left_out and line not in told:
        told.add(line)
        say(line)
    return questions


def complete(
    session: Target,
    questions: Sequence[Question],
    what: str,
    sampling: Sampling,
    length: int,
    at_once: int | None,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> list[Generation]:
    """Answers in the questions' order; at most `at_once` of them in flight."""
    answers: dict[int, Generation] = {}
    every = session.generate([q.ids for q in questions], sampling, length, stop, seed, at_once=at_once)
    accepted = steps = 0
    with Meter(what, len(questions), "prompts") as meter:
        for number, answer in every:
            answers[number] = answer
            accepted, steps = accepted + sum(answer.verified), steps + len(answer.verified)
            meter.advance(1, len(answer.ids), f"tau {1 + accepted / steps:.2f}" if steps else "")
    return [answers[number] for number in range(len(questions))]


def time_group(
    session: Target,
    prompts: list[list[int]],
    length: int,
    stop: Sequence[str] = (),
    sampling: Sampling = GREEDY,
    ignore_end: bool = False,
) -> TimedGroup:
    """Answers to prompts that are asked at once. Seconds are those of decoding where the session tells them, which
    leaves out the first token, as it comes from the prompt's own forward."""
    started = time.perf_counter()
    every = session.generate(prompts, sampling, length, stop, at_once=len(prompts), ignore_end=ignore_end)
    answers = [answer for _, answer in sorted(every, key=lambda item: item[0])]
    seconds, tokens = time.perf_counter() - started, sum(len(answer.ids) for answer in answers)
    own = [answer.seconds for answer in answers if answer.seconds is not None]
    if len(own) == len(answers):
        seconds, tokens = sum(own), tokens - len(answers)
    return TimedGroup(
        tokens=tokens,
        seconds=seconds,
        accepted=sum(sum(answer.verified) for answer in answers),
        steps=sum(len(answer.verified) for answer in answers),
        outputs=[answer.ids for answer in answers],
    )
