"""What a training starts from: a new draft, or one that was trained before (`train.from_draft`)."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from draftsmith.core.errors import CheckpointError
from draftsmith.core.files import digest
from draftsmith.core.progress import say
from draftsmith.core.recipe import Recipe
from draftsmith.drafts import METHODS
from draftsmith.drafts.directories import files_of, load_draft, require_fit
from draftsmith.drafts.method import Draft, DraftConfig, Example
from draftsmith.drafts.packing import Pack
from draftsmith.drafts.tensors import EMBEDDING, read_tensors
from draftsmith.targets.base import Target
from draftsmith.training.capture import CaptureSource
from draftsmith.training.checkpoints import put_weights, whole_weights
from draftsmith.training.processes import ProcessGroup

KEY = "train.from_draft"
FIT_TOKENS = 4  # that are guessed from, for each number in a row of taps


def fit(draft: Draft, packs: Iterable[Pack], capture: CaptureSource, target: Target, processes: ProcessGroup) -> None:
    """`Draft.fit` on the first of these packs, by the first process for all."""
    gain, embedding = target.norm_gain(), target.embedding_rows()

    def examples() -> Iterator[Example]:
        left = FIT_TOKENS * len(draft.config.taps) * draft.config.tap_size
        for pack in packs:
            states, rows = capture(pack), pack.chains_R
            taps, last = states.taps_TKH[rows].to(gain.device), states.last_TH[rows + 1].to(gain.device)
            embeds = embedding[pack.ids_T[rows + 1].to(embedding.device)].to(gain.device)
            # others are quarantined by training; fp16 cannot hold the sums
            sums = taps.sum((1, 2), dtype=torch.float32) + last.sum(1, dtype=torch.float32)
            finite = sums.isfinite()
            if bool(finite.any()):
                yield Example(taps[finite], embeds[finite], last[finite])
            left -= len(rows)
            if left <= 0:
                return

    whole = METHODS[draft.method].build(draft.config).to(gain.device)  # of weights that may lie in parts
    whole.load_state_dict(whole_weights(draft, everywhere=True))
    if processes.main:
        whole.fit(examples(), gain, target.logit_softcap)
    put_weights(draft, {name: processes.first(weight) for name, weight in whole.state_dict().items()})


def first_draft(recipe: Recipe, target: Target, usual: DraftConfig, ids_D: Tensor) -> tuple[Draft, str | None]:
    """(draft in fp32, content of the one that it goes on from). `usual`: what a new draft is."""
    if (directory := recipe.train.from_draft) is None:
        draft = METHODS[recipe.draft.method].build(usual)
        rows = target.head_rows(ids_D)
        draft.to(rows.device).initialise(rows, target.norm_gain(), torch.Generator().manual_seed(recipe.seed))
        return draft, None
    say(f"train: going on from {directory}")
    draft, own_ids = earlier_draft(directory, recipe, usual, target.identity.num_layers)
    embedding = read_tensors(directory, {EMBEDDING}).get(EMBEDDING)
    if embedding is not None and not torch.equal(embedding.bfloat16(), target.embedding_rows().cpu().bfloat16()):
        raise CheckpointError(
            f"{KEY}: {directory} has an {EMBEDDING} of its own, but drafts train with their target's; give another"
        )
    if not torch.equal(own_ids, ids_D):
        raise CheckpointError(
            f"{KEY}: {directory} drafts {len(own_ids):,} tokens, which are not the {len(ids_D):,} of this run's "
            f"vocabulary; take the draft's: draftsmith vocab RECIPE --from {directory}"
        )
    return draft.train(), digest(*files_of(directory))


def earlier_draft(directory: Path, recipe: Recipe, usual: DraftConfig, layers: int) -> tuple[Draft, Tensor]:
    """(the draft of `train.from_draft` in fp32, target ids of its rows), with the shape that it has, which keys of the
    recipe's `draft` must not contradict."""
    draft, own_ids = load_draft(directory, torch.float32, layers, "auto")
    config = draft.config
    require_fit(directory, config, recipe.target.model, usual.tap_size, usual.vocab_size, layers)
    if draft.method != recipe.draft.method or config.hidden_size != usual.hidden_size:
        raise CheckpointError(
            f"{KEY}: {directory} is {draft.method}, {config.hidden_size} wide; a draft of this run is "
            f"{recipe.draft.method}, {usual.hidden_size} wide; go on from one like that"
        )
    for name, value in recipe.draft.model_dump(exclude_defaults=True).items():
        if (held := getattr(config, name, value)) != value:
            raise CheckpointError(
                f"draft.{name}: {value} given, but {directory} has {held}; leave the key out, or {KEY}"
            )
    context = max(config.max_position_embeddings, usual.max_position_embeddings)  # others' are short at times
    draft.config = config.model_copy(update={"max_position_embeddings": context})
    return draft, own_ids
