"""Stage 6: measure the exported draft by decoding with it, on whatever engine; writes results.json.

Sessions are opened one at a time, the target alone first: servers take the whole machine. In this process both lie side
by side and take turns. What is measured is kept in parts/, so that an interruption loses one measurement.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from draftsmith.core import run_files
from draftsmith.core.errors import DataError, TargetError
from draftsmith.core.files import digest
from draftsmith.core.history import draft_digest
from draftsmith.core.progress import Meter, say
from draftsmith.core.records.base import Record
from draftsmith.core.records.data import EvaluationPrompts, Prompt
from draftsmith.core.records.evaluation import (
    Acceptance,
    Difference,
    EvaluationSettings,
    Lossless,
    MeasuredSet,
    PlainReference,
    Profile,
    Results,
    Speed,
    TimedGroup,
)
from draftsmith.core.records.run import Provenance
from draftsmith.core.shape import DraftSampling, Shape
from draftsmith.data.regenerate import longest_prompt
from draftsmith.data.templates import ChatFormat
from draftsmith.decoding.generation import Generation
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.stopping import Ends, loop_onset
from draftsmith.drafts.directories import ready_draft
from draftsmith.engines.base import Engine, Setup
from draftsmith.engines.embedded import exact
from draftsmith.evaluation.acceptance import bootstrap_tau, conversations, count, oracle_walk, summarise, tau_line
from draftsmith.evaluation.asking import Question, balanced, complete, opened, time_group
from draftsmith.evaluation.draft_sampling import taking, ways
from draftsmith.evaluation.lossless import difference, first_difference, lossless_verdict, together
from draftsmith.evaluation.profile import accept_profile
from draftsmith.targets.base import Target

R = TypeVar("R", bound=Record)

SHORTEST_TIMED = 8  # tokens
PROFILE_PROMPTS = 48
# A temperature below may well draw a greedy text; above it, so much of one is no draw.
SURELY_DRAWS, SURELY_GREEDY = 0.5, 0.8
SAMPLED_PROMPTS, SAMPLED_TOKENS = 4, 24
NO_TEMPERATURE = "evaluate.temperatures: none that this server draws at; add 0.0"


class Evaluation:
    """One draft on one engine. `out`: where results.json, its parts and the engine's logs go."""

    def __init__(
        self, engine: Engine, setup: Setup, prompts_file: Path, out: Path, sets: Sequence[EvaluationPrompts] = ()
    ):
        self.sets = {found.name: found for found in sets}
        self.told: set[str] = set()  # lines about prompts, said once for all sessions
        self.left_out: set[float] = set()  # temperatures at which the engine draws nothing
        self.engine, self.setup, self.out = engine, setup, out
        self.recipe, self.settings = setup.recipe, setup.recipe.evaluate
        self.available = list(Prompt.read_rows(prompts_file))
        self.shapes = engine.draftable(self.settings.shapes, setup)
        self.batches = (1,) if engine.in_process else self.settings.batches
        if left_out := [batch for batch in self.settings.batches if batch not in self.batches]:
            say(f"evaluate.batches: {left_out} left out; this process decodes one text at a time")

    def once(self, name: str, kind: type[R], measure: Callable[[], R | None]) -> R | None:
        """The measurement, from `parts/` if it was made before; None where there was nothing to measure."""
        path = self.out / "parts" / f"{name.replace('/', '-')}.json"
        if path.exists():
            return kind.load(path)
        if (result := measure()) is not None:
            result.save(path)
        return result

    def questions(self, session: Target) -> list[Question]:
        """The run's own evaluation prompts."""
        longest = longest_prompt(self.recipe, session, max(self.settings.max_new_tokens, self.settings.lossless_tokens))
        self.chat = ChatFormat.of(self.recipe, session)
        chosen, skip_bad = balanced(self.available, self.settings.prompts), self.recipe.prompts.skip_bad
        questions = opened("", chosen, self.chat, longest, skip_bad, self.told)
        if not questions:
            raise DataError(
                f"evaluate: no evaluation prompt fits into {longest} tokens; raise regenerate.max_prompt_tokens where "
                "the target's context allows it, or give other prompts.evaluation"
            )
        return questions

    def asked(self, session: Target) -> dict[str, list[Question]]:
        """The run's own prompts under "", and the named sets as far as they fit into the target's window."""
        every = {"": self.questions(session)}
        window = session.identity.max_position_embeddings
        served = window if self.engine.in_process else min(window, self.recipe.serve.context or window)
        longest = served - self.settings.max_new_tokens
        for chosen in self.settings.sets if self.sets else ():
            prompts = balanced(self.sets[chosen.name].prompts, chosen.limit or self.settings.prompts)
            every[chosen.name] = opened(chosen.name, prompts, self.chat, longest, True, self.told)
        return {name: questions for name, questions in every.items() if questions}

    def measured_sets(self, asked: dict[str, list[Question]], found: dict[str, list[Acceptance]]) -> list[MeasuredSet]:
        return [
            MeasuredSet(
                **told.model_dump(include={"name", "source", "licence", "trained_on"}),
                digest=digest([prompt.messages for prompt in told.prompts]),
                prompts=len(asked[name]),
                prompts_available=len(told.prompts),
                acceptance=found[name],
            )
            for name, told in self.sets.items()
            if name in asked
        ]

    def run(self, created_with: Provenance) -> Results:
        settings, engine, setup = self.settings, self.engine, self.setup
        found: dict[str, list[Acceptance]] = defaultdict(list)
        speed: list[Speed] = []
        proofs: list[Lossless] = []
        alone_known = engine.in_process or (settings.url is not None and settings.plain_url is None)
        plain = None if alone_known else self.once("plain", PlainReference, self._plain)
        for shape, drafts, first in self.ways():
            with engine.open(taking(setup, drafts), shape, settings.url) as drafted:
                asked = self.asked(drafted)
                questions = asked[""]
                for name, entry in self.acceptances(drafted, asked, shape, drafts, first):
                    found[name].append(entry)
                if not first:
                    continue
                speed += self._speeds(drafted.one, questions, shape, plain)
                if plain is not None:
                    proof = partial(self._identity, drafted, questions, shape, plain.outputs)
                    proofs += filter(None, [self.once(f"lossless-{shape}", Lossless, proof)])
        if not found:
            raise DataError(NO_TEMPERATURE)
        profile = sampled_profile = None
        if engine.in_process:
            profile = self.once("profile", Profile, partial(self.profile, questions))
            if hottest := max(settings.temperatures):
                measure = partial(self.profile, questions, hottest)
                sampled_profile = self.once(f"profile-T{hottest:g}", Profile, measure)
        lossless = self.once("lossless", Lossless, self._proof) if engine.in_process else together(proofs)
        say(str(lossless_verdict(lossless)))
        results = Results(
            created_with=created_with,
            settings=self._told_settings(questions, drafted.identity.max_position_embeddings),
            acceptance=found[""],
            left_out=sorted(self.left_out),
            lossless=lossless,
            speed=speed,
            profile=profile,
            sampled_profile=sampled_profile,
            sets=self.measured_sets(asked, found),
        )
        results.save(self.out / run_files.RESULTS)
        return results

    def _told_settings(self, questions: list[Question], window: int) -> EvaluationSettings:
        together = None if self.settings.url else self.recipe.serve.tensor_parallel
        return EvaluationSettings(
            engine=self.engine.name,
            draft=draft_digest(self.setup.draft),
            prompts=len(questions),
            prompts_available=len(self.available),
            **self.settings.model_dump(include={"max_new_tokens", "top_p", "top_k"}),
            target=self.recipe.target.model,
            dtype=self.recipe.target.dtype,
            threads=torch.get_num_threads() if self.engine.in_process else None,
            window=window,
            speed_gpus=1 if self.engine.in_process else together,
        )

    # --- accept length --------------------------------------------------------------------------------------------

    def ways(self) -> Iterator[tuple[Shape, DraftSampling, bool]]:
        """(shape, how its drafts are taken, whether that is the first way) of every session there is to open."""
        for shape in self.shapes:
            for number, drafts in enumerate(ways(self.engine, self.setup, shape)):
                yield shape, drafts, number == 0

    def acceptances(
        self, session: Target, asked: dict[str, list[Question]], shape: Shape, drafts: DraftSampling, first: bool
    ) -> Iterator[tuple[str, Acceptance]]:
        """Of every set at every temperature at which the session draws; greedy texts do not depend on how drafts are
        taken, so only the first way measures them."""
        for temperature in self.settings.temperatures:
            if not (temperature or first):
                continue
            if temperature and not self.draws(session, asked[""], temperature):
                self.left_out.add(temperature)
                continue
            for name, questions in asked.items():
                yield name, self.accepted(session, name, questions, shape, temperature, drafts)

    def sampling(self, temperature: float) -> Sampling:
        return Sampling(temperature, self.settings.top_p, self.settings.top_k) if temperature else Sampling()

    def accepted(
        self, session: Target, name: str, questions: list[Question], shape: Shape, temperature: float,
        drafts: DraftSampling,
    ) -> Acceptance:  # fmt: skip
        """Of a named set, or of the run's own prompts (no name)."""
        sampled = drafts == "sampled" and temperature > 0  # at temperature 0 a draw is the first choice
        measure = partial(self._acceptance, session, questions, shape, temperature, "sampled" if sampled else "greedy")
        part = f"tau-{shape}-T{temperature:g}{'-sampled' if sampled else ''}"
        if name:  # sets come and go in a recipe, and what was measured of others stands
            part = f"{name}-{digest([[q.ids, q.users] for q in questions])[:8]}-{part}"
        entry = self.once(part, Acceptance, measure)
        assert entry is not None, "there are questions"
        say(f"{f'{name}: ' if name else ''}{tau_line(entry)}")
        return entry

    def _acceptance(
        self, session: Target, questions: list[Question], shape: Shape, temperature: float, drafts: DraftSampling
    ) -> Acceptance:
        """All turns of all questions; those that cannot be asked are counted."""
        left_out: Counter[str] = Counter()
        asked: list[Question] = []
        answers: list[Generation] = []
        turn = questions
        while turn:
            told = self._answers(session, turn, f"tau {shape} T={temperature:g}", temperature)
            self._require_told(told, shape)
            asked, answers = asked + turn, answers + told
            following = [q.after(answer, self.chat, left_out) for q, answer in zip(turn, told, strict=True)]
            turn = [question for question in following if question is not None]
        pairs = zip(asked, answers, strict=True)
        rows = conversations([count(q.id, q.category, a, shape.steps, len(q.ids)) for q, a in pairs])
        counted = {"turns": len(asked), "turns_left_out": dict(left_out)}
        entry = summarise(rows, shape, temperature, drafts).model_copy(update=counted)
        known = self.engine.in_process and temperature > 0  # a server does not tell its first choices
        return self._with_oracle(entry, asked, answers) if known and (shape.topk, drafts) == (1, "greedy") else entry

    def _answers(self, session: Target, turn: list[Question], what: str, temperature: float) -> list[Generation]:
        length, stop = self.settings.max_new_tokens, self.chat.stop
        # An engine may tell nothing of completions that a stop text ends: there it is looked for afterwards.
        asked_stop = stop if self.engine.tells_of_stopped else ()
        sampling, seed = self.sampling(temperature), self.recipe.seed
        answers = complete(session, turn, what, sampling, length, None, asked_stop, seed)
        if self.engine.tells_of_stopped:
            return answers
        ends = Ends(frozenset(), session.tokenizer, stop)
        cut = [(answer, *ends.of_answer(answer.ids, answer.finish_reason)) for answer in answers]
        return [
            answer if len(ids) == len(answer.ids) else replace(answer, ids=ids, finish_reason=reason)
            for answer, ids, reason in cut
        ]

    def _require_told(self, answers: list[Generation], shape: Shape) -> None:
        """A server that drafts another shape, or none, is an error."""
        deepest = max((max(answer.verified, default=0) for answer in answers), default=0)
        if deepest > shape.steps:
            raise TargetError(
                f"evaluate.shapes: {shape} given, but the server accepted {deepest} draft tokens in one step; name the "
                "shape that it was started with"
            )
        silent = sum(not answer.verified for answer in answers if len(answer.ids) > 1)
        if silent:
            raise TargetError(
                f"evaluate.url: the server tells nothing of drafting for {silent} of {len(answers)} completions; "
                "start it with a draft" + (f" and {self.engine.tells_with}" if self.engine.tells_with else "")
            )

    @torch.inference_mode()
    def _with_oracle(self, entry: Acceptance, questions: list[Question], answers: list[Generation]) -> Acceptance:
        target, walks = self.setup.target, []
        assert target is not None, "of a target in this process"
        for question, answer in zip(questions, answers, strict=True):
            last_TH = target.capture([[*question.ids, *answer.ids]], ()).last_TH[len(question.ids) - 1 : -1]
            hits = (target.logits(last_TH).argmax(-1).cpu() == torch.tensor(answer.ids)).tolist()
            onset = loop_onset(answer.ids)
            walks.append(oracle_walk(hits, entry.shape.steps, len(answer.ids) if onset is None else onset))
        oracle = bootstrap_tau([accepted for accepted, _ in walks], [steps for _, steps in walks])
        own, best = entry.all.tau, oracle.tau
        share = (own - 1) / (best - 1) if own and best and best > 1 else None
        return entry.model_copy(update={"oracle": oracle, "share_of_oracle": share})

    def draws(self, session: Target, questions: list[Question], temperature: float) -> bool:
        """Whether a drafting server draws beyond the first token, which comes from the prompt's own forward.

        Where it does not, what follows that token is its greedy text (but for ties that round otherwise).
        """
        if self.engine.always_draws or temperature < SURELY_DRAWS or self.settings.top_k == 1:
            return True
        chosen = questions[:SAMPLED_PROMPTS]
        sampling = self.sampling(temperature)
        drawn = [a.ids for a in complete(session, chosen, "draws", sampling, SAMPLED_TOKENS, len(chosen))]
        begun = [replace(q, ids=[*q.ids, *ids[:1]]) for q, ids in zip(chosen, drawn, strict=True)]
        greedy = [a.ids for a in complete(session, begun, "greedy", Sampling(), SAMPLED_TOKENS - 1, len(begun))]
        alike = total = 0
        for d, g in zip((ids[1:] for ids in drawn), greedy, strict=True):
            at = first_difference(d, g)
            alike, total = alike + (len(d) if at is None else at), total + len(d)
        if total and alike >= SURELY_GREEDY * total:
            say(
                f"evaluate: T={temperature:g} left out; the server drafts greedily at any temperature, as "
                f"{self.engine.title} does where it lacks its sampling kernel (on CPUs)"
            )
            return False
        return True

    def profile(self, questions: list[Question], temperature: float = 0.0) -> Profile | None:
        target = self.setup.target
        assert target is not None, "of a target in this process"
        ready = ready_draft(target, self.setup.draft, self.setup.reading)
        prompts = [question.ids for question in questions[:PROFILE_PROMPTS]]
        length, stop = self.settings.max_new_tokens, self.chat.stop
        return accept_profile(target, ready, prompts, length, stop, self.sampling(temperature), self.recipe.seed)

    # --- losslessness ---------------------------------------------------------------------------------------------

    def _plain(self) -> PlainReference:
        """One request at a time, as other batches round differently; seconds by requests at once."""
        settings = self.settings
        with self.engine.open(self.setup, None, settings.plain_url) as alone:
            questions = self.questions(alone)
            chosen = questions[: settings.lossless_prompts]
            outputs = complete(alone, chosen, "lossless, plain", Sampling(), settings.lossless_tokens, 1)
            timed = {batch: self._timed([alone.one], questions, batch, "plain")[0] for batch in self.batches}
        return PlainReference(outputs=[answer.ids for answer in outputs], timed=timed)

    def _identity(
        self, session: Target, questions: list[Question], shape: Shape, reference: list[list[int]],
        alone: Target | None = None,
    ) -> Lossless:  # fmt: skip
        """Greedy outputs against the target's own; end tokens apply, stop texts do not.

        `alone`: decodes a prompt again plainly and by itself where its reference was made in a batch, and that is what
        counts.
        """
        length, chosen = self.settings.lossless_tokens, questions[: self.settings.lossless_prompts]
        answers = complete(session, chosen, f"lossless {shape}", Sampling(), length, 1)
        differences: list[Difference] = []
        for question, plain, answer in zip(chosen, reference, answers, strict=True):
            if alone is not None and plain != answer.ids:
                plain = next(alone.generate([question.ids], Sampling(), length, at_once=1))[1].ids
            differences += filter(None, [difference(session, question.id, shape, question.ids, plain, answer.ids)])
        return Lossless(
            dtype=session.identity.dtype,
            prompts=len(chosen),
            tokens_per_prompt=length,
            tokens=sum(map(len, reference)),
            shapes=(shape,),
            differences=differences,
        )

    def _proof(self) -> Lossless | None:
        """In this process: all shapes in fp32, against plain decoding of all prompts as one batch."""
        proofs = []
        with exact(self.setup) as setup:
            if setup is None:
                return None
            with self.engine.open(setup, None) as alone:
                questions = self.questions(alone)
                chosen, length = questions[: self.settings.lossless_prompts], self.settings.lossless_tokens
                outputs = [a.ids for a in complete(alone, chosen, "lossless, plain", Sampling(), length, None)]
                for shape in self.shapes:
                    with self.engine.open(setup, shape) as drafted:
                        proofs.append(self._identity(drafted, questions, shape, outputs, alone))
        return together(proofs)

    # --- speed ----------------------------------------------------------------------------------------------------

    def _timed(
        self, sessions: Sequence[Target], questions: list[Question], batch: int, what: str
    ) -> list[list[TimedGroup]]:
        """Groups of `batch` prompts for each of the sessions, which take turns; none if there are too few prompts.

        The prompts are asked for one token before: an engine that caches prefixes then has all of them, so what is
        timed is decoding; one that does not reads them again, with and without the draft.
        """
        chosen = questions[: max(batch, self.settings.speed_prompts // batch * batch)]
        rows: list[list[TimedGroup]] = [[] for _ in sessions]
        if len(chosen) < batch:
            say(f"speed at batch {batch}: left out, there are {len(chosen)} prompts")
            return rows
        for session in sessions:
            complete(session, chosen, f"warm {what}", Sampling(), 1, batch)
            complete(session, chosen[:batch], f"warm {what}", Sampling(), 8, batch)
        with Meter(f"speed {what} at batch {batch}", len(chosen), "prompts") as meter:
            for start in range(0, len(chosen), batch):
                group = [question.ids for question in chosen[start : start + batch]]
                for session, timed in zip(sessions, rows, strict=True):
                    timed.append(time_group(session, group, self.settings.max_new_tokens, self.chat.stop))
                meter.advance(batch, rows[-1][-1].tokens)
        return rows

    def _speeds(
        self, drafted: Target, questions: list[Question], shape: Shape, plain: PlainReference | None
    ) -> list[Speed]:
        found = []
        for batch in self.batches:
            if not (self.engine.in_process if plain is None else plain.timed.get(batch)):
                continue
            measure = partial(self._speed, drafted, questions, shape, batch, plain)
            if entry := self.once(f"speed-{shape}-{batch}", Speed, measure):
                say(
                    f"speed {shape} at batch {batch}: {entry.drafted_tokens_per_s:.1f} tokens/s against "
                    f"{entry.plain_tokens_per_s:.1f} plain, median {entry.speedup:.2f}x"
                )
                found.append(entry)
        return found

    def _speed(
        self, drafted: Target, questions: list[Question], shape: Shape, batch: int, plain: PlainReference | None
    ) -> Speed | None:
        """Tokens per second against the target alone on the same groups of prompts; None where all are too short."""
        if plain is None:
            with self.engine.open(self.setup, None) as alone:
                without, timed = self._timed([alone, drafted], questions, batch, str(shape))
        else:
            without = plain.timed[batch]
            (timed,) = self._timed([drafted], questions, batch, str(shape))
        pairs = [
            (a, b) for a, b in zip(without, timed, strict=True) if min(a.tokens, b.tokens) >= SHORTEST_TIMED * batch
        ]
        if not pairs:
            say(f"speed {shape}: no answer is long enough to be timed")
            return None
        tokens, steps = sum(a.tokens for a, _ in pairs), sum(b.steps for _, b in pairs)
        texts = zip(questions, without, timed, strict=False) if self.engine.in_process else ()
        parted = (difference(drafted, q.id, shape, q.ids, a.outputs[0], b.outputs[0]) for q, a, b in texts)
        return Speed(
            shape=shape,
            batch=batch,
            prompts=len(pairs) * batch,
            tokens=tokens,
            plain_tokens_per_s=tokens / sum(a.seconds for a, _ in pairs),
            drafted_tokens_per_s=sum(b.tokens for _, b in pairs) / sum(b.seconds for _, b in pairs),
            speedup=statistics.median((b.tokens / b.seconds) / (a.tokens / a.seconds) for a, b in pairs),
            tau=1 + sum(b.accepted for _, b in pairs) / steps if steps else None,
            dtype=drafted.identity.dtype,
            differences=list(filter(None, parted)),
        )
