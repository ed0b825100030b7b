"""A target behind SGLang or vLLM servers: any number of replicas of one model, unmodified.

Token ids go in and out, so nothing is ever tokenised twice. A request goes to the replica with the fewest in flight;
one that fails is asked again, elsewhere if there is an elsewhere; a replica that fails is left alone for a while and
its identity checked again before it is trusted. A request is answered once or not at all, whatever happens on the way.
"""

import asyncio
import os
import queue
import random
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx2 as httpx
import torch
from torch import Tensor

from draftsmith.decoding.sampling import Sampling
from draftsmith.errors import TargetError
from draftsmith.progress import say
from draftsmith.recipe import ServerRecipe, TargetRecipe
from draftsmith.targets.base import Capture, Generation
from draftsmith.targets.dialects import DIALECTS, RESIDUAL
from draftsmith.targets.endings import loop_length, stop_length
from draftsmith.targets.ends import LooseEnds, resolve_model
from draftsmith.targets.state_files import FILE_PREFIX, Retry, checked, discard_states, sweep, take_states

PROBE = "The quick brown fox jumps over the lazy dog, and then it sleeps."
SAME_LOGPROB = 0.15  # nats a token: replicas of one model differ by rounding only
FINISHED = {"stop", "length"}
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
LONGEST_PAUSE_S = 60.0
GO_ON = "finished completions are kept, run the same command to go on"

T = TypeVar("T")


async def all_or_none(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; where one fails the others are cancelled."""
    tasks = [asyncio.ensure_future(piece) for piece in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Replica:
    url: str
    context: int = 0  # longest text it takes, in tokens; 0 where it does not say
    in_flight: int = 0
    answered: int = 0
    failures: int = 0  # in a row
    rests_until: float = 0.0  # monotonic seconds
    name: str = ""  # what it calls the model
    trusted: bool = False  # its identity was proved since it last failed
    proving: bool = False
    captures_right: bool = False  # what it returns as hidden states was checked


class ServedTarget(LooseEnds):
    """Implements `Target` over replicas. Requests run on an event loop in a thread of its own."""

    def __init__(self, target: TargetRecipe, server: ServerRecipe, device: str = "auto"):
        if not server.urls:
            raise TargetError(f"server.urls: none given; target.engine {target.engine} needs at least one URL")
        super().__init__(
            target.model, target.revision, target.dtype, device, target.trust_remote_code, target.template_options
        )
        self.settings, self.dialect = server, DIALECTS[target.engine]
        self.known_as = {target.model, resolve_model(target.model)}
        self.replicas = [Replica(url.rstrip("/")) for url in server.urls]
        self.fingerprint: list[float] = []  # log-probabilities of the probe's tokens, of the first server that told
        self._random = random.Random(0)  # spreads retries only
        self._lost: list[str] = []  # requests for hidden states that were given up
        self._folders: set[Path] = set()
        self._client: httpx.AsyncClient | None = None
        self._proof, self._proven = threading.Lock(), False
        self._loop = asyncio.new_event_loop()
        self.last: ServedTarget | None = None
        if server.last_urls:
            self.last = ServedTarget(
                target, server.model_copy(update={"urls": server.last_urls, "last_urls": ()}), device
            )
            self.last.fingerprint = self.fingerprint  # one list: both groups have the same weights
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self.last is not None:
            self.last.close()
        for folder in self._folders:
            sweep(folder, self._lost)

        async def let_go() -> None:
            unfinished = asyncio.all_tasks() - {asyncio.current_task()}
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
            if self._client is not None:
                await self._client.aclose()

        asyncio.run_coroutine_threadsafe(let_go(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def capacity(self) -> int:
        """Requests worth having in flight."""
        return self.settings.concurrency * len(self.replicas)

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function against the servers from ordinary code; connects first."""
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _submit(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        async def connected() -> T:
            await self._connect()
            return await work()

        return asyncio.run_coroutine_threadsafe(connected(), self._loop)

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        max_new_tokens: int,
        stop: tuple[str, ...] = (),
        seed: int = 0,
        stop_loops: bool = False,
        max_tokens: int | None = None,
        at_once: int | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """Completions as (index of the prompt, generation), each as soon as it ends; at most `at_once` in flight, and
        none begun once `max_tokens` are written."""
        done: queue.SimpleQueue[tuple[int, Generation] | None] = queue.SimpleQueue()

        async def every() -> None:
            room = asyncio.Semaphore(at_once or self.capacity)
            written = 0

            async def one(number: int, ids: list[int]) -> None:
                nonlocal written
                async with room:
                    if max_tokens is not None and written >= max_tokens:
                        return
                    made = await self.complete(ids, sampling, max_new_tokens, stop, seed + number, stop_loops)
                    written += len(made.ids)
                done.put((number, made))

            await all_or_none(one(number, ids) for number, ids in enumerate(prompts))

        future = self._submit(every)
        future.add_done_callback(lambda _: done.put(None))
        try:
            while (item := done.get()) is not None:
                yield item
            future.result()
        finally:
            future.cancel()

    def logprobs(self, document: list[int]) -> list[float]:
        """Log-probability of every token of a text after the first."""

        async def ask(replica: Replica) -> list[float]:
            return await self._logprobs(replica, document)

        return self.run(lambda: self._somewhere(ask))

    async def complete(
        self,
        ids: list[int],
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        seed: int = 0,
        stop_loops: bool = False,
    ) -> Generation:
        """One completion; raises `TargetError` once `server.attempts` have failed."""

        async def ask(replica: Replica) -> Generation:
            self._require_room(replica, len(ids) + max_new_tokens, "give a smaller max_new_tokens")
            path, body = self.dialect.completion(replica.name, ids, sampling, max_new_tokens, stop, seed)
            answer = await self._request(replica, "POST", path, body)
            await self._let_go(answer)
            try:
                made = self.dialect.read_completion(answer)
            except (KeyError, IndexError, TypeError):
                raise Retry(f"{path}: an answer without token ids") from None
            if made.finish_reason not in FINISHED:
                raise Retry(f"it gave up in mid-answer ({made.finish_reason})")
            return made

        written = await self._somewhere(ask)
        if stop_loops and (length := loop_length(written.ids)) is not None:
            return replace(written, ids=written.ids[:length], finish_reason="loop")
        if written.ids and written.ids[-1] in self.eos_ids:
            return replace(written, finish_reason="eos")
        if written.finish_reason == "length":
            return written
        return replace(written, ids=written.ids[: stop_length(self.tokenizer, written.ids, stop)], finish_reason="stop")

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
        everything = self.head_rows(torch.arange(self.identity.vocab_size))
        logits = (last.to(everything.dtype) @ everything.T).float()
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        wanted = torch.tensor(ids[1:], device=logits.device)
        found = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].tolist()
        away = sum(abs(a - b) for a, b in zip(self.fingerprint, found, strict=True)) / len(found)
        if not away <= SAME_LOGPROB:
            raise TargetError(
                f"server.urls: the hidden states of {self.replicas[0].url} give other log-probabilities of a probe "
                f"text than the server itself, by {away:.2f} nats a token: another layer id than `serve --purpose "
                "capture` names, or another final norm, head, scale or dtype than target.model has"
            )

    def _capture(self, documents: list[list[int]], taps: Sequence[int]) -> Capture:
        if self.last is None:
            states_THK = self.states(documents, len(taps) + 1)
            return Capture(states_THK[:, :-1], self.final_norm(states_THK[:, -1]))
        with ThreadPoolExecutor(1) as beside:
            last = beside.submit(self.last.states, documents, 1)
            return Capture(self.states(documents, len(taps)), last.result()[:, 0])

    def states(self, documents: list[list[int]], count: int) -> Tensor:
        """What the servers were told to keep, [T, count, H] over all documents."""

        async def every_document() -> list[Tensor]:
            return await all_or_none(self._states(document, count) for document in documents)

        return torch.cat(self.run(every_document)).to(self.device)

    async def _states(self, ids: list[int], count: int) -> Tensor:
        async def ask(replica: Replica) -> Tensor:
            self._require_room(replica, len(ids) + 1, "give a smaller train.max_document_tokens")
            if self.last is not None and self.config.model_type.startswith("gemma3") and not replica.captures_right:
                await self._require_residual(replica)
                replica.captures_right = True
            path, body = self.dialect.capture(replica.name, ids)
            name = f"{FILE_PREFIX}{uuid.uuid4().hex}"
            try:
                answer = await self._request(replica, "POST", path, body, {"X-Request-Id": name})
            except BaseException:
                self._lost.append(name)  # whatever became of the request, its file may still come
                raise
            if self.dialect.finish_reason(answer) not in FINISHED:
                self._lost.append(name)
                raise Retry(f"it gave up in mid-answer ({self.dialect.finish_reason(answer)})")
            kept = self.dialect.read_capture(answer)
            if kept is None:
                raise TargetError(
                    f"server.urls: {replica.url} keeps no hidden states; start it with `draftsmith serve RECIPE "
                    "--purpose capture`, or train with target.engine transformers"
                )
            size = self.identity.hidden_size
            if isinstance(kept, str):
                path_here = self._here(kept)
                self._folders.add(path_here.parent)
                return await asyncio.to_thread(take_states, path_here, ids, count, size, self.settings.deadline_s)
            rows = torch.tensor(kept, dtype=self.head.weight.dtype)[: len(ids)]
            return checked(rows.reshape(len(rows), -1, size) if rows.shape[-1] % size == 0 else rows, ids, count, size)

        return await self._somewhere(ask)

    def _here(self, path: str) -> Path:
        """Where this machine sees a file that a server wrote."""
        folder = self.settings.hidden_states
        return Path(path) if folder is None else folder / Path(path).name

    async def _let_go(self, answer: dict[str, Any]) -> None:
        """A server that captures keeps the hidden states of every request, wanted or not."""
        if isinstance(kept := self.dialect.read_capture(answer), str):
            await asyncio.to_thread(discard_states, self._here(kept), self.settings.deadline_s)

    def _require_room(self, replica: Replica, tokens: int, mend: str) -> None:
        if replica.context and tokens > replica.context:
            raise TargetError(
                f"server.urls: {replica.url} takes {replica.context} tokens, this request needs {tokens}; {mend}, or "
                "start the server with a larger serve.context"
            )

    # --- replicas -----------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        if self._client is not None:
            return
        key = os.environ.get(self.settings.api_key_env, "")
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=self.capacity),
            timeout=httpx.Timeout(self.settings.deadline_s, connect=10.0),
            trust_env=False,  # a proxy of the environment is not meant for servers next door
        )
        self._freed = asyncio.Condition()
        failures = await asyncio.gather(*(self._first_check(replica) for replica in self.replicas))
        if not any(replica.trusted for replica in self.replicas):
            raise TargetError(f"server.urls: no server answers; {self.replicas[0].url}: {failures[0]}")

    async def _somewhere(self, ask: Callable[[Replica], Coroutine[Any, Any, T]]) -> T:
        last = ""
        failed: set[str] = set()
        for attempt in range(self.settings.attempts):
            if attempt:
                await asyncio.sleep(self._pause(attempt))
            replica = await self._take(failed)
            try:
                answer = await ask(replica)
            except Retry as error:
                last = f"{replica.url}: {error}"
                failed.add(replica.url)
                self._rest(replica, str(error))
                continue
            finally:
                await self._release(replica)
            replica.failures = 0
            replica.answered += 1
            return answer
        raise TargetError(f"server.attempts: {self.settings.attempts} attempts failed, the last at {last}; {GO_ON}")

    async def _take(self, failed: set[str]) -> Replica:
        """A trusted replica, the least busy one; waits for it. One that failed this request comes last.

        A replica that rested is proved by one request's patience, not by everybody's: until then others go elsewhere.
        """
        while True:
            replica = await self._choose(failed)
            if replica.trusted:
                return replica
            try:
                await self._prove(replica)
                async with self._freed:
                    self._freed.notify_all()  # it has room for others too
                return replica
            except Retry as error:
                self._rest(replica, str(error))
                await self._release(replica)
                if min(r.failures for r in self.replicas) >= self.settings.attempts:
                    raise TargetError(
                        f"server.attempts: no server answers any more, the last one {replica.url}: {error}; {GO_ON}"
                    ) from None
            except BaseException:
                await self._release(replica)
                raise

    async def _choose(self, failed: set[str]) -> Replica:
        async with self._freed:
            while True:
                now = time.monotonic()
                awake = [r for r in self.replicas if r.rests_until <= now and not r.proving]
                able = [r for r in awake if r.url not in failed] or awake
                able = [r for r in able if r.in_flight < self.settings.concurrency]
                if able:
                    chosen = min(able, key=lambda r: (r.in_flight, r.answered))
                    chosen.in_flight += 1
                    chosen.proving = not chosen.trusted
                    return chosen
                resting = [r.rests_until - now for r in self.replicas if r.rests_until > now]
                try:
                    await asyncio.wait_for(self._freed.wait(), min(resting) + 0.01 if resting else None)
                except TimeoutError:
                    continue  # a replica has rested

    async def _release(self, replica: Replica) -> None:
        async with self._freed:
            replica.in_flight -= 1
            self._freed.notify_all()

    def _rest(self, replica: Replica, why: str) -> None:
        replica.trusted = replica.captures_right = False  # it may come back as something else
        if replica.rests_until <= time.monotonic():  # the first of many requests that fail together
            replica.failures += 1
            pause = self._pause(replica.failures)
            replica.rests_until = time.monotonic() + pause
            say(f"server {replica.url}: {why}; left alone for {pause:.1f} s")

    def _pause(self, failures: int) -> float:
        longest = min(LONGEST_PAUSE_S, self.settings.backoff_s * 2 ** (failures - 1))
        return longest * self._random.uniform(0.5, 1.0)

    async def _first_check(self, replica: Replica) -> str:
        try:
            await self._prove(replica)
        except Retry as error:
            self._rest(replica, str(error))
            return str(error)
        return ""

    async def _prove(self, replica: Replica) -> None:
        """Refuse a server of another model: by name, by tokenizer, and by what it thinks of a text."""
        try:
            await self._identify(replica)
            replica.trusted = True
        except (KeyError, IndexError, TypeError, AttributeError):
            raise TargetError(
                f"server.urls: {replica.url} does not answer as the engine of target.engine does; is it another one?"
            ) from None
        finally:
            replica.proving = False

    async def _logprobs(self, replica: Replica, ids: list[int]) -> list[float]:
        path, body = self.dialect.probe(replica.name, ids)
        answer = await self._request(replica, "POST", path, body)
        await self._let_go(answer)
        return self.dialect.read_probe(answer)

    async def _identify(self, replica: Replica) -> None:
        listed = (await self._request(replica, "GET", "/v1/models"))["data"]
        names = {str(model[key]) for model in listed for key in ("id", "root") if model.get(key)}
        if not names & self.known_as:
            raise TargetError(
                f"server.urls: {replica.url} serves {', '.join(sorted(names))}, not target.model "
                f"{self.identity.model}; give another URL, or start it with --served-model-name {self.identity.model}"
            )
        model = next(m for m in listed if {m.get("id"), m.get("root")} & self.known_as)
        replica.name, replica.context = model["id"], model.get("max_model_len") or 0
        ids = self.tokenizer(PROBE).input_ids
        answer = await self._request(replica, "POST", "/tokenize", {"model": replica.name, "prompt": PROBE})
        if answer["tokens"] != ids:
            raise TargetError(f"server.urls: {replica.url} has another tokenizer than {self.identity.model}")
        self.compare_fingerprint(replica.url, await self._logprobs(replica, ids))

    async def _require_residual(self, replica: Replica) -> None:
        started_with = (await self._request(replica, "GET", "/server_info")).get("json_model_override_args") or "{}"
        if RESIDUAL not in started_with:
            raise TargetError(
                f"server.urls: {replica.url} runs SGLang's own Gemma-3, which returns its taps without the residual "
                "stream (docs/engines.md); start it with `draftsmith serve RECIPE --purpose capture`"
            )

    def compare_fingerprint(self, origin: str, found: list[float]) -> None:
        """The first fingerprint is the truth; another is an error that names where it comes from."""
        if not self.fingerprint:
            self.fingerprint.extend(found)
        away = sum(abs(a - b) for a, b in zip(self.fingerprint, found, strict=True)) / len(found)
        if away > SAME_LOGPROB:
            raise TargetError(
                f"server.urls: {origin} has other weights under the same name: the log-probabilities of a probe text "
                f"are {away:.2f} nats a token away from those seen first"
            )

    async def _request(
        self, replica: Replica, method: str, path: str, body: dict | None = None, headers: dict | None = None
    ) -> Any:
        assert self._client is not None
        try:
            async with asyncio.timeout(self.settings.deadline_s):
                response = await self._client.request(method, replica.url + path, json=body, headers=headers)
        except TimeoutError:
            raise Retry(f"no answer within {self.settings.deadline_s:g} s (server.deadline_s)") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise TargetError(f"server.urls: {replica.url}: {error}") from None
        except httpx.TransportError as error:
            raise Retry(str(error) or type(error).__name__) from None
        if response.status_code in RETRIED:
            raise Retry(f"HTTP {response.status_code}")
        if response.status_code != 200:
            text = " ".join(response.text.split())[:200]
            raise TargetError(f"{replica.url}{path}: HTTP {response.status_code}: {text}")
        try:
            return response.json()
        except ValueError:
            raise Retry("an answer that is no JSON") from None
