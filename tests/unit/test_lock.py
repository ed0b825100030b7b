"""One writer per run directory; a killed one leaves nothing to clean."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from draftsmith.core.errors import DataError
from draftsmith.core.lock import RunLock

HOLD = "import sys, time; from pathlib import Path; from draftsmith.core.lock import RunLock\n" + (
    "with RunLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


def test_the_second_writer_is_told_the_first_ones_process_and_a_kill_frees_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(DataError, match=rf"is being written by process {holder.pid}; wait for it") as caught:
        RunLock(tmp_path).__enter__()
    assert "\n" not in str(caught.value)
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    with RunLock(tmp_path) as lock:
        lock.require()


def test_it_may_be_entered_again_by_its_holder_and_by_others_after_it(tmp_path):
    lock = RunLock(tmp_path)
    with lock, lock, pytest.raises(DataError):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def test_a_writer_that_slept_finds_out_that_its_directory_was_taken(tmp_path):
    with RunLock(tmp_path) as lock:
        (tmp_path / ".lock").unlink()  # as somebody does who thinks it was left behind
        with RunLock(tmp_path), pytest.raises(DataError, match="was taken by another process meanwhile"):
            lock.require()


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")  # as NFS without a lock daemon does

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DataError, match=r"cannot lock \(No locks available\)"):
        RunLock(tmp_path).__enter__()
