"""What an engine behind a server is to draftsmith: how it is asked and read, how it is started."""

import contextlib
import re
import shlex
import subprocess
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from draftsmith.core import secrets
from draftsmith.core.errors import ServeError, TargetError
from draftsmith.core.files import JsonObject, read_object
from draftsmith.core.progress import say
from draftsmith.core.recipe import EngineName, Recipe
from draftsmith.core.shape import Shape
from draftsmith.decoding.generation import Generation
from draftsmith.engines.base import Engine, Setup
from draftsmith.engines.pool import never_ours
from draftsmith.engines.process import Launch, require_alive, started, wait_until_healthy
from draftsmith.engines.served import ServedTarget
from draftsmith.targets.parts import DTYPES, resolve_model

Purpose = Literal["draft", "plain", "capture", "last"]


class ServerEngine(Engine):
    """Answers are its server's JSON."""

    name: ClassVar[EngineName]
    program: ClassVar[tuple[str, ...]]
    """What starts it, where serve.program names nothing else."""
    chosen_on_gpus: ClassVar[bool] = False
    """Whether `auto` has it decode where there are GPUs and its program."""
    last_beside_taps: ClassVar[bool]
    """Whether a capturing server keeps the last layer, too; else `server.last_urls` have to."""
    models: ClassVar[Path | None] = None
    """Model classes of ours that run inside it, where its own are wrong; put on its PYTHONPATH."""
    models_note: ClassVar[str] = ""
    """Why, for the model card."""

    @contextlib.contextmanager
    def open(self, setup: Setup, shape: Shape | None, url: str | None = None) -> Iterator[ServedTarget]:
        """On GPUs each server takes all the memory there is, so sessions are opened one at a time."""
        recipe = setup.recipe
        if url is None:
            self.require_settings(recipe)
        with contextlib.ExitStack() as stack:
            urls, alive = ((url,), never_ours) if url else self._start(stack, setup, shape)
            most = max(recipe.server.concurrency, *recipe.evaluate.batches)
            most = max(most, recipe.regenerate.batch_size) if setup.groups else most
            server = recipe.server.model_copy(update={"urls": urls, "last_urls": (), "concurrency": most})
            served = stack.enter_context(contextlib.closing(ServedTarget(recipe.target, server, self, recipe.device)))
            served.pool.require_alive = alive
            yield served

    def _start(
        self, stack: contextlib.ExitStack, setup: Setup, shape: Shape | None
    ) -> tuple[tuple[str, ...], Callable[[], None]]:
        """(URLs of servers on ports that follow each other, what raises `ServeError` once none of them runs); they load
        side by side."""
        recipe, serve = setup.recipe, setup.recipe.serve
        purpose: Purpose = "draft" if shape else "plain"
        urls: list[str] = []
        engines: dict[subprocess.Popen[bytes], Path | None] = {}
        for number, cards in enumerate(setup.groups or ("",)):
            changed = {"engine": self.name, "port": serve.port + number, **({"shape": shape} if shape else {})}
            chosen = recipe.model_copy(update={"serve": serve.model_copy(update=changed)})
            launched = self.launch(chosen, resolve_model(recipe.target.model), setup.draft, purpose)
            if cards:
                launched = replace(launched, environment={**launched.environment, "CUDA_VISIBLE_DEVICES": cards})
            say(f"{self.name}: {launched}")
            name = f"{self.name}-{str(shape).replace('/', '-') if shape else 'plain'}"
            log = setup.logs / f"{name}{f'-{number}' if number else ''}.log"
            engines[stack.enter_context(started(launched, log))] = log
            urls.append(launched.url)
        for (process, kept), url in zip(engines.items(), urls, strict=True):
            wait_until_healthy(process, url, serve.patience_s, kept)
        return tuple(urls), partial(require_alive, engines)

    # --- how it is asked and read -------------------------------------------------------------------------------

    path: ClassVar[str]
    """What every text is sent to."""
    seed: ClassVar[str]
    """Its name of a completion's seed."""
    to_complete: ClassVar[JsonObject]
    """What a request says for token ids in its answer,"""
    to_score: ClassVar[JsonObject]
    """for log-probabilities of the text that is sent,"""
    to_capture: ClassVar[JsonObject]
    """for the hidden states of that text."""

    @abstractmethod
    def body(self, model: str, ids: list[int], most: int, settings: JsonObject) -> JsonObject:
        """Of a request for at most so many tokens after a text."""

    @abstractmethod
    def read_logprobs(self, answer: Any) -> list[float]:
        """Log-probability of every token of the text after the first."""

    @abstractmethod
    def read_completion(self, answer: Any) -> Generation:
        """Token ids as generated, with the server's own finish reason and what it tells of its verification steps."""

    @abstractmethod
    def finish_reason(self, answer: Any) -> Any:
        """`stop` or `length`; anything else means that the server gave up in between."""

    @abstractmethod
    def read_capture(self, answer: Any) -> str | list[list[float]] | None:
        """Path of the safetensors file that the server writes or has written, or the numbers, one list a token.

        None if the server keeps no hidden states.
        """

    def capture_check(self, model_type: str) -> tuple[str, str, str] | None:
        """Before hidden states are believed: (what a server is asked by GET, what its answer has to hold, what is wrong
        where it does not); None where all of them are right."""
        return None

    def require_capture(self, recipe: Recipe) -> None:
        """Raises `TargetError` where nobody is named who would give the last layer's states to training."""
        if self.last_beside_taps and recipe.server.last_urls:
            raise TargetError(
                f"server.last_urls: given, but {self.title} keeps the last layer beside the taps; leave it out"
            )
        if not self.last_beside_taps and not recipe.server.last_urls:
            raise TargetError(
                f"server.last_urls: none given, but {self.title} returns the taps or the last layer, never both; start "
                "servers by `draftsmith serve RECIPE --purpose last`, too, and name them"
            )

    # --- how it is started --------------------------------------------------------------------------------------

    def require_settings(self, recipe: Recipe) -> None:
        """Raises `ServeError` where `serve` means another engine, or a secret of its flags is not there."""
        serve = recipe.serve
        if serve.engine != self.name and (serve.program or serve.extra):
            raise ServeError(
                f"serve.program and serve.extra: given for serve.engine {serve.engine}, but {self.name} is to be "
                f"started; give --serve.engine {self.name} and its own"
            )
        if unset := secrets.filled_in(shlex.split(serve.extra))[1]:
            raise ServeError(f"serve.extra: ${unset[0]} is not set in the environment; export it")

    def program_of(self, recipe: Recipe) -> tuple[str, ...]:
        return tuple(shlex.split(recipe.serve.program)) or self.program

    def launch(self, recipe: Recipe, model: str, draft: Path, purpose: Purpose, layers: Sequence[int] = ()) -> Launch:
        """`model`: path or hub name; `draft`: its directory; `layers`: taps and the last layer, for capture."""
        settings = recipe.serve
        arguments, environment = self.arguments(recipe, model, draft, purpose, layers)
        host = settings.host.strip("[]")
        arguments += ["--host", host, "--port", str(settings.port)]
        arguments += ["--dtype", str(DTYPES[recipe.target.dtype]).removeprefix("torch.")]
        if recipe.target.revision:
            arguments += ["--revision", recipe.target.revision]
        if recipe.target.trust_remote_code:
            arguments += ["--trust-remote-code"]
        if not settings.peer_to_peer:  # broken between PCIe cards more often than engines think
            arguments += ["--disable-custom-all-reduce"]
            environment = {**environment, "NCCL_P2P_DISABLE": "1"}
        arguments += shlex.split(settings.extra)
        scheme = "https" if re.search(r"--ssl[-_]certfile\b", settings.extra) else "http"
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # by this machine
        place = f"[{reached}]" if ":" in reached else reached
        return Launch((*self.program_of(recipe), *arguments), environment, f"{scheme}://{place}:{settings.port}")

    @abstractmethod
    def arguments(
        self, recipe: Recipe, model: str, draft: Path, purpose: Purpose, layers: Sequence[int]
    ) -> tuple[list[str], dict[str, str]]:
        """(flags, environment) of a server; see `launch`. Raises `ServeError`."""


def is_gemma3(model: str) -> bool:
    """Whether engines need help with its taps (docs/engines.md); a hub name is not looked up."""
    config = Path(model) / "config.json"
    if config.exists():
        try:
            return str(read_object(config).get("model_type")).startswith("gemma3")
        except ValueError as error:
            raise TargetError(f"target.model: {config}: {error}") from None
    return re.search(r"gemma-?3", model, re.IGNORECASE) is not None
