"""Kills and power cuts at every rename of a run: the same command goes on and ends with the same files.

The states are copies that the run makes of itself, so that each is exactly what a kill at that moment would leave. A
power cut leaves less: content that was never synced is gone, and the whole file where its directory was not synced
either.
"""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from models import save_tiny_target, tiny_recipe, write_prompts

from draftsmith.core.files import read_json
from draftsmith.runs import pipeline
from draftsmith.runs.run import Run

TIMED = {"timing.json", "timing.jsonl", "manifest.json", "report.html", "results.json"}


def again(recipe, directory):
    with contextlib.closing(Run(recipe, directory, ["test"])) as run:
        pipeline.run_pipeline(run)


def comparable(path: Path):
    if path.name != "stage.json":
        return path.read_bytes()
    state = read_json(path)
    outputs = {name: known["digest"] for name, known in state["outputs"].items() if Path(name).name not in TIMED}
    return {**state, "outputs": outputs}


def contents(out: Path):
    kept = (p for p in out.rglob("*") if p.is_file() and p.name not in TIMED | {".lock"} and "parts" not in p.parts)
    return {str(p.relative_to(out)): comparable(p) for p in sorted(kept) if p.parent.name != "report"}


class Recorder:
    """Copies of a directory at every rename in it, and what of each would outlive a power cut."""

    def __init__(self, root: Path, states: Path):
        self.root, self.states = root, states
        self.synced: dict[int, tuple[int, int]] = {}  # inode: size and time of what is on the disk
        self.names: dict[int, set[str]] = {}  # inode of a directory: names in it that are on the disk
        self.count = 0
        self._fsync, self._replace, self._rename = os.fsync, os.replace, os.rename

    def fsync(self, handle):
        self._fsync(handle)
        status = os.fstat(handle)
        self.synced[status.st_ino] = status.st_size, status.st_mtime_ns
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_dir():
            self.names[status.st_ino] = set(os.listdir(path))

    def replace(self, source, target, **options):
        self._replace(source, target, **options)
        self.copy(target)

    def rename(self, source, target, **options):
        self._rename(source, target, **options)
        self.copy(target)

    def copy(self, target):
        if self.root not in Path(target).parents:
            return
        lost = self.lost()
        whole = self.states / f"{self.count:03d}"
        for kind in ("killed", "cut") if lost else ("killed",):
            shutil.copytree(self.root, whole / kind)
        for path in lost:
            left = whole / "cut" / path.relative_to(self.root)
            if path.name in self.names.get(path.parent.stat().st_ino, set()):
                os.truncate(left, self.synced.get(path.stat().st_ino, (0, 0))[0])  # what was added later is gone
            else:
                left.unlink()
        self.count += 1

    def lost(self):
        """Files that are not on the disk as they are."""

        def safe(status):
            return self.synced.get(status.st_ino) == (status.st_size, status.st_mtime_ns)

        files = [path for path in self.root.rglob("*") if path.is_file() and path.name != ".lock"]
        return [path for path in files if not safe(path.stat())]


@pytest.fixture(autouse=True)
def one_commit(monkeypatch):
    """Whoever edits the checkout meanwhile would change what the draft says of its origin."""
    monkeypatch.setattr("draftsmith.runs.run.commit", lambda: "0" * 12)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(recipe, directory of an undisturbed run, its states)"""
    out = tmp_path_factory.mktemp("disk")
    model = save_tiny_target(out / "model")
    changes = {"train.checkpoint_every": 2, "regenerate.shard_prompts": 9, "train.keep_checkpoints": 1}
    changes |= {"train.epochs": 1, "evaluate.shapes": ["3/1/4"], "evaluate.max_new_tokens": 6}
    recipe = tiny_recipe(model, write_prompts(out / "p.jsonl"), **changes)
    recorder = Recorder(out / "run", out / "states")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", recorder.fsync)
        patch.setattr(os, "replace", recorder.replace)
        patch.setattr(os, "rename", recorder.rename)
        patch.setattr("draftsmith.runs.run.commit", lambda: "0" * 12)
        again(recipe, out / "run")
    assert recorder.count > 40
    return recipe, out / "run", sorted((out / "states").iterdir())


@pytest.mark.parametrize("kind", ["killed", "cut"])
def test_from_every_state_the_run_ends_with_the_same_files(recorded, kind, attacks):
    recipe, undisturbed, states = recorded
    wanted = contents(undisturbed)
    states = [state for state in states if (state / kind).exists()]
    assert states
    attacks(len(states))
    for state in states:
        again(recipe, state / kind)
        assert contents(state / kind) == wanted, f"after rename {state.name}"
        shutil.rmtree(state / kind)


def test_what_is_finished_outlives_a_power_cut(recorded, tmp_path):
    """The cut comes when the run is done: nothing has to be made again."""
    recipe, undisturbed, _ = recorded
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(tmp_path / "run", tmp_path / "states")
        patch.setattr(os, "fsync", recorder.fsync)
        again(recipe, tmp_path / "run")
    recorder.copy(tmp_path / "run" / "any")
    left = tmp_path / "states" / "000"
    assert contents(left / "killed") == contents(undisturbed)
    assert {p for p in recorder.lost() if p.name != "timing.jsonl"} == set()
