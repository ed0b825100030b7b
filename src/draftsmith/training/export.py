"""Stage 5: the engines' directory from a training checkpoint, strictly validated."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from draftsmith.core import run_files
from draftsmith.core.errors import CheckpointError
from draftsmith.core.files import JsonObject
from draftsmith.core.progress import say
from draftsmith.core.records.training import TrainingState
from draftsmith.core.secrets import line
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.drafts import METHODS
from draftsmith.drafts.directories import read_config, write_draft
from draftsmith.drafts.method import Draft
from draftsmith.drafts.tensors import read_tensors
from draftsmith.engines import SERVERS
from draftsmith.training.checkpoints import BEST, checkpoint_paths, load_state, load_weights, restore_best


def trained_draft(checkpoints: Path, vocabulary: DraftVocabulary) -> tuple[Draft, TrainingState]:
    """(draft in fp32, training state) of the highest held-out tau; of the newest checkpoint where none was measured."""
    restore_best(checkpoints)
    paths = checkpoint_paths(checkpoints)
    if not paths:
        raise CheckpointError(f"{checkpoints}: no checkpoint to export; run: draftsmith train RECIPE")
    chosen = checkpoints / BEST if (checkpoints / BEST).exists() else paths[-1]
    state = load_state(chosen).model_copy(update={"status": load_state(paths[-1]).status})
    known = state.belongs
    if known.vocabulary != vocabulary.name:
        raise CheckpointError(
            f"{chosen}: trained with the draft vocabulary {known.vocabulary}, but vocab.safetensors is "
            f"{vocabulary.name}; a draft refuses a map that is not its own"
        )
    method = METHODS[known.method]
    draft = method.build(method.read_config(known.draft))
    load_weights(chosen, draft)
    return draft, state


def export(checkpoints: Path, vocabulary: DraftVocabulary, directory: Path, provenance: JsonObject) -> None:
    """Write the best checkpoint as the directory that every engine reads."""
    draft, state = trained_draft(checkpoints, vocabulary)
    target = state.belongs.target
    provenance = {
        **provenance,
        "vocabulary": vocabulary.name,
        "target": target.model_dump(mode="json"),
        "status": state.status,
        "steps": state.step,
    }
    shutil.rmtree(directory, ignore_errors=True)
    write_draft(directory, draft, vocabulary.ids_D, target.num_layers, provenance)
    size = (directory / run_files.WEIGHTS).stat().st_size
    best = f", held-out tau {state.best.tau_held_out:.2f}, the highest" if state.best else ""
    say(f"export: {directory} ({size / 1e6:.1f} MB, step {state.step:,}{best})")
    unable = [engine.title for engine in SERVERS.values() if not engine.serves(draft.config.taps)]
    if unable:
        able = [engine.title for engine in SERVERS.values() if engine.title not in unable]
        say(
            f"export: {' and '.join(unable)} cannot capture tap 0, so the draft serves on {' and '.join(able)} alone; "
            "taps from 1 on serve on all"
        )


def damages(directory: Path, checkpoints: Path, vocabulary: DraftVocabulary) -> list[str]:
    """Everything in an engine directory that is not what training made, each named."""
    draft, state = trained_draft(checkpoints, vocabulary)
    method, layers = METHODS[draft.method], state.belongs.target.num_layers
    config, tensors = method.files(draft, vocabulary.ids_D, layers, {})
    held_config, held = read_config(directory), read_tensors(directory)
    found = []
    for key in sorted({*config, *held_config} - {"draftsmith"}):
        if config.get(key) != held_config.get(key):
            found.append(f"config.json: {key} is {held_config.get(key)}, trained with {config.get(key)}")
    found += [f"{name} is missing" for name in tensors if name not in held]
    for name, tensor in held.items():
        if name not in tensors:
            found.append(f"{name} is not of this draft")
        elif tensor.dtype != tensors[name].dtype or not torch.equal(tensor, tensors[name]):
            found.append(_difference(name, tensor, tensors, vocabulary))
    return list(map(line, found))


def _difference(name: str, held: Tensor, tensors: dict[str, Tensor], vocabulary: DraftVocabulary) -> str:
    """What became of a tensor, in the words of the likeliest mistake."""
    wanted = tensors[name]
    if held.shape != wanted.shape:
        turned = held.ndim == wanted.ndim == 2 and held.shape == wanted.T.shape and torch.equal(held, wanted.T)
        return f"{name} is transposed" if turned else f"{name} has shape {list(held.shape)}, not {list(wanted.shape)}"
    if held.dtype != wanted.dtype:
        return f"{name} is {held.dtype}, not {wanted.dtype}"
    if name == "d2t" and torch.equal(held, vocabulary.ids_D):
        return "d2t holds target ids where engines read offsets"
    twin = next((other for other, t in tensors.items() if t.shape == held.shape and torch.equal(t, held)), None)
    if twin is not None:
        return f"{name} holds {twin}: swapped"
    changed = (held != wanted).float().mean().item()
    return f"{name} is not the trained one ({changed:.0%} of its numbers differ)"
