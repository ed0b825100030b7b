"""Stage 5: the engines' directory, `draft`, from a training checkpoint, strictly validated."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.drafts.checkpoint import draft_files, read_config, read_tensors, write_draft
from draftsmith.drafts.eagle3 import Eagle3Config, Eagle3Draft
from draftsmith.errors import CheckpointError
from draftsmith.progress import say
from draftsmith.training.checkpoints import BEST, checkpoint_paths, load_state, load_weights, restore_best


def named_taps(taps: tuple[int, ...], num_layers: int) -> list[int] | None:
    """The taps that config.json has to name; None where they are what both engines take without being told."""
    return None if taps == (2, num_layers // 2, num_layers - 3) else list(taps)


def trained_draft(checkpoints: Path, vocabulary: DraftVocabulary) -> tuple[Eagle3Draft, dict[str, Any]]:
    """(draft in fp32, training state) of the highest held-out tau; of the newest checkpoint where none was measured."""
    restore_best(checkpoints)
    paths = checkpoint_paths(checkpoints)
    if not paths:
        raise CheckpointError(f"{checkpoints}: no checkpoint to export; run: draftsmith train RECIPE")
    chosen = checkpoints / BEST if (checkpoints / BEST).exists() else paths[-1]
    state = {**load_state(chosen), "status": load_state(paths[-1])["status"]}
    if state["vocabulary"] != vocabulary.name:
        raise CheckpointError(
            f"{chosen}: trained with the draft vocabulary {state['vocabulary']}, but vocab.safetensors is "
            f"{vocabulary.name}; a draft refuses a map that is not its own"
        )
    draft = Eagle3Draft(Eagle3Config.from_dict(state["draft"]))
    load_weights(chosen, draft)
    return draft, state


def export(checkpoints: Path, vocabulary: DraftVocabulary, out: Path, provenance: dict[str, Any]) -> Path:
    """Write the best checkpoint as the directory that both engines read; returns it."""
    draft, state = trained_draft(checkpoints, vocabulary)
    provenance = {
        **provenance,
        "vocabulary": vocabulary.name,
        "target": state["target"],
        "status": state["status"],
        "steps": state["step"],
    }
    taps, directory = draft.config.taps, out / "draft"
    shutil.rmtree(directory, ignore_errors=True)
    write_draft(directory, draft, vocabulary.ids_D, named_taps(taps, state["target"]["num_layers"]), provenance)
    size = (directory / "model.safetensors").stat().st_size
    best = state.get("best")
    told = f", step {state['step']:,}" + (f", held-out tau {best['tau_held_out']:.2f}, the highest" if best else "")
    say(f"export: {directory} ({size / 1e6:.1f} MB{told})")
    if 0 in taps:
        say("export: SGLang cannot capture tap 0, so the draft serves on vLLM alone; taps from 1 on serve on both")
    return directory


def damages(directory: Path, checkpoints: Path, vocabulary: DraftVocabulary) -> list[str]:
    """Everything in an engine directory that is not what training made, each named."""
    draft, state = trained_draft(checkpoints, vocabulary)
    taps = named_taps(draft.config.taps, state["target"]["num_layers"])
    config, tensors = draft_files(draft, vocabulary.ids_D, taps, {})
    held_config, held = read_config(directory), read_tensors(directory)
    found = []
    for key in sorted({*config, *held_config} - {"draftsmith"}):
        if config.get(key) != held_config.get(key):
            found.append(f"config.json: {key} is {held_config.get(key)}, trained with {config.get(key)}")
    found += [f"{name} is missing" for name in tensors if name not in held]
    found += [f"{name} is not of this draft" for name in held if name not in tensors]
    for name, tensor in held.items():
        same = name in tensors and tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name])
        if name in tensors and not same:
            found.append(_difference(name, tensor, tensors, vocabulary))
    return found


def _difference(name: str, held: Tensor, tensors: dict[str, Tensor], vocabulary: DraftVocabulary) -> str:
    """What became of a tensor, in the words of the likeliest mistake."""
    wanted = tensors[name]
    if held.shape != wanted.shape:
        turned = held.ndim == 2 and held.shape == wanted.T.shape and torch.equal(held, wanted.T)
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
