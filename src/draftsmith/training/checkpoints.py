"""Training checkpoints: everything needed to go on, to export, and to know where they came from.

checkpoint-000200/
    draft.safetensors       fp32 master weights
    optimizer.safetensors   moments of the optimisers
    state.json              step, draft configuration, vocabulary name, target identity, status, running sums
best/
    draft.safetensors state.json    the weights of the highest held-out tau so far: what is exported

A checkpoint is written beside its place and renamed, so one that exists is whole. Training draws no random numbers
after initialisation (orders follow from seed and epoch), so the step is also the state of the data and of the RNG.
"""

import os
import shutil
from pathlib import Path
from typing import Any, cast

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

BEST, OLD_BEST = "best", ".old-best"
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


def discard(path: Path) -> None:
    """One rename takes it away whole; what a kill leaves after that is nobody's checkpoint."""
    if path.exists():
        aside = path.with_name(f".old-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        shutil.rmtree(aside)


def save_checkpoint(
    directory: Path,
    draft: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    state: TrainingState,
    keep: int,
    main: bool = True,
) -> Path:
    """Every rank calls it, as sharded tensors are gathered; `main` alone writes. The number leaves no trace."""
    weights = whole_weights(draft)
    moments: Any = get_optimizer_state_dict(draft, optimizers, options=WHOLE).get("state")
    path = directory / f"checkpoint-{state.step:06d}"
    if not main:
        return path
    partial = directory / f".partial-{state.step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_tensors(partial / "draft.safetensors", weights)
    flat = {f"{name}/{key}": value for name, values in moments.items() for key, value in values.items()}
    save_tensors(partial / "optimizer.safetensors", flat)
    state.save(partial / "state.json")
    discard(path)
    replace(partial, path)
    for old in checkpoint_paths(directory)[:-keep]:
        discard(old)
    return path


def save_best(directory: Path, weights: dict[str, Tensor], state: TrainingState) -> None:
    """Put these weights in the place of the best ones before. Drafts pass their peak while the loss still falls, so the
    newest checkpoint is not the one to export."""
    restore_best(directory)
    partial, aside = directory / ".partial-best", directory / OLD_BEST
    for path in (partial, aside):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)
    save_tensors(partial / "draft.safetensors", weights)
    state.save(partial / "state.json")
    if (directory / BEST).exists():
        os.replace(directory / BEST, aside)
    replace(partial, directory / BEST)
    shutil.rmtree(aside, ignore_errors=True)


def restore_best(directory: Path) -> None:
    """Where a kill came between the two renames of `save_best`, the best weights are the ones set aside."""
    if (directory / OLD_BEST).exists() and not (directory / BEST).exists():
        os.replace(directory / OLD_BEST, directory / BEST)


def tidy(directory: Path, keep: int) -> None:
    """After a kill: the best weights in their place, and nothing left of what was being written or deleted."""
    restore_best(directory)
    for old in checkpoint_paths(directory)[:-keep]:
        discard(old)
    for leftover in (*directory.glob(".old-*"), *directory.glob(".partial-*")):
        shutil.rmtree(leftover)


def load_state(path: Path) -> TrainingState:
    try:
        return TrainingState.load(path / "state.json")
    except (OSError, DataError) as error:
        raise CheckpointError(
            f"{path}: cannot read state.json: {error}; delete the directory to use the one before"
        ) from None


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path.parent}: cannot read {path.name}: {error}; delete the directory to use the one before"
        ) from None


def load_weights(path: Path, draft: nn.Module) -> None:
    """Copy the master weights into `draft`; names and shapes must match exactly."""
    tensors, wanted = _tensors(path / "draft.safetensors"), dict(draft.named_parameters())
    if {n: tuple(t.shape) for n, t in tensors.items()} != {n: tuple(p.shape) for n, p in wanted.items()}:
        raise CheckpointError(f"{path}: the weights do not fit the draft of this recipe; use another run directory")
    set_model_state_dict(draft, cast("Any", tensors), options=StateDictOptions(full_state_dict=True))


def load_optimizers(path: Path, draft: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Put every parameter's moments back into the optimiser that owns it."""
    values: Any = get_optimizer_state_dict(draft, optimizers, options=StateDictOptions(full_state_dict=True))
    values["state"] = {}
    for key, value in _tensors(path / "optimizer.safetensors").items():
        name, moment = key.rsplit("/", 1)
        values["state"].setdefault(name, {})[moment] = value
    set_optimizer_state_dict(draft, optimizers, values, options=StateDictOptions(full_state_dict=True))
