"""Sampling verification is exact: chi-square over many draws, and the test fails when the rule is broken."""

import itertools

import pytest
import torch
from models import VOCAB, trained_draft
from scipy.stats import chisquare

from draftsmith.core.shape import Shape
from draftsmith.decoding import speculate
from draftsmith.decoding.cache import StaticCache
from draftsmith.decoding.sampling import Sampling, probabilities
from draftsmith.decoding.speculate import Decoder
from draftsmith.decoding.tree import DraftTree
from draftsmith.decoding.verify import Accepted, verify_greedy, verify_sampling
from draftsmith.drafts.eagle3.drafter import Eagle3Drafter

DRAWS = 10_000
SIGNIFICANCE = 1e-4
SETTINGS = [Sampling(1.0), Sampling(0.7), Sampling(1.0, top_p=0.8), Sampling(1.0, top_k=5)]
SHAPES = [Shape(3, 1, 4), Shape(3, 4, 8)]


def goodness(counts: dict, expected: dict) -> float:
    """p-value of the counts, rare outcomes pooled; 0 where something impossible was drawn."""
    total = sum(counts.values())
    if any(outcome not in expected for outcome in counts):
        return 0.0
    common = [o for o, p in expected.items() if p * total >= 10]
    observed = [counts.get(o, 0) for o in common] + [total - sum(counts.get(o, 0) for o in common)]
    wanted = [expected[o] * total for o in common] + [total - sum(expected[o] * total for o in common)]
    if wanted[-1] < 5:
        wanted[-2] += wanted.pop()
        observed[-2] += observed.pop()
    return chisquare(observed, [w * sum(observed) / sum(wanted) for w in wanted]).pvalue


class Memo:
    """Makes 20,000 decodings of one prompt cheap: target and draft are functions of the text, so they are looked up."""

    def __init__(self, target, drafter):
        self.target, self.drafter = target, drafter
        self.eos_ids, self.device, self.context = frozenset(), target.device, target.context
        self.seen: dict = {}

    # the target's side -----------------------------------------------------------------------------------------
    def new_cache(self, capacity):
        return StaticCache(1, capacity)

    def prefill(self, cache, rows, prompts, taps):
        self.text = list(prompts[0])
        return torch.zeros(len(self.text), 1), self._nodes(DraftTree([self.text[-1]], [-1]), self.text[:-1])

    def verify(self, cache, length, ids, depths, ancestors, taps):
        parents = [-1] + [max(j for j in range(i) if ancestors[i, j]) for i in range(1, len(ids))]
        return torch.zeros(len(ids), 1), self._nodes(DraftTree(ids, parents), self.text[:length])

    def logits(self, nodes):
        return nodes

    def _nodes(self, tree, before):
        key = (tuple(before), tuple(tree.tokens), tuple(tree.parents))
        if key not in self.seen:
            documents = []
            for node in range(len(tree.tokens)):
                path = []
                while node >= 0:
                    path.append(tree.tokens[node])
                    node = tree.parents[node]
                documents.append([*before, *reversed(path)])
            self.seen[key] = logits_after(self.target, documents)
        return self.seen[key]


def logits_after(target, documents):
    """Target logits [N, V] after each document."""
    ends = torch.tensor([len(d) for d in documents]).cumsum(0) - 1
    return target.logits(target.capture(documents, ()).last_TH[ends])


class MemoDrafter:
    taps = ()

    def __init__(self, memo):
        self.memo = memo
        self.trees: dict = {}

    def start(self):
        self.new_text = None

    def extend(self, taps, next_ids):
        if self.new_text is None:  # the prompt's own tokens and the first one drawn
            self.new_text = [self.memo.text[0], *next_ids]
        else:
            self.new_text += next_ids
        self.memo.text = self.new_text

    def propose(self, root, shape):
        key = (tuple(self.new_text), str(shape))
        if key not in self.trees:
            drafter = self.memo.drafter
            drafter.start()
            text = self.new_text
            states = self.memo.target.capture([text[:-1]], drafter.taps)
            drafter.extend(states.taps_TKH, text[1:])
            self.trees[key] = drafter.propose(root, shape)
        return self.trees[key]


def exact(target, prompt, sampling) -> dict:
    """Joint distribution of the second and third token after the prompt by plain decoding, enumerated."""
    first = probabilities(logits_after(target, [prompt]), sampling)[0]
    pairs: dict = {}
    for a in first.nonzero().flatten().tolist():
        second = probabilities(logits_after(target, [[*prompt, a]]), sampling)[0]
        third = probabilities(logits_after(target, [[*prompt, a, b] for b in range(VOCAB)]), sampling)
        joint = (first[a] * second[:, None] * third).double()
        for b, c in joint.nonzero().tolist():
            pairs[b, c] = pairs.get((b, c), 0.0) + float(joint[b, c])
    return pairs


def draw(sampling, shape, draws=DRAWS):
    target, draft, ids = trained_draft("llama")
    memo = Memo(target, Eagle3Drafter(draft, ids, target.embedding_rows()))
    decoder = Decoder(memo, MemoDrafter(memo))
    prompt = [3, 17, 42, 5, 9]
    counts: dict = {}
    accepted = 0
    for seed in range(draws):
        decoded = decoder.generate(prompt, sampling, 3, shape, seed=seed)
        counts[tuple(decoded.ids[1:])] = counts.get(tuple(decoded.ids[1:]), 0) + 1
        accepted += sum(decoded.verified)
    assert accepted > draws // 100, "nothing was accepted, so nothing was tested"
    return goodness(counts, exact(target, prompt, sampling))  # the first token is drawn before any drafting


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_drafting_leaves_the_distribution_alone(sampling, shape):
    assert draw(sampling, shape, DRAWS // 2) > SIGNIFICANCE


def test_broken_rules_are_caught(monkeypatch):
    """Three plausible mistakes, each of which the chi-square above must see."""

    def accept_likeliest(tree, probabilities_of, generator):  # accepts whatever the draft proposed first
        verdict = verify_sampling(tree, probabilities_of, generator)
        if len(verdict.path) == 1 and tree.children[0] and float(torch.rand((), generator=generator)) < 0.1:
            child = tree.children[0][0]
            bonus = verify_sampling(DraftTree([0], [-1]), lambda _: probabilities_of(child), generator).bonus
            return Accepted([0, child], bonus)
        return verdict

    def keep_rejected(tree, probabilities_of, generator):  # forgets to remove the rejected children
        verdict = verify_sampling(tree, probabilities_of, generator)
        node = verdict.path[-1]
        again = verify_sampling(DraftTree([0], [-1]), lambda _: probabilities_of(node), generator)
        return Accepted(verdict.path, again.bonus)

    def parent_bonus(tree, probabilities_of, generator):  # takes the bonus from the wrong node
        verdict = verify_sampling(tree, probabilities_of, generator)
        if len(verdict.path) == 1:
            return verdict
        again = verify_sampling(DraftTree([0], [-1]), lambda _: probabilities_of(verdict.path[-2]), generator)
        return Accepted(verdict.path, again.bonus)

    for broken, shape in zip((accept_likeliest, keep_rejected, parent_bonus), itertools.cycle(SHAPES), strict=False):
        monkeypatch.setattr(speculate, "verify_sampling", broken)
        assert draw(Sampling(1.0), shape) < SIGNIFICANCE, f"{broken.__name__} with {shape} went unnoticed"


def test_greedy_descends_to_the_argmax():
    tree = DraftTree([9, 4, 5, 6, 7], [-1, 0, 0, 2, 3])  # 9 -> (4, 5 -> 6 -> 7)
    assert verify_greedy(tree, [5, 0, 6, 1, 2]) == Accepted([0, 2, 3], 1)
    assert verify_greedy(tree, [8, 0, 6, 1, 2]) == Accepted([0], 8)


def test_children_that_hold_everything_leave_no_remainder():
    tree = DraftTree([0, 1, 2], [-1, 0, 0])
    p = torch.zeros(VOCAB)
    p[1] = p[2] = 0.5
    for seed in range(50):
        assert len(verify_sampling(tree, lambda _: p, torch.Generator().manual_seed(seed)).path) == 2
