"""Which drafted tokens the target accepts, and the bonus token after them.

Greedy: descend to the child that equals the target's argmax. Sampling: draw one u per node and accept child i when u
falls into its share; otherwise draw from what they leave. The share of a first choice is its own p, whatever the draft
thought of it (SGLang's target-only rule). A child that was drawn from q is accepted with min(1, p / q), where p is what
the others leave of the target's, and leaves max(p - q, 0) (arXiv 2211.17192, algorithm 1). Every token is thus drawn
from the target's own distribution, so the output's is exactly plain decoding's.

Shapes: R rows, k children, W nodes, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from draftsmith.decoding.sampling import invert_cdf, uniforms
from draftsmith.decoding.tree import DraftTree

Accepted = tuple[list[int], int]
"""Accepted nodes, the root first, and the bonus: the target's own token after the last of them."""


def verify_greedy(tree: DraftTree, argmax_W: list[int]) -> Accepted:
    path = [0]
    while True:
        wanted = argmax_W[path[-1]]
        child = next((c for c in tree.children[path[-1]] if tree.tokens[c] == wanted), None)
        if child is None:
            return path, wanted
        path.append(child)


def verify_sampling(tree: DraftTree, probabilities_of: Callable[[int], Tensor], generator: torch.Generator) -> Accepted:
    """`probabilities_of(node)`: the target's distribution [V] after that node, filters applied."""
    path = [0]
    while True:
        p = probabilities_of(path[-1])[None]
        children = tree.children[path[-1]]
        tokens = torch.tensor([[tree.tokens[child] for child in children]], dtype=torch.long, device=p.device)
        q = tree.drawn.get(children[-1]) if children else None
        which, rest = choose(p, tokens, None if q is None else q.to(p)[None], generator)
        if int(which) == len(children):
            return path, int(invert_cdf(rest, uniforms(rest, generator)))
        path.append(children[int(which)])


def choose(p_RV: Tensor, tokens_Rk: Tensor, q_RV: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(index of the accepted child [R], k where none is; what the bonus token is then drawn from [R, V]).

    p_RV: the target's. q_RV: where the last child was drawn, the draft's distribution without the children before it.
    """
    shares = p_RV.gather(1, tokens_Rk)
    if q_RV is None:
        rest = p_RV.scatter(1, tokens_Rk, 0.0)
    else:
        rest = p_RV.scatter(1, tokens_Rk[:, :-1], 0.0)
        shares[:, -1:] /= q_RV.gather(1, tokens_Rk[:, -1:])  # u < 1 caps it at what the children before it leave
        rest = (rest - rest.sum(1, keepdim=True) * q_RV).clamp_(min=0.0)
    some_R1 = rest.sum(1, keepdim=True) > 0
    if not bool(some_R1.all()):  # the children hold all of p, up to rounding
        rest = torch.where(some_R1, rest, p_RV)
    u_R1 = uniforms(p_RV, generator)[:, None]
    return torch.searchsorted(shares.cumsum(1, dtype=u_R1.dtype), u_R1, right=True).squeeze(1), rest
