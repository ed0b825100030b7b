"""Accept length of any shape, from an accept profile or from a published tau.

tau = 1 + accepted draft tokens / verification steps. A tree is a set of nodes, each the ranks of the choices that lead
to it; a step accepts the longest prefix of the true path of ranks that the tree holds.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from draftsmith.core.errors import RecipeError
from draftsmith.core.records.evaluation import CERTAIN, ComparedDraft, Results
from draftsmith.core.shape import DraftSampling, Shape

Path = tuple[int, ...]
# How much rarer each further rank is at the same depth; the trained Gemma draft's profile has 0.1 to 0.5 from rank to
# rank (results.json, profile.table), and one number is all that a published tau can carry.
RANK_RATIO = 0.25


def best_tree(frequency: Callable[[Path], float], shape: Shape) -> set[Path]:
    """The `draft_tokens` - 1 most frequent nodes of SGLang's tree (decoding/tree.py), the same at every step.

    At every depth only the children of the topk best nodes are candidates. Real trees follow the draft's confidence
    step by step, so they hold the true path at least as often.
    """
    nodes: list[Path] = []
    beam: list[Path] = [()]
    for _ in range(shape.steps):
        children = [(*node, rank) for node in beam for rank in range(1, shape.topk + 1)]
        children.sort(key=lambda path: (-frequency(path), path))
        nodes += children
        beam = children[: shape.topk]
    nodes.sort(key=lambda path: (-frequency(path), len(path), path))
    return set(nodes[: shape.draft_tokens - 1])


@dataclass(frozen=True)
class _Walks:
    """rows[text][position]: what is known of every depth from there on, in so many `digits` each.

    tau walks each text as decoding does, so a chain's comes out exactly as greedy decoding would have it. Decoding
    meets hard positions more often than their share of the text: after every miss it stands before the next one.
    """

    rows: Sequence[Sequence[str]]
    digits: ClassVar[int]

    @property
    def deepest(self) -> int:
        """Steps beyond which nothing is known."""
        return max(len(row) // self.digits for text in self.rows for row in text)

    def _mean(self, steps: int, chance: Callable[[str], float]) -> float:
        """tau where a step accepts its tokens one by one: `chance` of the last, by the digits up to it. Given the text
        that is a mean over all walks along it."""
        taken = hits = 0.0
        for text in self.rows:
            visits = [1.0] + [0.0] * (len(text) + steps)
            for position, row in enumerate(text):
                if not (reached := visits[position]):
                    continue
                if len(row) < self.digits * steps:
                    break
                taken += reached
                for depth in range(1, steps + 1):
                    accepted = reached * chance(row[: self.digits * depth])
                    visits[position + depth] += reached - accepted
                    hits += accepted
                    reached = accepted
                visits[position + steps + 1] += reached
        if not taken:
            raise RecipeError(f"predict: no text of the profile is long enough for {steps} steps; give fewer")
        return 1 + hits / taken


class MeasuredProfile(_Walks):
    """results.json's `profile`: a digit is the rank of the target's token at that depth, 0 for none of the choices."""

    digits = 1

    def tau(self, shape: Shape) -> float:
        whole = [row[: shape.steps] for text in self.rows for row in text if len(row) >= shape.steps]
        counts = Counter(tuple(map(int, row[:depth])) for row in whole for depth in range(1, shape.steps + 1))
        tree = best_tree(lambda path: counts[path], shape)
        return self._mean(shape.steps, lambda row: tuple(map(int, row)) in tree)


class SampledProfile(_Walks):
    """results.json's `sampled_profile` for chains of drafts that are sampled; chances as they are there."""

    digits = 2

    def tau(self, shape: Shape) -> float:
        assert shape.topk == 1, "a tree's chances are not known"
        return self._mean(shape.steps, lambda row: int(row[-2:]) / CERTAIN)


@dataclass(frozen=True)
class GeometricProfile:
    """Every depth alike: choice r is right with probability alpha * RANK_RATIO ** (r - 1).

    Above alpha = 1 - RANK_RATIO the choices after the first share what it leaves, so that all stay within 1.
    """

    alpha: float
    deepest: int = 16

    def share(self, rank: int) -> float:
        """How often the choice of this rank (1 is the first) is right."""
        if rank == 1:
            return self.alpha
        left = (1 - self.alpha) * (1 - RANK_RATIO) * RANK_RATIO ** (rank - 2)
        return min(self.alpha * RANK_RATIO ** (rank - 1), left)

    def tau(self, shape: Shape) -> float:
        def frequency(path: Path) -> float:
            return math.prod(self.share(rank) for rank in path)

        return 1 + sum(frequency(path) for path in best_tree(frequency, shape))


def published(tau: float, shape: Shape) -> GeometricProfile:
    """The geometric profile that has this tau at this shape (a model card's)."""
    if not 1 < tau < shape.steps + 1:
        raise RecipeError(
            f"--tau: {tau:g} given; above 1 and below {shape.steps + 1} at {shape}, or give the --shape it was at"
        )
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if GeometricProfile(middle).tau(shape) < tau else (low, middle)
    return GeometricProfile(low)


@dataclass(frozen=True)
class Calibrated:
    """A profile, corrected by what decoding measured: chains by a chain's tau, trees by a tree's.

    tau - 1 is scaled by measured / profiled of the nearest measured shape of the same kind.
    """

    profile: MeasuredProfile | SampledProfile
    measured: dict[Shape, float]  # tau by shape

    @property
    def deepest(self) -> int:
        return self.profile.deepest

    def tau(self, shape: Shape) -> float:
        alike = [s for s in self.measured if (s.topk == 1) == (shape.topk == 1) and s.steps <= self.deepest]
        raw = self.profile.tau(shape)
        if not alike:
            return raw
        nearest = min(alike, key=lambda s: abs(s.draft_tokens - shape.draft_tokens))
        there = self.profile.tau(nearest)
        return 1 + (raw - 1) * (self.measured[nearest] - 1) / (there - 1) if there > 1 else raw


AcceptLength = MeasuredProfile | SampledProfile | GeometricProfile | Calibrated


def from_results(
    results: Results | ComparedDraft, temperature: float = 0.0, drafts: DraftSampling = "greedy"
) -> AcceptLength:
    """Of an evaluation: its profile, if of this temperature, corrected by its own measurements there with drafts taken
    in this way; else the first of these."""
    measured = {
        entry.shape: entry.all.tau
        for entry in results.acceptance
        if (entry.temperature, entry.drafts) == (temperature, drafts) and entry.all.tau and entry.all.tau > 1
    }
    profile = results.profile
    if profile and profile.temperature == temperature:
        drawn = drafts == "sampled"
        return Calibrated(SampledProfile(profile.chances) if drawn else MeasuredProfile(profile.walks), measured)
    if not measured:
        raise RecipeError(
            f"predict: the evaluation holds no tau at temperature {temperature:g}, {drafts} drafts; give --tau, or add "
            "it to evaluate.temperatures"
        )
    shape, tau = next(iter(measured.items()))
    return published(tau, shape)
