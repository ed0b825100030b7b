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
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from draftsmith.errors import CheckpointError
from draftsmith.files import read_json, save_tensors, write_json
from draftsmith.training.world import laid_out_like, whole

BEST, OLD_BEST = "best", ".old-best"


def checkpoint_paths(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(directory.glob("checkpoint-[0-9]*"))


def save_checkpoint(
    directory: Path,
    draft: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int,
    main: bool = True,
) -> Path:
    """Every rank calls it, as sharded tensors are gathered; `main` alone writes. World sizes leave no trace in it."""
    names = {id(p): name for name, p in draft.named_parameters()}
    weights = {name: whole(p.detach()).cpu() for name, p in draft.named_parameters()}
    moments: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                moments[f"{names[id(parameter)]}/{key}"] = whole(value.detach()).cpu().clone()
    path = directory / f"checkpoint-{state['step']:06d}"
    if not main:
        return path
    partial = directory / f".partial-{state['step']:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_tensors(partial / "draft.safetensors", weights)
    save_tensors(partial / "optimizer.safetensors", moments)
    write_json(partial / "state.json", state)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
    for old in checkpoint_paths(directory)[:-keep]:
        shutil.rmtree(old)
    return path


def save_best(directory: Path, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Put these weights in the place of the best ones before. Drafts pass their peak while the loss still falls, so the
    newest checkpoint is not the one to export."""
    restore_best(directory)
    partial, aside = directory / ".partial-best", directory / OLD_BEST
    for path in (partial, aside):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)
    save_tensors(partial / "draft.safetensors", {name: tensor.cpu() for name, tensor in weights.items()})
    write_json(partial / "state.json", state)
    if (directory / BEST).exists():
        os.replace(directory / BEST, aside)
    os.replace(partial, directory / BEST)
    shutil.rmtree(aside, ignore_errors=True)


def restore_best(directory: Path) -> None:
    """Where a kill came between the two renames of `save_best`, the best weights are the ones set aside."""
    if (directory / OLD_BEST).exists() and not (directory / BEST).exists():
        os.replace(directory / OLD_BEST, directory / BEST)


def load_state(path: Path) -> dict[str, Any]:
    try:
        return read_json(path / "state.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot read state.json: {error}; delete the directory to use the one before"
        ) from None


def load_weights(path: Path, draft: nn.Module) -> None:
    """Copy the master weights into `draft`; names and shapes must match exactly."""
    try:
        tensors = load_file(path / "draft.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read draft.safetensors: {error}") from None
    wanted = dict(draft.named_parameters())
    if {n: tuple(t.shape) for n, t in tensors.items()} != {n: tuple(p.shape) for n, p in wanted.items()}:
        raise CheckpointError(f"{path}: the weights do not fit the draft of this recipe; use another run directory")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(laid_out_like(parameter, tensors[name]))


def load_optimizers(path: Path, draft: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Put every parameter's moments back into the optimiser that owns it."""
    try:
        moments = load_file(path / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read optimizer.safetensors: {error}") from None
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.items():
        name, field = key.rsplit("/", 1)
        by_name.setdefault(name, {})[field] = value
    names = {id(p): name for name, p in draft.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = {
                    # the fused AdamW keeps even its step counter there
                    field: laid_out_like(parameter, value) if value.ndim else value.to(parameter.device)
                    for field, value in by_name.get(names[id(parameter)], {}).items()
                }
