"""The tree builder against a literal enumeration of SGLang's rule."""

import itertools

import pytest
import torch

from draftsmith.core.shape import Shape
from draftsmith.decoding.tree import DraftTree, first_choices, grow_tree

VOCAB = 12


def logits(path: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(hash(path) % 2**31)) * 2


def distribution(path: tuple[int, ...]) -> torch.Tensor:
    return torch.softmax(logits(path), -1)


def by_enumeration(root: int, shape: Shape) -> list[tuple[int, ...]]:
    """Paths of the verified nodes, in order."""
    best = distribution((root,)).topk(shape.topk)
    beam = [((root, t), p) for t, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    candidates = list(beam)
    for _ in range(shape.steps - 1):
        layer = []
        for path, score in beam:
            top = distribution(path).topk(shape.topk)
            layer += [((*path, t), score * p) for t, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        candidates += layer
        beam = sorted(layer, key=lambda item: -item[1])[: shape.topk]
    order = sorted(range(len(candidates)), key=lambda i: -candidates[i][1])[: shape.draft_tokens - 1]
    return [candidates[i][0] for i in sorted(order)]


def paths(tree: DraftTree) -> list[tuple[int, ...]]:
    result = []
    for node in range(1, len(tree.tokens)):
        path = []
        while node >= 0:
            path.append(tree.tokens[node])
            node = tree.parents[node]
        result.append(tuple(reversed(path)))
    return result


def grow(root: int, shape: Shape, take=first_choices) -> DraftTree:
    beam_paths: list[tuple[int, ...]] = []

    def expand(tokens, beam_parents):
        nonlocal beam_paths
        before = [(root,) if p < 0 else beam_paths[p] for p in beam_parents]
        beam_paths = [(*b, t) for b, t in zip(before, tokens, strict=True)]
        return torch.stack([logits(path) for path in beam_paths])

    return grow_tree(root, logits((root,)), expand, torch.arange(VOCAB), VOCAB, shape, take)


@pytest.mark.parametrize(
    ("shape", "root"),
    list(
        itertools.product([Shape(3, 4, 8), Shape(3, 1, 4), Shape(5, 3, 16), Shape(1, 4, 5), Shape(4, 2, 6)], range(6))
    ),
    ids=str,
)
def test_is_the_enumerated_tree(shape, root):
    tree = grow(root, shape)
    assert paths(tree) == by_enumeration(root, shape)
    assert len(tree.tokens) == shape.draft_tokens
    assert max(tree.depths) <= shape.steps


def test_ancestor_mask():
    tree = DraftTree([1, 2, 3, 4], [-1, 0, 1, 0])
    assert tree.ancestors().int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    assert tree.depths == [0, 1, 2, 1]
