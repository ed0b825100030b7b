"""Trackers beside training: they get the rows of metrics.jsonl, and nothing they do stops a run."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from models import save_tiny_target, tiny_recipe, write_prompts

from draftsmith.core.errors import RecipeError
from draftsmith.core.records.training import HeldOut, MetricsRow
from draftsmith.core.run_files import METRICS
from draftsmith.runs.pipeline import run_pipeline
from draftsmith.runs.run import Run
from draftsmith.training import tracking
from draftsmith.training.tracking import tracked

FAKES = {
    "takes all": "",
    "fails at its start": "raise ConnectionError('no network')",
    "fails at a row": "if name == 'log' and step == 2: raise OSError('quota')",
    "hangs at a row": "if name == 'log' and step == 2: time.sleep(1000)",
    "kills itself": "if name == 'log': os._exit(3)",
}
WANDB = """
import json, os, time
def did(name, step=None, values=None):
    {trouble}
    with open({journal!r}, "a") as file:
        file.write(json.dumps([name, step, values]) + "\\n")
class Run:
    def log(self, values, step): did("log", step, values)
    def finish(self): did("finish")
def init(**settings):
    print("a tracker says hello")
    did("init", None, settings)
    return Run()
"""
ROWS = [
    MetricsRow(step=1, loss=2.5, alpha=[0.5, 0.25]),
    MetricsRow(step=2, loss=2.0, alpha=[0.6, 0.5]),
    MetricsRow(step=2, held_out=HeldOut(match=[0.5], alpha=[0.25], tau={3: 1.5}, verifications=7)),
    MetricsRow(step=3, loss=1.5),
]


def fake(monkeypatch, tmp_path: Path, trouble: str = "") -> Path:
    """A package that goes by the name of wandb."""
    journal, package = tmp_path / "journal", tmp_path / "package"
    package.mkdir()
    (package / "wandb.py").write_text(WANDB.format(trouble=trouble or "pass", journal=str(journal)))
    monkeypatch.syspath_prepend(str(package))
    return journal


def recipe(name: str | None):
    return tiny_recipe(
        "m", "p", **{"train.track": name, "target.engine": "vllm", "server.urls": ["http://10.0.0.1:8000"]}
    )


def written(out: Path, row: MetricsRow) -> None:
    with (out / METRICS).open("ab") as file:
        file.write(row.line())


def train(out: Path, name: str | None, step: int = 0) -> float:
    """What training does beside it; returns the seconds that it took."""
    started = time.monotonic()
    with tracked(recipe(name), out, step, main=True):
        for row in ROWS[step:]:
            written(out, row)
    return time.monotonic() - started


@pytest.mark.parametrize("trouble", FAKES)
def test_nothing_that_a_tracker_does_stops_training_and_what_it_lacks_is_counted(
    monkeypatch, tmp_path, capsys, trouble
):
    journal = fake(monkeypatch, tmp_path, FAKES[trouble])
    hangs = trouble.startswith("hangs")
    if hangs:
        monkeypatch.setattr(tracking, "FINISH_S", 1)
    seconds = train(tmp_path, "wandb")
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("track: ")]
    assert len(list(MetricsRow.read_rows(tmp_path / METRICS))) == len(ROWS)
    assert seconds < 30
    expected = {
        "takes all": None,
        "fails at its start": "took 0 of 4 rows",
        "fails at a row": "took 2 of 4 rows",
        "kills itself": "took 0 of 4 rows",
    }.get(trouble, "of 4 rows within 1 s")
    assert (expected is None) == (not any(" rows" in text for text in told)), told
    assert expected is None or expected in told[-1]
    assert sum(": training" in text or "; training goes on" in text for text in told) == trouble.startswith("fails")
    assert len(told) <= 2
    assert "hello" in (tmp_path / "tracking" / "wandb.log").read_text()
    if trouble == "takes all":
        (start, *logged, end) = [json.loads(text) for text in journal.read_text().splitlines()]
        assert (start[0], end[0]) == ("init", "finish")
        assert logged[0] == ["log", 1, {"loss": 2.5, "alpha/1": 0.5, "alpha/2": 0.25}]
        held_out = {"held_out/match/1": 0.5, "held_out/alpha/1": 0.25, "held_out/tau/3": 1.5}
        assert logged[2] == ["log", 2, {**held_out, "held_out/verifications": 7.0}]
        assert "10.0.0.1" not in journal.read_text(), "servers are nobody's business"
        assert start[2]["config"]["train.ttt_steps"] == "3"


def test_a_tracker_that_cannot_be_started_costs_a_line(monkeypatch, tmp_path, capsys):
    fake(monkeypatch, tmp_path)
    (tmp_path / "tracking").write_text("a file where its folder goes")
    train(tmp_path, "wandb")
    assert len(list(MetricsRow.read_rows(tmp_path / METRICS))) == len(ROWS)
    (told,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"track: wandb: .*File exists.*; training goes on, and \S+metrics.jsonl has every row", told)


def test_a_run_that_goes_on_sends_what_is_new_under_the_same_id(monkeypatch, tmp_path):
    journal = fake(monkeypatch, tmp_path)
    train(tmp_path, "wandb")
    before = journal.read_text().splitlines()
    (tmp_path / METRICS).write_bytes(ROWS[0].line())  # as `truncate_rows` leaves it
    train(tmp_path, "wandb", step=1)
    rows = [json.loads(text) for text in journal.read_text().splitlines()]
    assert [row[1] for row in rows if row[0] == "log"] == [1, 2, 2, 3, 2, 2, 3]
    ids = {row[2]["id"] for row in rows if row[0] == "init"}
    assert len(ids) == 1
    assert len(before) == 6


def test_a_row_that_comes_late_and_in_halves_is_sent(monkeypatch, tmp_path):
    sent, polls, late = [], iter(range(5)), ROWS[1].line()
    parts = {0: ROWS[0].line(), 2: late[:9], 4: late[9:]}

    class Ended:
        def wait(self, seconds):
            poll = next(polls)
            with (tmp_path / METRICS).open("ab") as file:
                file.write(parts.get(poll, b""))
            return poll == 4

    run = tracking.SimpleNamespace(log=lambda values, step: sent.append((step, values["loss"])), finish=lambda: None)
    monkeypatch.setitem(tracking.TRACKERS, "wandb", lambda request: run)
    told = []
    request = {"tracker": "wandb", "metrics": str(tmp_path / METRICS), "after": 0}
    tracking.follow(request, Ended(), told.append)
    assert sent == [(1, 2.5), (2, 2.0)]
    assert told == [1, 2]


def test_a_secret_is_not_sent(monkeypatch, tmp_path):
    journal = fake(monkeypatch, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    told = tiny_recipe("org/hf_verysecret", "p", **{"train.track": "wandb"})
    with tracked(told, tmp_path, 0, main=True):
        written(tmp_path, ROWS[0])
    assert "verysecret" not in journal.read_text()
    assert '"target.model": "org/***"' in journal.read_text()


def test_only_the_first_process_tells_a_tracker(monkeypatch, tmp_path):
    journal = fake(monkeypatch, tmp_path)
    with tracked(recipe("wandb"), tmp_path, 0, main=False):
        written(tmp_path, ROWS[0])
    assert not journal.exists()


def test_an_interrupted_training_does_not_wait_for_a_tracker_that_hangs(monkeypatch, tmp_path):
    fake(monkeypatch, tmp_path, "time.sleep(1000)")
    monkeypatch.setattr(tracking, "FINISH_S", 1)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), tracked(recipe("wandb"), tmp_path, 0, main=True):
        raise KeyboardInterrupt
    assert time.monotonic() - started < 5
    log = tmp_path / "tracking" / "wandb.log"

    def still_runs() -> bool:
        """Whoever holds the log."""
        held = [p for p in Path("/proc").glob("[0-9]*/fd/2") if os.access(p, os.R_OK)]
        return any(os.path.realpath(p) == str(log) for p in held)

    while still_runs():
        assert time.monotonic() - started < 30, "the process outlives the run"
        time.sleep(0.2)


def test_a_package_that_is_missing_is_told_before_anything_runs(tmp_path, monkeypatch):
    found = tracking.importlib.util.find_spec
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None if name == "trackio" else found(name))
    told = tiny_recipe(save_tiny_target(tmp_path / "model"), "p.jsonl", **{"train.track": "trackio"})
    run = Run(told, tmp_path / "run", ["test"])
    with pytest.raises(RecipeError, match=r'train.track: trackio given.*pip install "draftsmith\[trackio\]"'):
        run_pipeline(run)
    assert not (tmp_path / "run" / "prompts").exists()


def test_a_run_writes_tensorboard_events_that_are_its_metrics_and_no_output_of_the_stage(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = save_tiny_target(tmp_path / "model")
    changes = {"train.track": "tensorboard", "train.max_steps": 6}
    told = tiny_recipe(model, write_prompts(tmp_path / "prompts.jsonl"), **changes)
    run = Run(told, tmp_path / "run", ["test"])
    for stage in ("prompts", "regenerate", "vocab", "train"):
        run_pipeline(run, stage)
    rows = list(MetricsRow.read_rows(run.files.train / METRICS))
    events = EventAccumulator(str(run.files.train / "tracking"))
    events.Reload()
    written = {scalar.step: scalar.tensor_proto.float_val[0] for scalar in events.Tensors("loss")}
    assert written == {row.step: pytest.approx(row.loss) for row in rows if row.loss is not None}
    assert len(events.Tensors("held_out/tau/3")) == sum(row.held_out is not None for row in rows) > 0
    state = (run.files.train / "stage.json").read_text()
    assert "tracking" not in state, "what a tracker wrote may be thrown away"
