"""Draft trees with SGLang's semantics (`steps`, `topk`, `draft_tokens`); a chain is a tree with topk 1.

Step 1 takes the top K tokens after the root. Every later step gives each of the K beam nodes its top K children, scores
a child by the product of probabilities along its path, and keeps the best K of these K * K as the next beam. Of all
K + (steps - 1) * K * K candidates the best draft_tokens - 1 by score are verified, in the order they were proposed.
A parent scores at least as high as its children and was proposed earlier, so whatever is kept is a tree.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from draftsmith.core.shape import Shape


@dataclass
class DraftTree:
    """Node 0 is the root, the last token known to be right. Parents come before their children."""

    tokens: list[int]
    parents: list[int]  # -1 for the root
    children: list[list[int]] = field(init=False)
    depths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.children = [[] for _ in self.tokens]
        self.depths = [0] * len(self.tokens)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                self.children[parent].append(node)
                self.depths[node] = self.depths[parent] + 1

    def ancestors(self) -> Tensor:
        """[W, W] bool: column is the row's ancestor or the row itself; the tree mask."""
        mask = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask


def grow_tree(
    root: int,
    first_probabilities_D: Tensor,
    expand: Callable[[list[int], list[int]], Tensor],
    to_target: Callable[[int], int],
    shape: Shape,
) -> DraftTree:
    """Build the tree of one decoding step.

    first_probabilities_D: draft distribution after the root. expand(tokens, beam_parents): draft distributions [K, D]
    after each beam node, given its target token and the index of its parent in the beam before (-1 after the root).
    """
    k = shape.topk
    probs, ids = first_probabilities_D.topk(k)
    scores: list[float] = probs.tolist()
    tokens = [to_target(i) for i in ids.tolist()]
    parents = [-1] * k  # indices into the candidate list
    beam = list(range(k))
    beam_parents = [-1] * k
    for _ in range(shape.steps - 1):
        probs_KD = expand([tokens[b] for b in beam], beam_parents)
        top, ids_KK = probs_KD.topk(k, dim=-1)
        candidates = (top * torch.tensor([scores[b] for b in beam], device=top.device)[:, None]).flatten()
        first = len(tokens)
        scores += candidates.tolist()
        tokens += [to_target(i) for i in ids_KK.flatten().tolist()]
        parents += [b for b in beam for _ in range(k)]
        kept = candidates.topk(k).indices.tolist()
        beam_parents = [i // k for i in kept]
        beam = [first + i for i in kept]
    best = sorted(sorted(range(len(tokens)), key=lambda i: (-scores[i], i))[: shape.draft_tokens - 1])
    place = {-1: 0} | {candidate: position for position, candidate in enumerate(best, 1)}
    return DraftTree([root, *(tokens[i] for i in best)], [-1, *(place[parents[i]] for i in best)])
