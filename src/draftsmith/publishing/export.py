"""Stage 5: engine directories from a training checkpoint, strictly validated.

Taps are translated here and nowhere else. With the default taps the key is left out and one directory, `draft`, serves
on SGLang and vLLM alike; otherwise SGLang counts layer outputs (tap - 1) and vLLM layer inputs, so each gets its own.
"""

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
from draftsmith.training.checkpoints import checkpoint_paths, load_state, load_weights


def engine_taps(taps: tuple[int, ...], num_layers: int) -> dict[str, list[int] | None]:
    """Value of `eagle_aux_hidden_state_layer_ids` per directory name; None leaves the key out."""
    if taps == (2, num_layers // 2, num_layers - 3):
        return {"draft": None}
    if taps[0] == 0:  # SGLang's id would be -1
        return {"vllm": list(taps)}
    return {"sglang": [tap - 1 for tap in taps], "vllm": list(taps)}


def newest_draft(checkpoints: Path, vocabulary: DraftVocabulary) -> tuple[Eagle3Draft, dict[str, Any]]:
    """(draft in fp32, training state) of the newest checkpoint."""
    paths = checkpoint_paths(checkpoints)
    if not paths:
        raise CheckpointError(f"{checkpoints}: no checkpoint to export; run: draftsmith train RECIPE")
    state = load_state(paths[-1])
    if state["vocabulary"] != vocabulary.name:
        raise CheckpointError(
            f"{paths[-1]}: trained with the draft vocabulary {state['vocabulary']}, but vocab.safetensors is "
            f"{vocabulary.name}; a draft refuses a map that is not its own"
        )
    draft = Eagle3Draft(Eagle3Config.from_dict(state["draft"]))
    load_weights(paths[-1], draft)
    return draft, state


def export(checkpoints: Path, vocabulary: DraftVocabulary, out: Path, provenance: dict[str, Any]) -> list[Path]:
    """Write the newest checkpoint as engine directories; returns them."""
    draft, state = newest_draft(checkpoints, vocabulary)
    provenance = {
        **provenance,
        "vocabulary": vocabulary.name,
        "target": state["target"],
        "status": state["status"],
        "steps": state["step"],
    }
    directories = []
    for name, ids in engine_taps(draft.config.taps, state["target"]["num_layers"]).items():
        directory = out / name
        shutil.rmtree(directory, ignore_errors=True)
        write_draft(directory, draft, vocabulary.ids_D, ids, provenance)
        directories.append(directory)
        say(f"export: {directory} ({(directory / 'model.safetensors').stat().st_size / 1e6:.1f} MB)")
    return directories


def damages(directory: Path, checkpoints: Path, vocabulary: DraftVocabulary) -> list[str]:
    """Everything in an engine directory that is not what the newest checkpoint exports to, each named."""
    draft, state = newest_draft(checkpoints, vocabulary)
    taps = engine_taps(draft.config.taps, state["target"]["num_layers"]).get(directory.name)
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
