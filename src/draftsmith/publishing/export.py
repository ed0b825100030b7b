"""Stage 5: engine directories from a training checkpoint, strictly validated.

Taps are translated here and nowhere else. With the default taps the key is left out and one directory, `draft`, serves
on SGLang and vLLM alike; otherwise SGLang counts layer outputs (tap - 1) and vLLM layer inputs, so each gets its own.
"""

import shutil
from pathlib import Path
from typing import Any

from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.drafts.checkpoint import write_draft
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


def export(checkpoints: Path, vocabulary: DraftVocabulary, out: Path, provenance: dict[str, Any]) -> list[Path]:
    """Write the newest checkpoint as engine directories; returns them."""
    paths = checkpoint_paths(checkpoints)
    if not paths:
        raise CheckpointError(f"{checkpoints}: no checkpoint to export; run: draftsmith train RECIPE")
    state = load_state(paths[-1])
    if state["vocabulary"] != vocabulary.name:
        raise CheckpointError(
            f"{paths[-1]}: trained with the draft vocabulary {state['vocabulary']}, but vocab.safetensors is "
            f"{vocabulary.name}; a draft refuses a map that is not its own"
        )
    config = Eagle3Config.from_dict(state["draft"])
    draft = Eagle3Draft(config)
    load_weights(paths[-1], draft)
    provenance = {
        **provenance,
        "vocabulary": vocabulary.name,
        "target": state["target"],
        "status": state["status"],
        "steps": state["step"],
    }
    directories = []
    for name, ids in engine_taps(config.taps, state["target"]["num_layers"]).items():
        directory = out / name
        shutil.rmtree(directory, ignore_errors=True)
        write_draft(directory, draft, vocabulary.ids_D, ids, provenance)
        directories.append(directory)
        say(f"export: {directory} ({(directory / 'model.safetensors').stat().st_size / 1e6:.1f} MB)")
    return directories
