"""kill -9 at any moment, then the same command: the run goes on and ends with the same files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models import save_tiny_target, tiny_recipe, write_prompts

from draftsmith.core.files import read_json
from draftsmith.core.recipe_file import dump_recipe

# Files whose appearance is the moment to kill: in regeneration, between stages, in training, export and evaluation.
MOMENTS = (
    "prompts/prompts.jsonl",
    "completions/00001.jsonl",
    "vocab/coverage.json",
    "train/metrics.jsonl",
    "train/checkpoint-000006/state.json",
    "export/draft/model.safetensors",
    "evaluate/stage.json",
)
TIMED = {
    "timing.json",
    "timing.jsonl",
    "manifest.json",
    "report.html",
    "results.json",
}  # these hold durations, report/ a digest of them


def start(recipe: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "draftsmith", "run", str(recipe), "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def finish(recipe: Path, out: Path) -> str:
    process = start(recipe, out)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return err


def comparable(path: Path) -> bytes | dict:
    """A stage's record without the times of its files, and without those that hold durations."""
    if path.name != "stage.json":
        return path.read_bytes()
    state = read_json(path)
    outputs = {name: known["digest"] for name, known in state["outputs"].items() if Path(name).name not in TIMED}
    return {**state, "outputs": outputs}


def contents(out: Path) -> dict[str, bytes | dict]:
    return {
        str(path.relative_to(out)): comparable(path)
        for path in sorted(out.rglob("*"))
        if path.is_file()
        and path.name not in TIMED
        and path.parent.name not in ("report", "parts")
        and not path.name.startswith(".")
    }


def without_times(results: dict) -> dict:
    return {**results, "created_with": None, "speed": [s["differences"] for s in results["speed"]]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(recipe, directory of an undisturbed run)"""
    out = tmp_path_factory.mktemp("kill")
    model = save_tiny_target(out / "model")
    changes = {"train.epochs": 4, "train.checkpoint_every": 2, "regenerate.shard_prompts": 4}
    recipe = tiny_recipe(model, write_prompts(out / "p.jsonl", 24), **changes)
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    finish(out / "recipe.yaml", out / "whole")
    return out / "recipe.yaml", out / "whole"


def test_killed_everywhere_it_ends_the_same(whole, tmp_path):
    """One run, killed at each moment in turn and continued each time."""
    recipe, undisturbed = whole
    out = tmp_path / "killed"
    kills = 0
    for moment in MOMENTS:
        process = start(recipe, out)
        deadline = time.monotonic() + 120
        while process.poll() is None and not (out / moment).exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"{moment} was over before it could be killed"
    finish(recipe, out)
    assert kills == len(MOMENTS) >= 5
    assert contents(out) == contents(undisturbed)
    results = [read_json(directory / "evaluate" / "results.json") for directory in (out, undisturbed)]
    assert without_times(results[0]) == without_times(results[1])
