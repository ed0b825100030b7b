"""Files of hidden states, as vLLM's connector writes them: read once, then deleted.

The server holds a lock beside each file until it is written. Both may be missing or torn where the server's disk is
full or a network share keeps no locks; such a text is asked for again.
"""

import contextlib
import fcntl
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftsmith.core.errors import TargetError
from draftsmith.core.secrets import line

FILE_PREFIX, FORGOTTEN_S = "draftsmith-", 3600.0  # our requests' names, and when a file of theirs is nobody's any more
LOCK_POLL_S = 0.005


class Retry(Exception):
    """A failure that another attempt, or another replica, may not see; not before `after_s`, if the server says so."""

    def __init__(self, why: str, after_s: float = 0.0):
        super().__init__(line(why))
        self.after_s = after_s


def _wait_until_written(path: Path, patience_s: float) -> None:
    """For the lock that the server holds until then."""
    deadline = time.monotonic() + patience_s
    with path.with_name(f"{path.name}.lock").open() as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Retry(f"{path} was not written within {patience_s:g} s (server.deadline_s)") from None
                time.sleep(LOCK_POLL_S)


def _delete(path: Path) -> None:
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _require_seen(path: Path) -> None:
    """A server's folder that this machine does not see is an error: its files could neither be read nor deleted."""
    if not path.parent.is_dir():
        raise TargetError(
            f"server.hidden_states: the server keeps its hidden states in {path.parent}, which this machine does not "
            "see; give the folder where it does, or, to let it only answer, a server of `serve --purpose plain`"
        )


def discard_states(path: Path, patience_s: float) -> None:
    _require_seen(path)
    try:
        with contextlib.suppress(FileNotFoundError):
            _wait_until_written(path, patience_s)
            _delete(path)
    except OSError as error:
        raise Retry(f"{path}: {error}") from None


def from_numbers(kept: Any, dtype: torch.dtype) -> Tensor:
    """Hidden states that came as text, one list a token or several; raises `ValueError` where they are no numbers."""
    try:
        rows = torch.tensor(kept, dtype=torch.float64)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(str(error)) from None
    if rows.dim() < 2 or not rows.numel():
        raise ValueError(f"a list of the shape {list(rows.shape)}")
    return rows.to(dtype)


def take_states(path: Path, ids: list[int], count: int, hidden_size: int, patience_s: float) -> Tensor:
    _require_seen(path)
    try:
        _wait_until_written(path, patience_s)
        with safe_open(path, "pt") as file:
            states, tokens = file.get_tensor("hidden_states"), file.get_tensor("token_ids")
    except (OSError, SafetensorError) as error:  # its disk is full, or the lock does not reach over a network share
        _delete(path)
        raise Retry(f"{path}: {error}") from None
    _delete(path)
    if (states.dim(), tokens.dim()) != (3, 1) or tokens[: len(ids)].tolist() != ids:
        raise Retry(f"{path} holds another text")
    return checked(states[: len(ids)], ids, count, hidden_size)


def checked(states: Tensor, ids: list[int], count: int, hidden_size: int) -> Tensor:
    if states.shape[:1] != (len(ids),):
        raise Retry(f"hidden states of {list(states.shape[:1])} tokens for a text of {len(ids)}")
    if states.shape[1:] != (count, hidden_size):
        raise TargetError(
            f"draft.taps: the server keeps {list(states.shape[1:])} values a token, this run wants [{count}, "
            f"{hidden_size}]; start it with the layers that `draftsmith serve RECIPE --purpose capture` names"
        )
    return states


def sweep(folder: Path, lost: Sequence[str]) -> None:
    """Delete the files of requests that failed on the way, and those that earlier runs left behind."""
    for path in folder.glob(f"*{FILE_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            forgotten = time.time() - path.stat().st_mtime > FORGOTTEN_S
            if forgotten or any(name in path.name for name in lost):
                path.unlink()
