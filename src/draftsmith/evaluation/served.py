"""Stage 6 on a real engine: the same measurements as `evaluate`, from what vLLM or SGLang tell; same results.json.

tau is 1 + accepted draft tokens / verification steps, as DESIGN.md has it. vLLM tells every step in order, so steps cut
short by the end of a text and looping text are left out exactly as in the embedded engine. SGLang tells a histogram
per request: there whole completions that loop are left out, and steps cut short by the end count.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from draftsmith.data.loops import loop_onset
from draftsmith.data.regenerate import longest_prompt, open_conversations
from draftsmith.data.templates import ChatFormat
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoded, Step
from draftsmith.errors import DataError, ServeError, TargetError
from draftsmith.evaluation.acceptance import PromptAcceptance, count, summarise
from draftsmith.evaluation.evaluate import SCHEMA, SHORTEST_TIMED, balanced, measured_once, tau_line, verdict_line
from draftsmith.evaluation.lossless import first_difference
from draftsmith.files import read_jsonl, write_json
from draftsmith.progress import Meter, say
from draftsmith.recipe import DraftShape, Recipe
from draftsmith.serving.launch import Engine, launch, running
from draftsmith.targets.base import Generation
from draftsmith.targets.endings import first_stop
from draftsmith.targets.ends import resolve_model
from draftsmith.targets.servers import ServedTarget

Prompt = tuple[str, str, list[int]]  # id, category, token ids
# A temperature below may well draw a greedy text; above it, so much of one is no draw.
SURELY_DRAWS, SURELY_GREEDY = 0.5, 0.8
SAMPLED_PROMPTS, SAMPLED_TOKENS = 4, 24


def count_served(name: str, category: str, generation: Generation, depth: int) -> PromptAcceptance:
    """Counts of one completion from what the server told of its verification steps."""
    if generation.in_order:
        steps, root = [], 0
        for accepted in generation.verified:
            steps.append(Step(root, depth, accepted))
            root += accepted + 1
        return count(name, category, Decoded(generation.ids, generation.finish_reason, steps), depth)
    onset = loop_onset(generation.ids)
    size = len(generation.ids)
    row = PromptAcceptance(name, category, size, 0 if onset is None else size - onset)
    row.reached, row.accepted_at = [0] * depth, [0] * depth
    if onset is not None:
        row.looping_steps, row.looping_accepted = len(generation.verified), sum(generation.verified)
        return row
    row.steps, row.accepted = len(generation.verified), sum(generation.verified)
    row.reached = [sum(a >= d for a in generation.verified) for d in range(depth)]
    row.accepted_at = [sum(a > d for a in generation.verified) for d in range(depth)]
    return row


class ServedEvaluation:
    """Servers run one at a time, the target alone first: on GPUs each takes all the memory there is."""

    def __init__(self, recipe: Recipe, engine: Engine, draft: Path, prompts_file: Path, out: Path):
        serve = recipe.serve
        if serve.engine != engine and (serve.program or serve.extra):
            raise ServeError(
                f"serve.program and serve.extra: given for serve.engine {serve.engine}, but {engine} is to be started; "
                f"give --serve.engine {engine} and its own"
            )
        self.recipe, self.settings, self.engine, self.draft, self.out = recipe, recipe.evaluate, engine, draft, out
        self.available = list(read_jsonl(prompts_file))

    @contextlib.contextmanager
    def server(self, url: str | None, shape: DraftShape | None) -> Iterator[ServedTarget]:
        """The target behind a URL, or behind an engine started for it; with the draft where a shape is given."""
        recipe = self.recipe
        target = recipe.target.model_copy(update={"engine": self.engine})
        with contextlib.ExitStack() as stack:
            if url is None:
                serve = recipe.serve.model_copy(update={"engine": self.engine, **({"shape": shape} if shape else {})})
                launched = launch(
                    recipe.model_copy(update={"serve": serve}),
                    resolve_model(target.model),
                    self.draft,
                    "draft" if shape else "plain",
                    (),
                )
                say(f"evaluate: {launched}")
                log = self.out / f"{self.engine}-{'plain' if shape is None else str(shape).replace('/', '-')}.log"
                stack.enter_context(running(launched, serve.patience_s, log))
                url = launched.url
            most = max(recipe.server.concurrency, *self.settings.batches)
            server = recipe.server.model_copy(update={"urls": (url,), "last_urls": (), "concurrency": most})
            yield stack.enter_context(contextlib.closing(ServedTarget(target, server, recipe.device)))

    def run(self, created_with: dict[str, Any]) -> dict[str, Any]:
        settings = self.settings
        shapes = [s for s in settings.shapes if s.topk == 1 or self.engine == "sglang"]
        for shape in set(settings.shapes) - set(shapes):
            say(f"evaluate: {shape} left out; vLLM drafts chains only")
        if settings.url is not None:
            shapes = shapes[:1]
        if not shapes:
            raise DataError("evaluate.shapes: none that vLLM can draft; add steps: 3, topk: 1, draft_tokens: 4")
        once = partial(measured_once, self.out)
        acceptance, speed, identity = [], [], []
        both = settings.plain_url is not None or settings.url is None
        plain = once("plain", self._plain) if both else None
        for shape in shapes:
            with self.server(settings.url, shape) as drafted:
                prompts = self.open_prompts(drafted)
                for temperature in settings.temperatures:
                    if temperature and not self._samples(drafted, prompts, temperature):
                        say(
                            f"evaluate: T={temperature:g} left out; the server drafts greedily at any temperature, as "
                            "SGLang does where it lacks its sampling kernel (on CPUs)"
                        )
                        continue
                    name = f"tau-{shape}-T{temperature:g}"
                    acceptance.append(once(name, partial(self._acceptance, drafted, prompts, shape, temperature)))
                    say(tau_line(acceptance[-1]))
                if plain is None:
                    continue
                identity.append(
                    once(f"lossless-{shape}", partial(self._identity, plain["ids"], drafted, prompts, shape))
                )
                for batch, alone in plain["timed"].items():
                    name = f"speed-{shape}-{batch}"
                    entry = once(name, partial(self._speed, alone, drafted, prompts, shape, int(batch)))
                    speed += [entry] if entry else []
        if not acceptance:
            raise DataError("evaluate.temperatures: none that this server draws at; add 0.0")
        lossless = None
        if identity:
            differences = [difference for found in identity for difference in found["differences"]]
            lossless = {**identity[0], "shapes": [str(s) for s in shapes], "differences": differences}
            lossless["identical"] = not differences
            say(verdict_line(lossless))
        results = {
            "schema": SCHEMA,
            "created_with": created_with,
            "settings": {
                "engine": self.engine,
                "prompts": len(prompts),
                "prompts_available": len(self.available),
                "max_new_tokens": settings.max_new_tokens,
                "top_p": settings.top_p,
                "top_k": settings.top_k,
                "target": self.recipe.target.model,
                "dtype": self.recipe.target.dtype,
            },
            "acceptance": acceptance,
            "lossless": lossless,
            "speed": speed,
            "partial": len(prompts) < len(self.available),
        }
        write_json(self.out / "results.json", results)
        return results

    def open_prompts(self, target: ServedTarget) -> list[Prompt]:
        self.chat = ChatFormat.of(self.recipe, target)
        chosen = balanced(self.available, self.settings.prompts)
        longest = longest_prompt(self.recipe.regenerate, target.identity.max_position_embeddings)
        opened = open_conversations(chosen, self.chat, longest, self.recipe.prompts.skip_bad)
        if not opened:
            raise DataError("evaluate: no evaluation prompt is shorter than regenerate.max_prompt_tokens; raise it")
        return [(c.prompt["id"], c.prompt["category"], c.ids) for c in opened]

    def complete(
        self,
        target: ServedTarget,
        prompts: list[Prompt],
        what: str,
        sampling: Sampling,
        length: int,
        at_once: int,
        stop: tuple[str, ...] = (),
    ) -> list[Generation]:
        """Completions in the prompts' order, `at_once` of them in flight."""
        made: dict[int, Generation] = {}
        ids = [ids for *_, ids in prompts]
        every = target.generate(ids, sampling, length, stop, self.recipe.seed, at_once=at_once)
        with Meter(what, len(prompts), "prompts") as meter:
            for number, generation in every:
                made[number] = generation
                meter.advance(1, len(generation.ids))
        return [made[number] for number in range(len(prompts))]

    def _samples(self, target: ServedTarget, prompts: list[Prompt], temperature: float) -> bool:
        """Whether a drafting server draws beyond the first token, which comes from the prompt's own forward.

        Where it does not, what follows that token is its greedy text (but for ties that round otherwise).
        """
        if temperature < SURELY_DRAWS or self.settings.top_k == 1:
            return True
        chosen = prompts[:SAMPLED_PROMPTS]
        sampling = Sampling(temperature, self.settings.top_p, self.settings.top_k)
        drawn = [g.ids for g in self.complete(target, chosen, "draws", sampling, SAMPLED_TOKENS, len(chosen))]
        begun = [(name, category, [*ids, *d[:1]]) for (name, category, ids), d in zip(chosen, drawn, strict=True)]
        greedy = [g.ids for g in self.complete(target, begun, "greedy", Sampling(), SAMPLED_TOKENS - 1, len(begun))]
        alike = total = 0
        for d, g in zip((d[1:] for d in drawn), greedy, strict=True):
            at = first_difference(d, g)
            alike, total = alike + (len(d) if at is None else at), total + len(d)
        return alike < SURELY_GREEDY * total or not total

    def _plain(self) -> dict[str, Any]:
        """Of the target alone: greedy ids to compare with, and seconds by batch (see `_timed`)."""
        settings = self.settings
        with self.server(settings.plain_url, None) as target:
            prompts = self.open_prompts(target)
            chosen = prompts[: settings.lossless_prompts]
            made = self.complete(target, chosen, "lossless, plain", Sampling(), settings.lossless_tokens, 1)
            timed = {str(batch): self._timed(target, prompts, batch, "plain") for batch in settings.batches}
        return {"ids": [g.ids for g in made], "timed": {batch: rows for batch, rows in timed.items() if rows}}

    def _timed(self, target: ServedTarget, prompts: list[Prompt], batch: int, what: str) -> list[dict[str, float]]:
        """Tokens, seconds, accepted draft tokens and steps of every group of `batch` requests; none if too few.

        The prompts are asked for one token before: an engine that caches prefixes then has all of them, so what is
        timed is decoding; one that does not reads them again, with and without the draft.
        """
        chosen = prompts[: max(batch, self.settings.speed_prompts // batch * batch)]
        if len(chosen) < batch:
            say(f"speed at batch {batch}: left out, there are {len(chosen)} prompts")
            return []
        self.complete(target, chosen, f"warm {what}", Sampling(), 1, batch)
        self.complete(target, chosen[:batch], f"warm {what}", Sampling(), 8, batch)
        rows = []
        with Meter(f"speed {what} at batch {batch}", len(chosen), "prompts") as meter:
            for start in range(0, len(chosen), batch):
                group = [ids for *_, ids in chosen[start : start + batch]]
                started = time.perf_counter()
                every = target.generate(group, Sampling(), self.settings.max_new_tokens, self.chat.stop)
                made = [generation for _, generation in every]
                spent, tokens = time.perf_counter() - started, sum(len(g.ids) for g in made)
                meter.advance(batch, tokens)
                rows.append(
                    {
                        "tokens": tokens,
                        "seconds": spent,
                        "accepted": sum(sum(g.verified) for g in made),
                        "steps": sum(len(g.verified) for g in made),
                    }
                )
        return rows

    def _acceptance(
        self, target: ServedTarget, prompts: list[Prompt], shape: DraftShape, temperature: float
    ) -> dict[str, Any]:
        settings = self.settings
        sampling = Sampling(temperature, settings.top_p, settings.top_k) if temperature else Sampling()
        # vLLM tells nothing of completions that a stop text ends, so there it is looked for afterwards.
        generations = self.complete(
            target,
            prompts,
            f"tau {shape} T={temperature:g} on {self.engine}",
            sampling,
            settings.max_new_tokens,
            target.capacity,
            () if self.engine == "vllm" else self.chat.stop,
        )
        generations = [
            replace(g, ids=g.ids[: first_stop(target.tokenizer, g.ids, self.chat.stop)]) for g in generations
        ]
        deepest = max((max(g.verified, default=0) for g in generations), default=0)
        if deepest > shape.steps:
            raise TargetError(
                f"evaluate.shapes: {shape} given, but the server accepted {deepest} draft tokens in one step; name the "
                "shape that it was started with"
            )
        untold = sum(not g.verified for g in generations if len(g.ids) > 1)
        if untold:
            raise TargetError(
                f"evaluate.url: the server tells nothing of drafting for {untold} of {len(generations)} completions; "
                "start it with a draft"
                + (" and --per-request-spec-decode-metrics detailed" if self.engine == "vllm" else "")
            )
        rows = [
            count_served(name, category, generation, shape.steps)
            for (name, category, _), generation in zip(prompts, generations, strict=True)
        ]
        return {
            "shape": str(shape),
            "temperature": temperature,
            **summarise(rows),
            "prompts": [row.to_dict() for row in rows],
        }

    def _identity(
        self, reference: list[list[int]], drafted: ServedTarget, prompts: list[Prompt], shape: DraftShape
    ) -> dict[str, Any]:
        """Greedy outputs against the target's own, one request at a time: other batches round differently.

        Where they part, `logit_gap` says how close the target holds the two tokens; null where one text ends.
        """
        length, chosen = self.settings.lossless_tokens, prompts[: self.settings.lossless_prompts]
        made = self.complete(drafted, chosen, f"lossless {shape}", Sampling(), length, 1)
        differences = []
        for (name, _, prompt), one, other in zip(chosen, reference, made, strict=True):
            at = first_difference(one, other.ids)
            if at is not None:
                found = {"id": name, "token": at, "plain": None, "drafted": None, "logit_gap": None}
                if at < min(len(one), len(other.ids)):
                    a, b = one[at], other.ids[at]
                    of_a, of_b = (drafted.logprobs([*prompt, *one[:at], token])[-1] for token in (a, b))
                    found |= {"plain": a, "drafted": b, "logit_gap": abs(of_a - of_b)}
                differences.append({"shape": str(shape), **found})
        return {
            "dtype": self.recipe.target.dtype,
            "prompts": len(chosen),
            "tokens_per_prompt": length,
            "tokens": sum(len(ids) for ids in reference),
            "differences": differences,
        }

    def _speed(
        self,
        alone: list[dict[str, float]],
        drafted: ServedTarget,
        prompts: list[Prompt],
        shape: DraftShape,
        batch: int,
    ) -> dict[str, Any] | None:
        """Tokens per second with `batch` requests in flight, against the target alone on the same groups of prompts."""
        timed = self._timed(drafted, prompts, batch, str(shape))
        ratios = [
            (other["tokens"] / other["seconds"]) / (one["tokens"] / one["seconds"])
            for one, other in zip(alone, timed, strict=True)
            if other["tokens"] >= SHORTEST_TIMED * batch
        ]
        if not ratios:
            say(f"speed {shape}: no answer is long enough to be timed")
            return None
        total = {key: sum(row[key] for row in timed) for key in timed[0]}
        tokens = sum(row["tokens"] for row in alone)
        entry = {
            "shape": str(shape),
            "batch": batch,
            "prompts": len(timed) * batch,
            "tokens": tokens,
            "plain_tokens_per_s": tokens / sum(row["seconds"] for row in alone),
            "drafted_tokens_per_s": total["tokens"] / total["seconds"],
            "speedup": statistics.median(ratios),
            "tau": 1 + total["accepted"] / total["steps"] if total["steps"] else None,
            "dtype": self.recipe.target.dtype,
            "differences": [],
        }
        say(
            f"speed {shape} at batch {batch}: {entry['drafted_tokens_per_s']:.1f} tokens/s against "
            f"{entry['plain_tokens_per_s']:.1f} plain, median {entry['speedup']:.2f}x"
        )
        return entry
