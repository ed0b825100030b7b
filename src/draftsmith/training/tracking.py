"""Rows of metrics.jsonl on Weights & Biases, Trackio or TensorBoard, sent by a process of its own.

A tracker is a program of others that waits for networks: beside training it may be slow, fail or hang, and training
does not notice. It follows the file that training writes, so it is handed nothing.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from draftsmith.core import run_files
from draftsmith.core.errors import RecipeError
from draftsmith.core.files import JsonObject, write_atomic
from draftsmith.core.progress import say
from draftsmith.core.recipe import Recipe
from draftsmith.core.records.training import MetricsRow
from draftsmith.core.secrets import line, masked

FINISH_S = 60  # that a tracker has for the rest of its work when training has ended
START_S = 20  # that it may need before it knows
POLL_S = 0.5
TOLD = ("target", "regenerate", "vocab", "draft", "train")  # parts of the recipe that a tracker is told


def require_tracker(name: str | None) -> None:
    """Raises `RecipeError` where the package is missing."""
    if name and importlib.util.find_spec(name) is None:
        raise RecipeError(
            f'train.track: {name} given, but it is not installed; pip install "draftsmith[{name}]", or leave it out'
        )


def tracked(recipe: Recipe, out: Path, step: int, main: bool) -> contextlib.AbstractContextManager[object]:
    """Have the rows after `step` sent to `train.track` while this goes on, by the first process alone."""
    if (name := recipe.train.track) and main:
        try:
            return _Tracker(recipe, name, out, step)
        except (OSError, RuntimeError) as error:  # no room, no process, no thread for one
            say(f"track: {name}: {error}; training goes on, and {out / run_files.METRICS} has every row")
    return contextlib.nullcontext()


class _Tracker(contextlib.AbstractContextManager[object]):
    """The process, and what it says."""

    def __init__(self, recipe: Recipe, name: str, out: Path, step: int):
        self.name, self.metrics, self.step, self.sent = name, out / run_files.METRICS, step, 0
        folder = out / "tracking"
        folder.mkdir(exist_ok=True)
        mark = folder / "id"  # a run that goes on is the same one there
        if not mark.exists():
            write_atomic(mark, secrets.token_hex(4))
        values = recipe.model_dump(mode="json")
        request = {
            "tracker": name,
            "run": recipe.name,
            "id": mark.read_text(),
            "config": {f"{part}.{key}": masked(str(value)) for part in TOLD for key, value in values[part].items()},
            "metrics": str(self.metrics.resolve()),
            "folder": str(folder.resolve()),
            "after": step,
            "finish_s": FINISH_S,
        }
        with (folder / f"{name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))},
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for training
            )
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stdout
        with self.process.stdout as answers:
            for told in answers:
                if told.strip().isdecimal():
                    self.sent = int(told)
                else:
                    say(line(f"track: {self.name}: {told.strip()}; training goes on, and {self.metrics} has every row"))
        self.process.wait()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last rows, and not for ever; say how many did not arrive. After an error it ends by itself, and
        nobody waits for it."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        if kind is not None:
            return
        try:
            self.process.wait(FINISH_S + START_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        ended = self.process.wait()
        self.listener.join(1)
        why = f" within {FINISH_S} s" if ended in (-signal.SIGALRM, -signal.SIGKILL) else ""
        every = sum(row.step > self.step for row in MetricsRow.read_rows(self.metrics))
        if self.sent < every or why:
            say(f"track: {self.name} took {self.sent} of {every} rows{why}; {self.metrics} has all")


# --- in the process of its own ------------------------------------------------------------------------------------


def _wandb(request: JsonObject) -> Any:
    import wandb

    return wandb.init(
        project="draftsmith",
        name=request["run"],
        id=request["id"],
        resume="allow",
        config=request["config"],
        dir=request["folder"],
        settings={"console": "off", "disable_git": True, "disable_code": True},
    )


def _trackio(request: JsonObject) -> Any:
    import trackio

    name = f"{request['run']}-{request['id']}"
    return trackio.init(project="draftsmith", name=name, config=request["config"], resume="allow")


def _tensorboard(request: JsonObject) -> Any:
    from tensorboard.summary import Writer

    writer = Writer(request["folder"])

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return SimpleNamespace(log=log, finish=writer.close)


# Each makes of a request a run with `log(values by name, step=...)` and `finish()`.
TRACKERS = {"wandb": _wandb, "trackio": _trackio, "tensorboard": _tensorboard}


def flat(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """`held_out/tau/3` of nested values; depths count from 1."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value, 1):
            yield from flat(inner, f"{name}/{key}" if name else str(key))
    elif value is not None:
        yield name, float(value)


def follow(request: JsonObject, ended: threading.Event, report: Callable[[object], None]) -> None:
    """Send every row after the step asked for, until training has ended and no row is left."""
    faults = sent = position = 0
    run = TRACKERS[request["tracker"]](request)
    metrics = Path(request["metrics"])
    last = False
    while not last:
        last = ended.wait(POLL_S)
        if not metrics.exists():
            continue
        with metrics.open("rb") as file:
            file.seek(position)
            *whole, torn = file.read().split(b"\n")
            position = file.tell() - len(torn)
        for row in map(MetricsRow.model_validate_json, whole):
            if row.step <= request["after"]:
                continue
            values = dict(flat(row.model_dump(mode="json", exclude={"step"})))
            try:
                run.log(values, step=row.step)
                sent += 1
            except Exception as error:  # others' code raises what it likes; one line, however many rows it refuses
                faults += 1
                if faults == 1:
                    report(f"{type(error).__name__}: {error}")
            report(sent)
    run.finish()


def serve() -> None:
    """Follow as the first line of stdin asks, until there is no more of it."""
    request = json.loads(sys.stdin.readline())
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a tracker prints goes to its log
    ended = threading.Event()

    def report(text: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(" ".join(str(text).split()), file=told, flush=True)

    def wait() -> None:
        sys.stdin.read()
        signal.alarm(request["finish_s"])  # which ends the process, whatever it hangs in
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    try:
        follow(request, ended, report)
    except Exception as error:
        report(f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    serve()
