"""Terminals, pipes and disks that are closed, full or gone, and Ctrl-C at any moment."""

import errno
import os
import pty
import resource
import signal
import subprocess
import sys
import time

import pytest
from models import save_tiny_target, tiny_recipe, write_prompts

from draftsmith import cli
from draftsmith.core import files
from draftsmith.core.recipe_file import dump_recipe
from draftsmith.core.records.training import MetricsRow
from draftsmith.runs.pipeline import run_pipeline
from draftsmith.runs.run import Run

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
PATIENCE_S = 300  # with a busy machine


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Directory with a recipe, and a run of it that is ready to be trained."""
    out = tmp_path_factory.mktemp("world")
    recipe = tiny_recipe(save_tiny_target(out / "model"), write_prompts(out / "prompts.jsonl"))
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    run = Run(recipe, out / "run", ["test"])
    for stage in ("prompts", "regenerate", "vocab"):
        run_pipeline(run, stage)
    return out


@pytest.fixture
def ready(world, tmp_path):
    """A copy of the run that is ready to be trained."""
    subprocess.run(["cp", "-a", str(world / "run"), str(tmp_path / "run")], check=True)
    return tmp_path / "run"


def words(world, *arguments):
    return [sys.executable, "-m", "draftsmith", arguments[0], str(world / "recipe.yaml"), *map(str, arguments[1:])]


# --- lines that nobody reads --------------------------------------------------------------------------------------


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return write


def hung_up_terminal():
    master, terminal = pty.openpty()
    os.close(master)
    return terminal


GONE = {
    "a pipe that nobody reads": closed_pipe,
    "a full disk": lambda: os.open("/dev/full", os.O_WRONLY),
    "a terminal that is gone": hung_up_terminal,
    "nothing at all": lambda: None,
}


def done_with(command, **streams):
    """Runs it with stdout and stderr as given (None: closed); what is left is read."""
    given = {name: GONE[streams[name]]() if name in streams else subprocess.PIPE for name in ("stdout", "stderr")}
    numbers = {"stdout": 1, "stderr": 2}
    closed = [numbers[name] for name, stream in given.items() if stream is None]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        text=True,
        preexec_fn=lambda: [os.close(number) for number in closed],
        **{name: stream for name, stream in given.items() if stream is not None},
    )
    out, err = process.communicate(timeout=PATIENCE_S)
    for stream in given.values():
        if stream is not None and stream >= 0:
            os.close(stream)
    return process.returncode, out or "", err or ""


@pytest.mark.parametrize("gone", GONE)
def test_a_training_whose_lines_nobody_takes_goes_on(world, ready, gone):
    code, _, _ = done_with(words(world, "train", "--out", ready), stderr=gone)
    assert code == 0
    assert len(list(MetricsRow.read_rows(ready / "train" / "metrics.jsonl"))) >= 4
    for path in ready.rglob("*.json*"):  # no line of ours or of a library in a file that took the number of stderr
        assert b"train: " not in path.read_bytes()


def test_a_training_goes_on_when_its_terminal_goes_away(world, ready):
    master, terminal = pty.openpty()
    command = words(world, "train", "--out", ready, "--train.epochs", "20")
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=terminal, stdout=terminal, stdin=subprocess.DEVNULL)
    os.close(terminal)
    seen = b""
    while b"steps" not in seen:  # the bar is there
        seen += os.read(master, 4096)
    os.close(master)
    assert process.wait(timeout=PATIENCE_S) == 0
    assert (ready / "train" / "summary.json").exists()


@pytest.mark.parametrize("gone", GONE)
def test_results_that_nobody_takes_are_one_line_or_silence(world, gone):
    for command in (words(world, "run", "--dry-run"), words(world, "card", "--help"), words(world, "--help")[:4]):
        code, _, err = done_with(command, stdout=gone)
        lines = err.splitlines()
        assert len(lines) <= 1
        assert all(line.startswith("draftsmith: stdout: ") for line in lines)
        assert code == (2 if lines else 0)
    if gone == "a full disk":
        code, _, err = done_with(words(world, "run", "--dry-run"), stdout=gone)
        assert (code, err.count("No space left on device")) == (2, 1)


@pytest.mark.parametrize("gone", GONE)
def test_a_mistake_that_nobody_can_be_told_of_is_still_one(world, gone):
    assert done_with(words(world, "run", "--seed", "x"), stdout=gone, stderr=gone)[0] == 2
    assert done_with(words(world, "rnu"), stderr=gone)[:2] == (2, "")


def test_head_takes_what_it_wants(world):
    shell = " ".join(words(world, "run", "--dry-run")) + " | head -1; echo ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", shell], env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.stdout, done.stderr) == ("name: tiny\n0\n", "")


def test_names_that_are_no_text_are_printed_all_the_same(world, tmp_path):
    out = os.fsencode(tmp_path) + b"/\xff\xfe"
    command = [*map(os.fsencode, words(world, "run", "--dry-run", "--out")), out]
    plain = ENVIRONMENT | {"LC_ALL": "C"}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"run directory: " in done.stdout


# --- disks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 100, 5_000, 20_000, 60_000])
def test_a_file_that_may_not_grow_is_one_line_and_the_run_goes_on_later(world, tmp_path, most):
    """EFBIG, as `ulimit -f` makes it."""
    out = tmp_path / "run"
    command = words(world, "run", "--out", out)
    done = subprocess.run(
        command,
        env=ENVIRONMENT | {"PYTHONDONTWRITEBYTECODE": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        timeout=PATIENCE_S,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("draftsmith: ")
    assert ("File too large" if most else "No usable temporary directory") in done.stderr.splitlines()[-1]
    again = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert again.returncode == 0, again.stderr
    assert (out / "report.html").exists()


@pytest.mark.parametrize("number", sorted(cli.DISK))
def test_a_disk_that_fails_is_one_line(world, tmp_path, monkeypatch, capsys, number):
    def fail(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "argv", ["draftsmith", *words(world, "prompts", "--out", tmp_path / "run")[3:]])
    monkeypatch.setattr(files, "sync", fail)
    assert cli.main() == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"draftsmith: {os.strerror(number)}; mend it or give another --out")


def test_an_error_of_ours_stays_one(world, tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.ENOTCONN, "a bug")

    monkeypatch.setattr(sys, "argv", ["draftsmith", *words(world, "prompts", "--out", tmp_path / "run")[3:]])
    monkeypatch.setattr(files, "sync", fail)
    with pytest.raises(OSError, match="a bug"):
        cli.main()


# --- Ctrl-C -------------------------------------------------------------------------------------------------------


BEGUN = "import sys; print('begun', flush=True); from draftsmith.__main__ import main; sys.exit(main())"


def started(command):
    """A process that has got to our first lines: before that Python itself would speak."""
    command = [sys.executable, "-c", BEGUN, *command[3:]]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # these tests may run in the background
    )
    assert process.stdout.readline() == b"begun\n"
    time.sleep(0.02)
    return process


MOMENTS = (0.0, 0.03, 0.07, 0.12, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2, 2.8)


def test_control_c_ends_it_at_any_moment_in_a_line(world, ready, attacks):
    attacks(len(MOMENTS))
    for moment in MOMENTS:
        process = started(words(world, "train", "--out", ready, "--train.epochs", "4000"))
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
        told = err.decode()
        assert process.returncode == 130, (moment, told)
        assert "Traceback" not in told, moment
        assert "Exception ignored" not in told, moment
        last = told.splitlines()[-1:]  # or silence, before there is anything to be told
        assert not last or last[0].startswith("draftsmith: interrupted; what is finished is kept"), moment


def test_an_impatient_control_c_ends_it_too(world, ready, attacks):
    attacks(5)
    for moment in (0.0, 0.3, 0.8, 1.5, 2.5):
        process = started(words(world, "train", "--out", ready, "--train.epochs", "4000"))
        time.sleep(moment)
        for _ in range(4):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130, err
        assert b"Traceback" not in err, moment


def test_a_program_that_was_told_to_ignore_control_c_does(world, ready):
    """As shells start what runs in the background."""
    command = words(world, "train", "--out", ready)
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, err = process.communicate()
    assert process.returncode == 0, err
