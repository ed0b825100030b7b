"""Several processes train what one process trains: equal curves at equal batches, and resume at another world size."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from models import save_tiny_target, tiny_recipe, write_prompts

from draftsmith.core.files import read_json, write_json
from draftsmith.runs.pipeline import run_pipeline
from draftsmith.runs.run import Run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run directory up to the vocabulary, and its recipe file."""
    out = tmp_path_factory.mktemp("world")
    model, prompts = save_tiny_target(out / "model"), write_prompts(out / "prompts.jsonl", 40)
    recipe = tiny_recipe(
        model,
        prompts,
        **{"train.accumulate": 2, "train.epochs": 3, "train.evaluate_every": 3, "train.keep_checkpoints": 9},
        **{"train.held_out": 12},  # several packs, which are shared out, too
    )
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    run = Run(recipe, out / "run", ["test"])
    for stage in ("prompts", "regenerate", "vocab"):
        run_pipeline(run, stage)
    return out


def train(prepared, name, processes, *flags):
    """Metrics of a training by this many processes; the directory `name` may hold an unfinished one."""
    out = prepared / name
    if not out.exists():
        shutil.copytree(prepared / "run", out)
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += ["draftsmith", "train", str(prepared / "recipe.yaml"), "--out", str(out), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "train" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in lines if "loss" in row]
    held_out = [row["held_out"] for row in lines if "held_out" in row]
    taus = [measured["tau"]["3"] for measured in held_out]
    verifications = [measured["verifications"] for measured in held_out]  # each pack counts once
    assert len(losses) >= 4
    return [*losses, *taus, *verifications], done.stderr


def forget_the_end(prepared, name, copy):
    """The same run as if it had been killed after its first checkpoint."""
    shutil.copytree(prepared / name, prepared / copy)
    train_dir = prepared / copy / "train"
    for later in sorted(train_dir.glob("checkpoint-*"))[1:]:
        shutil.rmtree(later)
    (train_dir / "summary.json").unlink()
    write_json(train_dir / "stage.json", read_json(train_dir / "stage.json") | {"finished": False})


def test_two_processes_train_what_one_trains_and_take_over_from_each_other(prepared):
    alone, _ = train(prepared, "alone", 1)
    two, told = train(prepared, "two", 2)
    assert told.count("2 processes") == 1  # one speaks for all
    assert two == pytest.approx(alone, rel=1e-4)
    sharded, _ = train(prepared, "sharded", 2, "--train.shard")
    assert sharded == pytest.approx(alone, rel=1e-4)
    assert read_json(prepared / "two" / "train" / "summary.json")["steps"] >= 6
    for source, processes, flags in (
        ("two", 1, ()),
        ("alone", 2, ()),
        ("alone", 2, ("--train.shard",)),
        ("sharded", 1, ()),
    ):
        copy = f"{source}-by-{processes}-{len(flags)}"
        forget_the_end(prepared, source, copy)
        again, told = train(prepared, copy, processes, *flags)
        assert "continuing from checkpoint-000003" in told
        assert again == pytest.approx(alone, rel=1e-4)


def test_packs_that_cannot_be_dealt_out_are_refused(prepared):
    with pytest.raises(AssertionError, match=r"train\.accumulate: 3 packs a step cannot be dealt out to 2 processes"):
        train(prepared, "uneven", 2, "--train.accumulate", "3")
