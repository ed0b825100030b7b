"""Which drafted tokens the target accepts, and the bonus token after them.

Greedy: descend to the child that equals the target's argmax. Sampling (SGLang's target-only rule): draw one u per node
and accept child i when u falls into its share of p; otherwise draw from p without the children. Every token is thus
drawn from the target's own p, whatever the draft proposed, so the output distribution is exactly plain decoding's.

Shapes: W nodes, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.decoding.tree import DraftTree


@dataclass(frozen=True)
class Accepted:
    """`path`: accepted nodes, the root first. `bonus`: the target's own token after the last of them."""

    path: list[int]
    bonus: int


def verify_greedy(tree: DraftTree, argmax_W: list[int]) -> Accepted:
    path = [0]
    while True:
        wanted = argmax_W[path[-1]]
        child = next((c for c in tree.children[path[-1]] if tree.tokens[c] == wanted), None)
        if child is None:
            return Accepted(path, wanted)
        path.append(child)


def verify_sampling(tree: DraftTree, probabilities_of: Callable[[int], Tensor], generator: torch.Generator) -> Accepted:
    """`probabilities_of(node)`: the target's distribution [V] after that node, filters applied."""
    path = [0]
    while True:
        p = probabilities_of(path[-1]).double()
        children = tree.children[path[-1]]
        u = float(torch.rand((), generator=generator, dtype=torch.float64))
        cumulative = 0.0
        for child in children:
            cumulative += float(p[tree.tokens[child]])
            if u < cumulative:
                path.append(child)
                break
        else:
            rest = p.clone()
            rest[[tree.tokens[c] for c in children]] = 0.0
            if float(rest.sum()) <= 0.0:  # the children hold all of p, up to rounding
                rest = p
            return Accepted(path, _draw(rest, generator))


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    cumulative = weights.cumsum(0)
    u = torch.rand((), generator=generator, dtype=torch.float64).to(weights.device)
    return min(int(torch.searchsorted(cumulative, u * cumulative[-1], right=True)), len(weights) - 1)
