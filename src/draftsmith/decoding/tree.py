"""Draft trees with SGLang's semantics (`steps`, `topk`, `draft_tokens`); a chain is a tree with topk 1.

Step 1 takes the top K tokens after the root. Every later step gives each of the K beam nodes its top K children, scores
a child by the product of probabilities along its path, and keeps the best K of these K * K as the next beam. Of all
K + (steps - 1) * K * K candidates the best draft_tokens - 1 by score are verified, in the order they were proposed.
A parent scores at least as high as its children and was proposed earlier, so whatever is kept is a tree.

So drafts are taken greedily. `Sampled` takes them for temperatures above 0: the last child of every node is drawn; in a
chain that is every token (arXiv 2211.17192). A drawn token must not decide whether it is kept, or what is kept would no
longer be distributed as q: its score is told by the distribution alone.

Shapes: K nodes, D draft vocabulary, V target vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from draftsmith.core.shape import Shape
from draftsmith.decoding.sampling import invert_cdf, uniforms

# Of the probability that a node's first choices leave, what a drawn child is taken to be accepted with when branches
# are compared; of 0.15, 0.3 and 0.5 the best on a trained SmolLM2 draft (tau 1.59, 1.61, 1.54 at 3/4/8, T = 1).
DRAWN_SHARE = 0.3


@dataclass
class DraftTree:
    """Node 0 is the root, the last token known to be right. Parents come before their children."""

    tokens: list[int]
    parents: list[int]  # -1 for the root
    drawn: dict[int, Tensor] = field(default_factory=dict)
    """Of nodes that were drawn: the distribution [V] they were drawn from. Each is the last of its siblings."""
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


Taken = tuple[Tensor, Tensor, Tensor | None]
"""Children of K nodes: scores and draft ids [K, topk], and the distributions [K, D] that the last ones were drawn from
where they were."""
Take = Callable[[Tensor, int], Taken]
"""(draft logits [K, D], topk) -> children"""


def first_choices(logits_KD: Tensor, topk: int) -> Taken:
    return (*torch.softmax(logits_KD, dim=-1).topk(topk, dim=-1), None)


@dataclass(frozen=True)
class Sampled:
    """The first choices but one, and a draw from what is left. Of the sampling only the temperature acts on a draft."""

    temperature: float
    generator: torch.Generator

    def __call__(self, logits_KD: Tensor, topk: int) -> Taken:
        q_KD = torch.softmax(logits_KD / self.temperature, dim=-1)
        probs, ids = q_KD.topk(topk - 1, dim=-1)
        if topk > 1:
            q_KD = torch.softmax(logits_KD.scatter(-1, ids, float("-inf")) / self.temperature, dim=-1)
        drawn = invert_cdf(q_KD, uniforms(q_KD, self.generator))[:, None]
        score = DRAWN_SHARE * (1 - probs.sum(-1, keepdim=True))
        return torch.cat([probs, score], 1), torch.cat([ids, drawn], 1), q_KD


def grow_tree(
    root: int,
    first_logits_D: Tensor,
    expand: Callable[[list[int], list[int]], Tensor],
    ids_D: Tensor,
    vocab_size: int,
    shape: Shape,
    take: Take = first_choices,
) -> DraftTree:
    """Build the tree of one decoding step.

    first_logits_D: the draft's after the root. expand(tokens, beam_parents): draft logits [K, D] after each beam node,
    given its target token and the index of its parent in the beam before (-1 after the root). ids_D: target ids of the
    draft's rows.
    """
    k = shape.topk
    probs, ids, q = take(first_logits_D[None], k)
    scores: list[float] = probs.flatten().tolist()
    tokens: list[int] = ids_D[ids.flatten()].tolist()
    parents = [-1] * k  # indices into the candidate list
    drawn = {} if q is None else {k - 1: q[0]}
    beam = list(range(k))
    beam_parents = [-1] * k
    for _ in range(shape.steps - 1):
        top, ids_KK, q = take(expand([tokens[b] for b in beam], beam_parents), k)
        candidates = (top * torch.tensor([scores[b] for b in beam], device=top.device)[:, None]).flatten()
        first = len(tokens)
        scores += candidates.tolist()
        tokens += ids_D[ids_KK.flatten()].tolist()
        parents += [b for b in beam for _ in range(k)]
        drawn |= {} if q is None else {first + (i + 1) * k - 1: row for i, row in enumerate(q)}
        kept = candidates.topk(k).indices.tolist()
        beam_parents = [i // k for i in kept]
        beam = [first + i for i in kept]
    best = sorted(sorted(range(len(tokens)), key=lambda i: (-scores[i], i))[: shape.draft_tokens - 1])
    place = {-1: 0} | {candidate: position for position, candidate in enumerate(best, 1)}
    return DraftTree(
        [root, *(tokens[i] for i in best)],
        [-1, *(place[parents[i]] for i in best)],
        {place[i]: q.new_zeros(vocab_size).index_copy_(0, ids_D, q) for i, q in drawn.items() if i in place},
    )
