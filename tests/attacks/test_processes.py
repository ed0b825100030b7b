"""Processes that train together, of which one hangs, dies, or has less to do than the others."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from models import save_tiny_target, tiny_recipe, write_prompts

from draftsmith.core.files import read_json
from draftsmith.core.recipe_file import dump_recipe
from draftsmith.core.records.training import MetricsRow
from draftsmith.runs.pipeline import run_pipeline
from draftsmith.runs.run import Run

TIMEOUT_S = 18.0  # longer than a busy machine may keep one of them from working
PATIENCE_S = 240  # until they have begun, there
PACK_TOKENS = {1: 500, 3: 192}  # so many packs do the completions of the run that is prepared here make


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Directory with a recipe, and a run of it that is ready to be trained."""
    out = tmp_path_factory.mktemp("world")
    model, prompts = save_tiny_target(out / "model"), write_prompts(out / "prompts.jsonl", 40)
    recipe = tiny_recipe(model, prompts, **{"train.accumulate": 2, "train.log_every": 1})
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    run = Run(recipe, out / "run", ["test"])
    for stage in ("prompts", "regenerate", "vocab"):
        run_pipeline(run, stage)
    return out


def copy_of(world, out):
    return shutil.copytree(world / "run", out / "run")


def ranks(command, count=2, **options):
    """The processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    common |= {"LOCAL_WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )
        for rank in range(count)
    ]


def training(world, out, *flags, count=2):
    command = [sys.executable, "-m", "draftsmith", "train", str(world / "recipe.yaml"), "--out", str(out), *flags]
    return ranks([*command, "--train.timeout-min", str(TIMEOUT_S / 60)], count)


def wait_for(path, lines, processes):
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.05)
    raise AssertionError([process.communicate()[1] for process in processes if process.poll() is not None])


def end(processes):
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize(("hangs", "shard"), [(1, False), (0, True)])
def test_a_process_that_hangs_ends_the_others_in_time_and_in_a_line(world, tmp_path, hangs, shard):
    out = copy_of(world, tmp_path)
    flags = ["--train.epochs", "4000", *(["--train.shard"] if shard else [])]
    processes = training(world, out, *flags)
    try:
        wait_for(out / "train" / "metrics.jsonl", 5, processes)
        processes[hangs].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        other = processes[1 - hangs]
        _, err = other.communicate(timeout=TIMEOUT_S + 60)
        assert time.monotonic() - stopped > TIMEOUT_S - 2
        assert other.returncode == 2
        assert "Traceback" not in err
        line = err.splitlines()[-1]
        assert line.startswith("draftsmith: train: another process says nothing for 0.3 min (train.timeout_min); ")
        again = "go on with: torchrun --nproc-per-node 2 -m draftsmith train "
        assert again in line
        assert line.endswith(f"--train.timeout-min {TIMEOUT_S / 60}")
    finally:
        end(processes)
    # The command in the line goes on.
    steps = MetricsRow.read_rows(out / "train" / "metrics.jsonl")
    assert max(row.step for row in steps) >= 3
    processes = training(world, out, *flags)
    try:
        told = processes[0].stderr
        assert any("train: continuing from checkpoint-" in line for line in told)
    finally:
        end(processes)


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_others_at_once_in_a_line(world, tmp_path, dies):
    out = copy_of(world, tmp_path)
    processes = training(world, out, "--train.epochs", "4000")
    try:
        wait_for(out / "train" / "metrics.jsonl", 5, processes)
        processes[dies].kill()
        other = processes[1 - dies]
        _, err = other.communicate(timeout=TIMEOUT_S + 60)
        assert other.returncode == 2
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith("draftsmith: train: another process ended; what is finished is kept")
    finally:
        end(processes)


WAITING = """
import os, sys, time
from draftsmith.core.errors import TrainingError
from draftsmith.training.processes import ProcessGroup
processes = ProcessGroup(timeout_min=9 / 60)
processes.wait()
if processes.main:
    time.sleep(12)  # regenerates
processes.wait()
with processes.together():
    processes.meet()
    assert processes.sum([1, 2]) == [2, 4]
print("met", flush=True)
if not processes.main:
    time.sleep(600)  # hangs
try:
    with processes.together():
        processes.meet()
except TrainingError as error:
    print(error, flush=True)
    os._exit(0)
"""


def test_the_others_wait_for_the_first_as_long_as_it_works_and_no_longer(tmp_path):
    first, second = ranks([sys.executable, "-c", WAITING])
    try:
        out, err = first.communicate(timeout=PATIENCE_S)
        assert out.startswith("met\ntrain: another process says nothing for 0.15 min"), err
    finally:
        end([first, second])


@pytest.mark.parametrize("packs", PACK_TOKENS)
@pytest.mark.parametrize("shard", [False, True])
def test_fewer_packs_than_processes_take_do_not_hang(world, tmp_path, packs, shard):
    """The only step is dealt out unevenly, and the weights that come out are those of one process."""
    losses = []
    for count in (1, 2):
        out = copy_of(world, tmp_path / str(count))
        flags = ["--train.accumulate", "8", "--train.pack-tokens", str(PACK_TOKENS[packs]), "--train.epochs", "1"]
        flags += ["--train.held-out", "20", *(["--train.shard"] if shard and count > 1 else [])]
        processes = training(world, out, *flags, count=count)
        try:
            for process in processes:
                _, err = process.communicate(timeout=PATIENCE_S)
                assert process.returncode == 0, err
        finally:
            end(processes)
        assert read_json(out / "train" / "summary.json")["steps"] == 1
        rows = list(MetricsRow.read_rows(out / "train" / "metrics.jsonl"))
        losses.append([(row.loss, row.gradient_norm) for row in rows if row.loss is not None])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
