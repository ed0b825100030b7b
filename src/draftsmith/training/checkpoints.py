"""Training checkpoints: everything needed to go on, to export, and to know where they came from.

checkpoint-000200/
    draft.safetensors       fp32 master weights
    optimizer.safetensors   moments of the optimisers
    state.json              step, draft configuration, vocabulary name, target identity, status
best/
    draft.safetensors state.json    the weights of the highest held-out tau so far: what is exported

A checkpoint is written beside its place and renamed, so one that exists is whole. Training draws no random numbers
after initialisation (orders follow from seed and epoch), so the step is also the state of the data and of the RNG.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from draftsmith.core.errors import CheckpointError, DataError
from draftsmith.core.files import replace, save_tensors
from draftsmith.core.records.training import TrainingState

T = TypeVar("T")
BEST = "best"
WEIGHTS, MOMENTS = "draft.safetensors", "optimizer.safetensors"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""Of sharded tensors the whole ones: every rank asks, rank 0 is given them."""
EVERYWHERE = StateDictOptions(full_state_dict=True)


def checkpoint_paths(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(directory.glob("checkpoint-[0-9]*"))


def whole_weights(draft: nn.Module, everywhere: bool = False) -> dict[str, Tensor]:
    """On the CPU, and empty on other ranks than the first, or where each of them computes. All have to ask."""
    weights: Any = get_model_state_dict(draft, options=EVERYWHERE if everywhere else WHOLE)
    return weights


def _put(directory: Path, name: str, tensors: dict[str, dict[str, Tensor]], state: TrainingState) -> None:
    """Write beside its place and rename; what stood there is set aside until then."""
    partial, aside = directory / f".partial-{name}", directory / f".old-{name}"
    for path in (partial, aside):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)
    for file, named in tensors.items():
        save_tensors(partial / file, named)
    state.save(partial / "state.json")
    if (directory / name).exists():
        os.replace(directory / name, aside)
    replace(partial, directory / name)
    shutil.rmtree(aside, ignore_errors=True)


def save_checkpoint(
    directory: Path,
    draft: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    state: TrainingState,
    keep: int,
    main: bool = True,
) -> None:
    """Every rank calls it, as sharded tensors are gathered; `main` alone writes."""
    weights = whole_weights(draft)
    moments: Any = get_optimizer_state_dict(draft, optimizers, options=WHOLE).get("state")
    if not main:
        return
    flat = {f"{name}/{key}": value for name, values in moments.items() for key, value in values.items()}
    _put(directory, f"checkpoint-{state.step:06d}", {WEIGHTS: weights, MOMENTS: flat}, state)
    tidy(directory, keep)


def save_best(directory: Path, weights: dict[str, Tensor], state: TrainingState) -> None:
    """Put these weights in the place of the best ones before. Drafts pass their peak while the loss still falls, so the
    newest checkpoint is not the one to export."""
    restore_best(directory)
    _put(directory, BEST, {WEIGHTS: weights}, state)


def restore_best(directory: Path) -> None:
    """Where a kill came between the two renames of `_put`, the best weights are the ones set aside."""
    aside = directory / f".old-{BEST}"
    if aside.exists() and not (directory / BEST).exists():
        os.replace(aside, directory / BEST)


def tidy(directory: Path, keep: int) -> None:
    """The best weights in their place, the newest checkpoints alone, and nothing left of what a kill cut short."""
    restore_best(directory)
    for leftover in (*directory.glob(".old-*"), *directory.glob(".partial-*")):
        shutil.rmtree(leftover)
    for old in checkpoint_paths(directory)[:-keep]:
        aside = old.with_name(f".old-{old.name}")
        os.replace(old, aside)  # whole: what a kill leaves after that is nobody's checkpoint
        shutil.rmtree(aside)


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (OSError, DataError, SafetensorError) as error:
        raise CheckpointError(
            f"{path.parent}: cannot read {path.name}: {error}; delete the directory to use the one before"
        ) from None


def load_state(path: Path) -> TrainingState:
    return _read(path / "state.json", TrainingState.load)


def load_weights(path: Path, draft: nn.Module) -> None:
    """Copy the master weights into `draft`; names and shapes must match exactly."""
    tensors, wanted = _read(path / WEIGHTS, load_file), dict(draft.named_parameters())
    if {n: tuple(t.shape) for n, t in tensors.items()} != {n: tuple(p.shape) for n, p in wanted.items()}:
        raise CheckpointError(f"{path}: the weights do not fit the draft of this recipe; use another run directory")
    put_weights(draft, tensors)


def put_weights(draft: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Whole ones, which every rank has."""
    set_model_state_dict(draft, cast("Any", tensors), options=EVERYWHERE)


def load_optimizers(path: Path, draft: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Put every parameter's moments back into the optimiser that owns it."""
    values: Any = get_optimizer_state_dict(draft, optimizers, options=EVERYWHERE)
    values["state"] = {}
    for key, value in _read(path / MOMENTS, load_file).items():
        name, moment = key.rsplit("/", 1)
        values["state"].setdefault(name, {})[moment] = value
    set_optimizer_state_dict(draft, optimizers, values, options=EVERYWHERE)
