"""Replicas of one model behind URLs: who is asked, who rests, who is trusted again.

A request goes to the replica with the fewest in flight; one that fails is asked again, elsewhere if there is an
elsewhere; a replica that fails is left alone for a while and proved again before it is trusted. A request is answered
once or not at all, whatever happens on the way.
"""

import asyncio
import contextlib
import email.utils
import math
import random
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2 as httpx
import orjson

from draftsmith.core import secrets
from draftsmith.core.errors import DraftsmithError, TargetError
from draftsmith.core.files import JsonObject
from draftsmith.core.progress import say
from draftsmith.core.recipe import ServerRecipe
from draftsmith.engines.answers import MALFORMED
from draftsmith.engines.state_files import Retry
from draftsmith.targets.parts import first_line

RETRIED = {408, 409, 425, 429}  # beside all that begin with 5
LONGEST_PAUSE_S = 60.0
PROVED_EVERY = 64  # answers of a replica, after which its identity is proved again
GO_ON = "finished completions are kept, run the same command to go on"

LARGEST_ANSWER = 1 << 26  # bytes; of log-probabilities, a few hundred a token

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


def _pause_asked_for(retry_after: str) -> float:
    """Seconds that a server asks for with `Retry-After`, a number or a date, up to a minute; 0 where it is neither."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = email.utils.parsedate_tz(retry_after)
            seconds = email.utils.mktime_tz(date) - time.time() if date else 0.0
        except (ValueError, OverflowError):
            seconds = 0.0
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_PAUSE_S)


def _authority(urls: Sequence[str], settings: ServerRecipe) -> ssl.SSLContext | bool:
    """Whose certificates are believed: everybody's, or `server.ca_file`'s alone; False where nobody shows one."""
    if settings.ca_file is None:
        return any(urlsplit(url).scheme == "https" for url in urls)
    try:
        if not settings.ca_file.is_file():
            raise FileNotFoundError("is no file")
        return ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:
        why = error.strerror or error
        raise TargetError(f"server.ca_file: {settings.ca_file}: {why}; give the authority's PEM file") from None


def _wrong_certificate(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


@dataclass(eq=False)
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
    met: bool = False  # it was asked who it is


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever is wrong with an answer costs an attempt, never the run."""
    try:
        yield
    except DraftsmithError:
        raise
    except MALFORMED as error:
        raise Retry(f"{what} ({first_line(error)})") from None


def never_ours() -> None:
    """Of servers that others started nobody knows whether they run."""


class Pool:
    """Asks replicas on an event loop in a thread of its own: `replicas`, or `last`, which keep the last layer's states.

    prove: refuses a replica that is not what it should be, by a `TargetError`; a `Retry` where it does not answer.
    """

    def __init__(self, settings: ServerRecipe, prove: Callable[[Replica], Coroutine[Any, Any, None]]):
        self.settings, self._identify = settings, prove
        self.require_alive: Callable[[], None] = never_ours
        """Raises where no attempt more is of use: the servers are ours, and none runs any more."""
        self._authority = _authority((*settings.urls, *settings.last_urls), settings)
        self.replicas = [Replica(url) for url in settings.urls]
        self.last = [Replica(url) for url in settings.last_urls]
        self._random = random.Random(0)  # spreads retries only
        self._freed, self._meeting = asyncio.Condition(), asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        async def let_go() -> None:
            unfinished = asyncio.all_tasks() - {asyncio.current_task()}
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
            if "_client" in vars(self):
                await self._client.aclose()

        asyncio.run_coroutine_threadsafe(let_go(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine gives, from ordinary code."""
        future = self.submit(work)
        try:
            return future.result()
        finally:
            future.cancel()

    @cached_property
    def _client(self) -> httpx.AsyncClient:
        name = self.settings.api_key_env
        key = secrets.read(name).strip()
        if not (key.isascii() and key.isprintable()):
            raise TargetError(f"server.api_key_env: the key in {name} has characters that no request can carry")
        kept = self.settings.concurrency * (len(self.replicas) + len(self.last))
        return httpx.AsyncClient(
            headers={"Authorization": key if " " in key else f"Bearer {key}"} if key else {},
            verify=self._authority,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=kept),
            timeout=httpx.Timeout(self.settings.deadline_s, connect=10.0),
            trust_env=False,  # a proxy of the environment is not meant for servers next door
        )

    async def _meet(self, among: Sequence[Replica]) -> None:
        """Whoever asks first has all of them proved; the others wait for it."""
        async with self._meeting:
            new = [replica for replica in among if not replica.met]
            for replica in new:
                replica.met = True
            failures = await asyncio.gather(*(self._prove(replica) for replica in new))
        if new and not any(replica.trusted for replica in among):
            raise TargetError(f"server.urls: no server answers; {new[0].url}: {failures[0]}")

    async def somewhere(self, ask: Callable[[Replica], Coroutine[Any, Any, T]], among: Sequence[Replica]) -> T:
        """What one of the replicas answers; raises `TargetError` once `server.attempts` have failed."""
        await self._meet(among)
        last = ""
        failed: set[str] = set()
        for attempt in range(self.settings.attempts):
            if attempt:
                await asyncio.sleep(self._pause(attempt))
            replica = await self._take(failed, among)
            try:
                answer = await ask(replica)
            except Retry as error:
                last = f"{replica.url}: {error}"
                failed.add(replica.url)
                self._rest(replica, error)
                continue
            finally:
                await self._release(replica)
            replica.failures = 0
            replica.answered += 1
            if replica.answered % PROVED_EVERY == 0:  # a balancer may stand before several models
                replica.trusted = False
            return answer
        raise TargetError(f"server.attempts: {self.settings.attempts} attempts failed, the last at {last}; {GO_ON}")

    async def _take(self, failed: set[str], among: Sequence[Replica]) -> Replica:
        """A trusted replica, the least busy one; waits for it. One that failed this request comes last.

        A replica that rested is proved by one request's patience, not by everybody's: until then others go elsewhere.
        """
        while True:
            replica = await self._choose(failed, among)
            if replica.trusted:
                return replica
            try:
                why = await self._prove(replica)
            except BaseException:
                await self._release(replica)
                raise
            if why is None:
                async with self._freed:
                    self._freed.notify_all()  # it has room for others too
                return replica
            await self._release(replica)
            if min(r.failures for r in among) >= self.settings.attempts:
                raise TargetError(
                    f"server.attempts: no server answers any more, the last one {replica.url}: {why}; {GO_ON}"
                )

    async def _choose(self, failed: set[str], among: Sequence[Replica]) -> Replica:
        async with self._freed:
            while True:
                now = time.monotonic()
                awake = [r for r in among if r.rests_until <= now and not r.proving]
                able = [r for r in awake if r.url not in failed] or awake
                able = [r for r in able if r.in_flight < self.settings.concurrency]
                if able:
                    chosen = min(able, key=lambda r: (r.in_flight, r.answered))
                    chosen.in_flight += 1
                    chosen.proving = not chosen.trusted
                    return chosen
                resting = [r.rests_until - now for r in among if r.rests_until > now]
                try:
                    await asyncio.wait_for(self._freed.wait(), min(resting) + 0.01 if resting else None)
                except TimeoutError:
                    continue  # a replica has rested

    async def _release(self, replica: Replica) -> None:
        async with self._freed:
            replica.in_flight -= 1
            self._freed.notify_all()

    def _rest(self, replica: Replica, error: Retry) -> None:
        self.require_alive()
        replica.trusted = replica.captures_right = False  # it may come back as something else
        now = time.monotonic()
        if replica.rests_until > now:  # one of many requests that fail together
            replica.rests_until = max(replica.rests_until, now + error.after_s)
        else:
            replica.failures += 1
            pause = max(error.after_s, self._pause(replica.failures))
            replica.rests_until = now + pause
            say(f"server {replica.url}: {error}; left alone for {pause:.1f} s")

    def _pause(self, failures: int) -> float:
        longest = min(LONGEST_PAUSE_S, self.settings.backoff_s * 2 ** (failures - 1))
        return longest * self._random.uniform(0.5, 1.0)

    async def _prove(self, replica: Replica) -> str | None:
        """Why it has to rest; None where it is trusted from now on."""
        try:
            await self._identify(replica)
            replica.trusted = True
            return None
        except Retry as error:
            self._rest(replica, error)
            return str(error)
        except DraftsmithError:
            raise
        except MALFORMED:
            raise TargetError(
                f"server.urls: {replica.url} does not answer as the engine of target.engine does; is it another one?"
            ) from None
        finally:
            replica.proving = False

    async def request(
        self,
        replica: Replica,
        method: str,
        path: str,
        body: JsonObject | None = None,
        headers: dict[str, str] | None = None,
        limit: int = LARGEST_ANSWER,
    ) -> Any:
        """The JSON of an answer, which nobody has looked at yet; `Retry` where another attempt may get one.

        limit: bytes of the largest answer that is read to its end.
        """
        content = bytearray()
        try:
            async with (
                asyncio.timeout(self.settings.deadline_s),
                self._client.stream(method, replica.url + path, json=body, headers=headers) as response,
            ):
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > limit:
                        raise Retry(f"an answer of more than {limit >> 20} MB")
        except TimeoutError:
            raise Retry(f"no answer within {self.settings.deadline_s:g} s (server.deadline_s)") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise TargetError(f"server.urls: {replica.url}: {error}") from None
        except httpx.RequestError as error:  # of the network, or of an answer that cannot be unpacked
            if _wrong_certificate(error):
                raise TargetError(
                    f"server.urls: {replica.url}: {error}; where the authority is your own, give its PEM file as "
                    "server.ca_file"
                ) from None
            raise Retry(str(error) or type(error).__name__) from None
        if response.status_code in RETRIED or response.status_code >= 500:
            asked_for = _pause_asked_for(response.headers.get("Retry-After", ""))
            raise Retry(f"HTTP {response.status_code}", asked_for)
        text = " ".join(content[:1000].decode(errors="replace").split())[:200]
        if response.status_code in (401, 403):
            raise TargetError(
                f"{replica.url}{path}: HTTP {response.status_code}: {text}; put the key into the environment variable "
                f"{self.settings.api_key_env} (server.api_key_env)"
            )
        if response.status_code != 200:
            raise TargetError(f"{replica.url}{path}: HTTP {response.status_code}: {text}")
        try:
            return orjson.loads(content)
        except ValueError:  # too deep a nesting is one, too
            raise Retry("an answer that is no JSON") from None
