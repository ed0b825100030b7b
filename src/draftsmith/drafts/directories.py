"""Draft directories of ours and others': written, inspected, loaded."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from draftsmith.core import files
from draftsmith.core.errors import CheckpointError
from draftsmith.core.files import JsonObject, save_tensors, write_json
from draftsmith.core.run_files import WEIGHTS
from draftsmith.core.taps import Taps
from draftsmith.decoding.speculate import Drafter
from draftsmith.drafts import METHODS
from draftsmith.drafts.method import Draft, DraftConfig, DraftReport, Method, Reading
from draftsmith.drafts.recognise import recognise
from draftsmith.drafts.tensors import EMBEDDING, canonical, read_header, read_tensors, weight_files
from draftsmith.targets.local import LocalTarget
from draftsmith.targets.parts import DTYPES


def read_config(directory: Path) -> JsonObject:
    """config.json as the file has it."""
    path = directory / "config.json"
    if not path.exists():
        raise CheckpointError(f"{directory}: no config.json; give the directory of a draft")
    try:
        return files.read_object(path, directory)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def files_of(directory: Path) -> list[Path]:
    """Everything that a draft is, as far as draftsmith reads it."""
    read_config(directory)
    return [directory / "config.json", *weight_files(directory)]


def exported_taps(directory: Path) -> Taps:
    """The taps that a draft of ours was trained with."""
    made = read_config(directory).get("draftsmith")
    taps = made.get("taps") if isinstance(made, dict) else None
    if not isinstance(taps, list) or not all(type(tap) is int for tap in taps):
        raise CheckpointError(f"{directory}: config.json does not say draftsmith.taps; run: draftsmith export RECIPE")
    return tuple(taps)


def method_in(report: DraftReport) -> Method | None:
    """None of a method that draftsmith does not read."""
    return next((method for method in METHODS.values() if method.title == report.method), None)


def inspect_draft(directory: Path) -> DraftReport:
    """Read any draft directory (`midlayer.` or `layers.0.` names, with or without embeddings) and check it."""
    config, header = read_config(directory), read_header(directory)
    shapes = {canonical(name): shape for name, (_, shape) in header.items()}
    dtypes = {canonical(name): dtype for name, (dtype, _) in header.items()}
    report = DraftReport(directory, recognise(config, shapes), config, shapes, dtypes)
    if method := method_in(report):
        method.inspect(report)
    else:
        report.shapes = {name: shape for name, (_, shape) in header.items()}
        report.dtypes = {name: dtype for name, (dtype, _) in header.items()}
        read = " and ".join(method.title for method in METHODS.values())
        report.problems = [f"the method is {report.method}; draftsmith reads {read} drafts alone"]
    report.parameters = sum(math.prod(s) for n, s in report.shapes.items() if n not in ("d2t", "t2d"))
    return report


def write_draft(directory: Path, draft: Draft, ids_D: Tensor, layers: int, provenance: JsonObject) -> None:
    """Write what `Method.files` makes for a target of so many layers, and read it back strictly."""
    config, tensors = METHODS[draft.method].files(draft, ids_D, layers, provenance)
    save_tensors(directory / WEIGHTS, tensors, {"format": "pt"})
    write_json(directory / "config.json", config)
    if problems := inspect_draft(directory).blocking():
        raise CheckpointError(f"{directory}: the export does not hold: {problems[0]}")


def load_draft(
    directory: Path, dtype: torch.dtype = torch.bfloat16, layers: int | None = None, reading: Reading | None = None
) -> tuple[Draft, Tensor]:
    """(draft, target ids of its rows) of a directory without problems.

    With `reading`, a draft of others: faults of serving alone are let pass, and its taps are told by `Method.taps` for
    a target of `layers` layers.
    """
    report = inspect_draft(directory)
    method, real = method_in(report), report.blocking(lenient=reading is not None)
    if real or method is None or report.draft is None or report.ids_D is None:
        raise CheckpointError(f"{directory}: {(real or ['cannot be read'])[0]}; run: draftsmith inspect {directory}")
    config = report.draft
    if reading is not None and layers is not None:
        config = config.model_copy(update={"taps": method.taps(report, layers, reading)})
    draft = method.build(config).to(dtype)
    names = {name for name, _ in draft.named_parameters()}
    draft.load_state_dict(read_tensors(directory, names))
    return draft.eval(), report.ids_D


@dataclass(frozen=True)
class ReadyDraft:
    """A draft beside its target."""

    draft: Draft
    ids_D: Tensor
    """Target ids of its rows."""
    embedding_VH: Tensor
    """The target's, or its own where it brings one along."""

    def drafter(self) -> Drafter:
        return METHODS[self.draft.method].drafter(self.draft, self.ids_D, self.embedding_VH)


def require_fit(directory: Path, config: DraftConfig, model: str, hidden: int, vocab: int, layers: int) -> None:
    """A `CheckpointError` where a draft was made for a target of another shape, or of more layers."""
    if config.tap_size != hidden or config.vocab_size != vocab:
        raise CheckpointError(
            f"{directory}: made for hidden size {config.tap_size} and {config.vocab_size} tokens, but {model} has "
            f"{hidden} and {vocab}"
        )
    if max(config.taps) >= layers:
        raise CheckpointError(f"{directory}: reads layer {max(config.taps)}, but {model} has layers 0..{layers - 1}")


def ready_draft(target: LocalTarget, directory: Path, reading: Reading | None = None) -> ReadyDraft:
    """A draft in its target's dtype and on its device; a `CheckpointError` where the two do not fit."""
    identity = target.identity
    draft, ids_D = load_draft(directory, DTYPES[identity.dtype], identity.num_layers, reading)
    config = draft.config
    require_fit(directory, config, identity.model, identity.hidden_size, identity.vocab_size, identity.num_layers)
    own = read_tensors(directory, {EMBEDDING}).get(EMBEDDING)
    embedding = target.embedding_rows() if own is None else own
    if embedding.shape[1] != config.hidden_size:
        raise CheckpointError(
            f"{directory}: the draft reads embeddings {config.hidden_size} wide, but those of "
            f"{identity.model} are {embedding.shape[1]} wide; it needs an {EMBEDDING} of its own"
        )
    return ReadyDraft(draft.to(target.device), ids_D, embedding)
