"""Training checkpoints: everything needed to go on, to export, and to know where they came from.

checkpoint-000200/
    draft.safetensors       fp32 master weights
    optimizer.safetensors   AdamW moments
    state.json              step, draft configuration, vocabulary name, target identity, status, running sums

A checkpoint is written beside its place and renamed, so one that exists is whole. Training draws no random numbers
after initialisation (orders follow from seed and epoch), so the step is also the state of the data and of the RNG.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from draftsmith.errors import CheckpointError
from draftsmith.files import read_json, write_json


def checkpoint_paths(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(directory.glob("checkpoint-[0-9]*"))


def save_checkpoint(
    directory: Path, draft: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    path = directory / f"checkpoint-{state['step']:06d}"
    partial = directory / f".partial-{state['step']:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: p.detach().cpu() for name, p in draft.named_parameters()}, partial / "draft.safetensors")
    moments: dict[str, Tensor] = {}
    for name, parameter in draft.named_parameters():
        for key, value in optimizer.state[parameter].items():
            moments[f"{name}/{key}"] = value.detach().cpu()
    save_file(moments, partial / "optimizer.safetensors")
    write_json(partial / "state.json", state)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
    for old in checkpoint_paths(directory)[:-keep]:
        shutil.rmtree(old)
    return path


def load_state(path: Path) -> dict[str, Any]:
    try:
        return read_json(path / "state.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot read state.json: {error}; delete the directory to use the one before") from None


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
            parameter.copy_(tensors[name])


def load_optimizer(path: Path, draft: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    try:
        moments = load_file(path / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read optimizer.safetensors: {error}") from None
    for name, parameter in draft.named_parameters():
        optimizer.state[parameter] = {
            key.rsplit("/", 1)[1]: value.to(parameter.device) if "step" not in key.rsplit("/", 1)[1] else value
            for key, value in moments.items()
            if key.rsplit("/", 1)[0] == name
        }
