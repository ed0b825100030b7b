"""A target behind SGLang or vLLM servers: any number of replicas of one model, unmodified.

Token ids go in and out, so nothing is ever tokenised twice. Who is asked, and what becomes of a request that fails, is
engines/pool.py's.
"""

import asyncio
import copy
import queue
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from draftsmith.core.errors import TargetError
from draftsmith.core.files import JsonObject, digest
from draftsmith.core.recipe import ServerRecipe, TargetRecipe
from draftsmith.decoding.generation import Generation
from draftsmith.decoding.sampling import Sampling
from draftsmith.engines.answers import Models, checked_completion, checked_logprobs, whole_numbers
from draftsmith.engines.pool import LARGEST_ANSWER, Pool, Replica, all_or_none, reading
from draftsmith.engines.state_files import FILE_PREFIX, Retry, checked, discard_states, from_numbers, sweep, take_states
from draftsmith.targets.base import Asked, Capture
from draftsmith.targets.identity import PROBE, SAME_LOGPROB, nats_apart, require_same_logprobs
from draftsmith.targets.parts import resolve_model
from draftsmith.targets.weights import WeightsOnlyTarget

if TYPE_CHECKING:
    from draftsmith.engines.server import ServerEngine

FINISHED = ("stop", "length")
GREEDY: JsonObject = {"temperature": 0.0}
NUMBER_BYTES = 32  # of a hidden state's number that comes as text, and what stands between two


class ServedTarget(WeightsOnlyTarget):
    """A `Target` over replicas."""

    independent = True

    def __init__(self, target: TargetRecipe, server: ServerRecipe, engine: "ServerEngine", device: str):
        if not server.urls:
            raise TargetError(f"server.urls: none given; target.engine {engine.name} needs at least one URL")
        super().__init__(target, device)
        self.settings, self.engine = server, engine
        self.known_as = {target.model, resolve_model(target.model)}
        self.pool = Pool(server, self._identify)
        self._lost: list[str] = []  # requests for hidden states that were given up
        self._folders: set[Path] = set()
        self._proof, self._proven = threading.Lock(), False
        self._most: int | None = None  # of the replicas, those that are asked

    @property
    def replicas(self) -> Sequence[Replica]:
        return self.pool.replicas[: self._most]

    @cached_property
    def one(self) -> "ServedTarget":
        """The first replica alone."""
        alone = copy.copy(self)
        alone._most = 1
        return alone

    def close(self) -> None:
        for folder in self._folders:
            sweep(folder, self._lost)
        self.pool.close()

    def _answers(self, prompts: Iterable[list[int]], asked: Asked) -> Iterator[tuple[int, Generation]]:
        """Prompts are taken from an iterator as there is room for them."""
        done: queue.SimpleQueue[tuple[int, Generation] | None] = queue.SimpleQueue()
        numbered, tokens = enumerate(prompts), 0

        def room() -> bool:
            return asked.max_tokens is None or tokens < asked.max_tokens

        async def work() -> None:
            nonlocal tokens
            while room() and (item := next(numbered, None)) is not None:
                number = item[0]
                ids: list[int] | None = item[1]
                while ids is not None and room():
                    answer = await self._complete(ids, asked, asked.sampling_of(number))
                    tokens += len(answer.ids)
                    ids = asked.follow(number, answer) if asked.follow else None
                    done.put((number, answer))

        async def every() -> None:
            worth_giving = self.settings.concurrency * len(self.replicas)
            await all_or_none(work() for _ in range(asked.at_once or worth_giving))

        future = self.pool.submit(every())
        future.add_done_callback(lambda _: done.put(None))
        try:
            while (item := done.get()) is not None:
                asked.written(len(item[1].ids))
                yield item
            future.result()
        finally:
            future.cancel()

    def logprobs(self, document: list[int]) -> list[float]:
        async def ask(replica: Replica) -> list[float]:
            with reading("an answer without log-probabilities"):
                return await self._logprobs(replica, document)

        return self.pool.run(self.pool.somewhere(ask, self.replicas))

    async def _complete(self, ids: list[int], asked: Asked, sampling: Sampling) -> Generation:
        """One completion; raises `TargetError` once `server.attempts` have failed."""
        most, texts = asked.max_new_tokens, asked.ends.texts
        seed = int(digest(asked.seed, ids), 16) % 2**31  # the same whoever else asks, and when
        settings: JsonObject = {  # without defaults: servers take what is left out from the model's generation_config
            self.engine.seed: seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        settings |= ({"stop": list(texts)} if texts else {}) | ({"ignore_eos": True} if asked.ignore_end else {})

        async def ask(replica: Replica) -> Generation:
            mend = "give a smaller regenerate.max_new_tokens or evaluate.max_new_tokens"
            self._require_room(replica, len(ids) + most, mend)
            body = self.engine.body(replica.name, ids, most, settings) | self.engine.to_complete
            answer, _ = await self._post(replica, body)
            await self._let_go(answer)
            with reading(f"{self.engine.path}: an answer without token ids"):
                self._require_finished(answer)
                written = self.engine.read_completion(answer)
                return checked_completion(written, self.identity.vocab_size, most)

        written = await self.pool.somewhere(ask, self.replicas)
        kept, reason = asked.ends.of_answer(written.ids, written.finish_reason)
        return replace(written, ids=kept, finish_reason=reason)

    def capture(self, documents: list[list[int]], taps: Sequence[int]) -> Capture:
        """Hidden states of whole documents, each by the prefill of one request; safe to call from several threads.

        vLLM keeps taps and the last layer's output side by side. SGLang returns the taps or the last state, never
        both, so there `server.last_urls` are asked as well. The first capture is preceded by a proof (`_prove_states`).
        """
        with self._proof:
            if not self._proven:
                self._prove_states(taps)
                self._proven = True
        return self._capture(documents, taps)

    def _prove_states(self, taps: Sequence[int]) -> None:
        """What we make of the last hidden states has to be what the server itself thinks of the probe text.

        A wrong layer id, norm, head, scale or dtype would train towards another distribution without a word.
        """
        ids = self.tokenizer(PROBE).input_ids
        last = self._capture([ids], taps).last_TH[:-1]
        found = self.logprobs_of(ids, last.to(self.head.weight.dtype))
        away = nats_apart(self.identity_logprobs, found)
        if not away <= SAME_LOGPROB:
            raise TargetError(
                f"server.urls: the hidden states of {self.pool.replicas[0].url} give other log-probabilities of a "
                f"probe text than the server itself, by {away:.2f} nats a token: another layer id than `serve "
                "--purpose capture` names, or another final norm, head, scale or dtype than target.model has"
            )

    def _capture(self, documents: list[list[int]], taps: Sequence[int]) -> Capture:
        if not self.pool.last:
            (states_THK,) = self._kept(documents, (len(taps) + 1, self.replicas))
            return Capture(states_THK[:, :-1], self.final_norm(states_THK[:, -1]))
        taps_TKH, last_T1H = self._kept(documents, (len(taps), self.replicas), (1, self.pool.last))
        return Capture(taps_TKH, last_T1H[:, 0])

    def _kept(self, documents: list[list[int]], *groups: tuple[int, Sequence[Replica]]) -> list[Tensor]:
        """What each group of servers was told to keep, [T, count, H] over all documents, for its count."""

        async def every_document(count: int, among: Sequence[Replica]) -> list[Tensor]:
            return await all_or_none(self._states(document, count, among) for document in documents)

        found = self.pool.run(all_or_none(every_document(*group) for group in groups))
        return [torch.cat(states).to(self.device) for states in found]

    async def _states(self, ids: list[int], count: int, among: Sequence[Replica]) -> Tensor:
        async def ask(replica: Replica) -> Tensor:
            self._require_room(replica, len(ids) + 1, "give a smaller train.max_document_tokens")
            if not replica.captures_right:
                await self._check_capture(replica)
                replica.captures_right = True
            path, size = self.engine.path, self.identity.hidden_size
            longest = LARGEST_ANSWER + len(ids) * count * size * NUMBER_BYTES
            body = self.engine.body(replica.name, ids, 1, GREEDY) | self.engine.to_capture
            answer, name = await self._post(replica, body, longest)
            with reading(f"{path}: an answer without hidden states"):
                try:
                    self._require_finished(answer)
                except Retry:
                    self._lost.append(name)
                    raise
                kept = self.engine.read_capture(answer)
            if kept is None:
                raise TargetError(
                    f"server.urls: {replica.url} keeps no hidden states; start it with `draftsmith serve RECIPE "
                    "--purpose capture`, or train with target.engine transformers"
                )
            if isinstance(kept, str):
                path_here = self._here(kept)
                self._folders.add(path_here.parent)
                return await asyncio.to_thread(take_states, path_here, ids, count, size, self.settings.deadline_s)
            with reading(f"{path}: hidden states that are no numbers"):
                rows = from_numbers(kept, self.head.weight.dtype)[: len(ids)]
            return checked(rows.reshape(len(rows), -1, size) if rows.shape[-1] % size == 0 else rows, ids, count, size)

        return await self.pool.somewhere(ask, among)

    async def _post(self, replica: Replica, body: JsonObject, limit: int = LARGEST_ANSWER) -> tuple[Any, str]:
        """(the answer to a text, the name that the request went by, which a file of hidden states carries)"""
        name = f"{FILE_PREFIX}{uuid.uuid4().hex}"
        try:
            return await self.pool.request(replica, "POST", self.engine.path, body, {"X-Request-Id": name}, limit), name
        except BaseException:
            self._lost.append(name)  # whatever became of the request, its file may still come
            raise

    def _require_finished(self, answer: Any) -> None:
        if (reason := self.engine.finish_reason(answer)) not in FINISHED:
            raise Retry(f"it gave up in mid-answer ({reason})")

    def _here(self, told: str) -> Path:
        """Where this machine sees a file that a server wrote for us; it is deleted once it is read, so nothing else."""
        path, folder = Path(told), self.settings.hidden_states
        if FILE_PREFIX not in path.name or path.suffix != ".safetensors":
            raise Retry(f"hidden states in {path.name}, which is no file of our request")
        return path if folder is None else folder / path.name

    async def _let_go(self, answer: JsonObject) -> None:
        """A server that captures keeps the hidden states of every request, wanted or not."""
        with reading("an answer that is none"):
            kept = self.engine.read_capture(answer)
        if isinstance(kept, str):
            await asyncio.to_thread(discard_states, self._here(kept), self.settings.deadline_s)

    def _require_room(self, replica: Replica, tokens: int, mend: str) -> None:
        if replica.context and tokens > replica.context:
            raise TargetError(
                f"server.urls: {replica.url} takes {replica.context} tokens, this request needs {tokens}; {mend}, or "
                "start the server with a larger serve.context"
            )

    # --- who is trusted -----------------------------------------------------------------------------------------

    async def _logprobs(self, replica: Replica, ids: list[int]) -> list[float]:
        answer, _ = await self._post(replica, self.engine.body(replica.name, ids, 1, GREEDY) | self.engine.to_score)
        await self._let_go(answer)
        return checked_logprobs(self.engine.read_logprobs(answer), ids)

    async def _identify(self, replica: Replica) -> None:
        """Refuse a server of another model: by name, by tokenizer, and by what it thinks of a text."""
        listed = Models.model_validate(await self.pool.request(replica, "GET", "/v1/models")).data
        names = {name for model in listed for name in model.names}
        if not names & self.known_as:
            raise TargetError(
                f"server.urls: {replica.url} serves {', '.join(sorted(names)[:3])}, not target.model "
                f"{self.identity.model}; give another URL, or start it with --served-model-name {self.identity.model}"
            )
        model = next(m for m in listed if m.names & self.known_as)
        replica.name, replica.context = model.id, model.max_model_len or 0
        ids = self.tokenizer(PROBE).input_ids
        answer = await self.pool.request(replica, "POST", "/tokenize", {"model": replica.name, "prompt": PROBE})
        if whole_numbers(answer["tokens"]) != ids:
            raise TargetError(f"server.urls: {replica.url} has another tokenizer than {self.identity.model}")
        again = f", asked again after {replica.answered} answers," if replica.answered else ""
        found = await self._logprobs(replica, ids)
        if not self.identity_logprobs:  # the first server's are the truth
            self.identity_logprobs.extend(found)
        require_same_logprobs(self.identity_logprobs, found, f"server.urls: {replica.url}{again}")

    async def _check_capture(self, replica: Replica) -> None:
        check = self.engine.capture_check(self.config.model_type)
        if check is None or not self.pool.last or replica in self.pool.last:
            return
        path, wanted, fault = check
        if wanted not in str(await self.pool.request(replica, "GET", path)):
            raise TargetError(f"server.urls: {replica.url} {fault}")
