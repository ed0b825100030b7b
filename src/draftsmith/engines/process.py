"""A command that starts an engine, and the life of that engine from start to stop."""

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import httpx2 as httpx

from draftsmith.core import secrets
from draftsmith.core.errors import ServeError
from draftsmith.core.progress import say

STOP_S = 30.0  # an engine is given this long to stop by itself
POLL_S = 0.5


@dataclass(frozen=True)
class Launch:
    """A command (its secrets are `$NAME`), what it adds to the environment, and where its server will answer."""

    command: tuple[str, ...]
    environment: dict[str, str]
    url: str

    def __str__(self) -> str:
        """A line for a shell."""
        added = [f"{k}={shlex.quote(v)}" for k, v in self.environment.items()]
        return " ".join([*added, secrets.shell_line(self.command)])


@contextlib.contextmanager
def running(launched: Launch, patience_s: float, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """The engine, healthy; stopped in every case."""
    with started(launched, log) as process:
        wait_until_healthy(process, launched.url, patience_s, log)
        yield process


@contextlib.contextmanager
def started(launched: Launch, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """The engine, loading; its log goes to our own output or a file; stopped in every case, even if we are killed."""
    command, missing = secrets.filled_in(launched.command)
    if missing:
        raise ServeError(f"serve.extra: ${missing[0]} is not set in the environment; export it")
    _require_free(launched.url)
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    kept = log.open("ab", buffering=0) if log else None
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **launched.environment},
            stdout=subprocess.PIPE if kept else None,
            stderr=subprocess.STDOUT if kept else None,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches us alone, and we stop the engine in order
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    except OSError as error:
        if kept:
            kept.close()
        raise ServeError(
            f"serve.program: cannot start {launched.command[0]!r}: {error.strerror}; install the engine or "
            'name it, for example --serve.program "/opt/engine/bin/vllm serve"'
        ) from None
    keeper = threading.Thread(target=_keep, args=(process.stdout, kept), daemon=True) if kept else None
    try:
        if keeper:
            keeper.start()
        yield process
    finally:
        stop(process)
        if keeper:
            keeper.join(STOP_S)


def _keep(output: IO[bytes], log: IO[bytes]) -> None:
    """Write down what the engine says, without the secrets that engines tell of their own command line. It must never
    have to wait, so what a full disk does not take is lost."""
    with output, log:
        for line in output:
            with contextlib.suppress(OSError):
                log.write(secrets.masked(line.decode(errors="replace")).encode())


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the engine, and SIGKILL to all its processes if it does not go, or at a second Ctrl-C."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    finally:
        with contextlib.suppress(ProcessLookupError):  # workers that outlived it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _require_free(url: str) -> None:
    """A server that is already there would answer in our engine's place."""
    place = urlsplit(url)
    with contextlib.suppress(OSError), socket.create_connection((place.hostname or "", place.port or 80), timeout=2):
        raise ServeError(f"serve.port: something already answers at {url}; stop it, or give another --serve.port")


def _die_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def require_alive(engines: Mapping[subprocess.Popen[bytes], Path | None]) -> None:
    """Raises `ServeError` where none of them runs any more, with the first one's exit code and log."""
    codes = [process.poll() for process in engines]
    if None not in codes:
        log = next(filter(None, engines.values()), "its log")
        raise ServeError(f"serve: the engine stopped with exit code {codes[0]}; {log} says why")


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, patience_s: float, log: Path | None = None) -> None:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        require_alive({process: log})
        try:
            # No proxy stands between us and our own process, and nobody is told anything, so no certificate is needed.
            answer = httpx.get(f"{url}/health", timeout=5, trust_env=False, verify=False)
            if answer.status_code == 200 and process.poll() is None:
                return
        except httpx.RequestError:
            pass  # not up yet
        time.sleep(POLL_S)
    raise ServeError(
        f"serve.patience_s: the engine did not answer within {patience_s:g} s; give it more or see {log or 'its log'}"
    )


def serve(launched: Launch, patience_s: float) -> int:
    """Run until the engine ends or Ctrl-C; returns the engine's exit code, 0 if we stopped it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    say(f"serve: {launched}")
    try:
        with running(launched, patience_s) as process:
            say(f"serve: ready at {launched.url}; Ctrl-C stops it")
            code = process.wait()
            say(f"serve: the engine ended with exit code {code}")
            return 0 if code == 0 else 1
    except KeyboardInterrupt:
        say("serve: stopped")
        return 0
