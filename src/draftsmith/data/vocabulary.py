"""Stage 3: the draft vocabulary, the target's most frequent loss tokens.

`d2t` is stored as an offset (target id = draft id + d2t[draft id]), as both engines read it; `t2d` is a bool per
target id. The map is named by its content, and a draft refuses any other.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from draftsmith.core.errors import CheckpointError, DataError
from draftsmith.core.files import digest, save_tensors
from draftsmith.core.progress import Meter, say
from draftsmith.core.recipe import Recipe
from draftsmith.core.records.data import Coverage
from draftsmith.core.run_files import RunFiles
from draftsmith.data.regenerate import read_completions
from draftsmith.drafts.directories import load_draft

SIZES = [1024 * 2**i for i in range(7)]  # 1 k .. 64 k


@dataclass(frozen=True)
class DraftVocabulary:
    """`ids_D`: target id of every draft id, ascending."""

    ids_D: Tensor
    target_size: int

    @property
    def name(self) -> str:
        """Content address."""
        return digest(self.ids_D.tolist(), self.target_size)

    @property
    def d2t(self) -> Tensor:
        return self.ids_D - torch.arange(len(self.ids_D))

    @property
    def t2d(self) -> Tensor:
        return torch.zeros(self.target_size, dtype=torch.bool).index_fill_(0, self.ids_D, True)

    def save(self, path: Path) -> None:
        save_tensors(path, {"d2t": self.d2t, "t2d": self.t2d}, {"name": self.name})

    @classmethod
    def load(cls, path: Path) -> "DraftVocabulary":
        try:
            tensors = load_file(path)
            d2t, t2d = tensors["d2t"].long(), tensors["t2d"].bool()
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"{path}: cannot read the draft vocabulary: {error}") from None
        vocabulary = cls(t2d.nonzero()[:, 0], len(t2d))
        if not torch.equal(vocabulary.d2t, d2t):
            raise CheckpointError(f"{path}: d2t and t2d name different tokens")
        return vocabulary


def require_size(size: int, target_size: int, special: int) -> None:
    """`special`: how many tokens are always in."""
    if size > target_size:
        raise DataError(f"vocab.size: {size} is larger than the target's vocabulary of {target_size}")
    if size < special:
        raise DataError(f"vocab.size: {size} is too small for the target's {special} special tokens")


def choose(counts: Counter[int], size: int, target_size: int, always: set[int]) -> DraftVocabulary:
    """The `size` most frequent tokens; `always` (special and end tokens) are in first; ties go to the lower id."""
    require_size(size, target_size, len(always))
    by_count = sorted(counts, key=lambda token: (-counts[token], token))
    ranked = dict.fromkeys((*always, *by_count, *range(target_size)))  # what the data never shows comes last
    return DraftVocabulary(torch.tensor(sorted(islice(ranked, size))), target_size)


def coverage_of(vocabulary: DraftVocabulary, counts: dict[str, Counter[int]], always: set[int]) -> Coverage:
    """Share of loss tokens covered at each size, by category: the `size` tokens most frequent over all."""
    total: Counter[int] = sum(counts.values(), Counter())
    order = list(always) + [t for t, _ in sorted(total.items(), key=lambda kv: (-kv[1], kv[0])) if t not in always]
    chosen, shares, own = set(vocabulary.ids_D.tolist()), {}, {}
    for name, counter in {"all": total, **counts}.items():
        covered = np.cumsum([counter[token] for token in order]) / max(1, counter.total())
        shares[name] = [float(covered[min(size, len(covered)) - 1]) for size in SIZES]
        own[name] = sum(n for token, n in counter.items() if token in chosen) / max(1, counter.total())
    return Coverage(
        name=vocabulary.name,
        sizes=SIZES,
        coverage=shares,
        distinct_tokens=len(total),
        loss_tokens=total.total(),
        chosen_size=len(chosen),
        chosen=own,
    )


def build_vocabulary(
    recipe: Recipe, completions: Path, target_size: int, always: set[int], run: RunFiles
) -> DraftVocabulary:
    """Stage `vocab`: writes vocab.safetensors and coverage.json. A draft that training goes on from brings its own."""
    counts: dict[str, Counter[int]] = {}
    with Meter("vocab", None, "completions") as meter:
        for completion in read_completions(completions):
            tokens = completion.loss_tokens
            counts.setdefault(completion.category, Counter()).update(tokens)
            meter.advance(tokens=len(tokens))
    if (start := recipe.train.from_draft) is not None:
        vocabulary = DraftVocabulary(load_draft(start, reading="auto")[1], target_size)
        if (own := len(vocabulary.ids_D)) != recipe.vocab.size:
            say(f"vocab: the {own:,} tokens of {start}; vocab.size {recipe.vocab.size:,} is for new drafts")
    else:
        vocabulary = choose(sum(counts.values(), Counter()), recipe.vocab.size, target_size, always)
    coverage = coverage_of(vocabulary, counts, always)
    vocabulary.save(run.vocabulary)
    coverage.save(run.coverage)
    covered = f"{coverage.chosen['all']:.2%}"
    say(f"vocab: {coverage.chosen_size:,} of {target_size:,} tokens cover {covered} of the loss tokens")
    return vocabulary
