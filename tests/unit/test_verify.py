"""Sampling verification is exact, however drafts are taken: chi-square over many draws, and it sees broken rules.

Target and draft are tables of logits by the last token, so that what plain decoding draws is known exactly and a text
of 20,000 tokens is as many draws; a broken rule shows in 8,000.
"""

from dataclasses import dataclass, field

import pytest
import torch
from scipy.stats import chisquare

from draftsmith.core.shape import Shape
from draftsmith.decoding import speculate
from draftsmith.decoding.sampling import Sampling, invert_cdf, probabilities, uniforms
from draftsmith.decoding.speculate import Decoder
from draftsmith.decoding.tree import DraftTree, Sampled, first_choices, grow_tree
from draftsmith.decoding.verify import choose, verify_greedy, verify_sampling

VOCAB, DRAFT_VOCAB, ROWS, TOKENS = 14, 9, 40_000, 8_000
SIGNIFICANCE = 1e-4
SETTINGS = [Sampling(1.0), Sampling(0.7), Sampling(1.0, top_p=0.8), Sampling(1.0, top_k=5), Sampling(0.7, 0.9, 8)]
CHAIN, TREE = Shape(3, 1, 4), Shape(3, 4, 8)


@dataclass
class Tables:
    """Target and drafter in one. The draft knows 9 of 14 tokens, and gives some of them no mass at all."""

    target_VV: torch.Tensor = field(default_factory=lambda: torch.randn(VOCAB, VOCAB, generator=_seeded(1)))
    ids_D: torch.Tensor = field(
        default_factory=lambda: torch.randperm(VOCAB, generator=_seeded(2))[:DRAFT_VOCAB].sort()[0]
    )
    draft_VD: torch.Tensor = field(init=False)
    device, eos_ids, context, taps = torch.device("cpu"), frozenset(), 10**9, ()

    def __post_init__(self):
        noise = torch.randn(VOCAB, DRAFT_VOCAB, generator=_seeded(3))
        self.draft_VD = (self.target_VV[:, self.ids_D] + noise).masked_fill(noise > 1.2, float("-inf"))

    # the target's side
    def new_cache(self, capacity):
        return self

    def keep(self, start, columns):
        pass

    def prefill(self, cache, rows, prompts, taps):
        return torch.zeros(1, 1), self.target_VV[prompts[0]]

    def verify(self, cache, length, ids, depths, ancestors, taps):
        return torch.zeros(len(ids), 1), self.target_VV[ids]

    def logits(self, rows):
        return rows

    # the drafter's
    def start(self):
        pass

    def extend(self, taps, next_ids):
        pass

    def propose(self, root, shape, take=first_choices):
        return grow_tree(root, self.draft_VD[root], lambda ids, _: self.draft_VD[ids], self.ids_D, VOCAB, shape, take)


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


def pvalue(counts_RV, p_RV):
    """Of counts [R, V] of draws from the rows of p; 0 where something impossible was drawn."""
    if counts_RV[p_RV == 0].sum():
        return 0.0
    expected = counts_RV.sum(1, keepdim=True) * p_RV
    rare = (expected < 10) & (p_RV > 0)
    observed, wanted = counts_RV[expected >= 10], expected[expected >= 10]
    if expected[rare].sum() >= 10:
        observed = torch.cat([observed, counts_RV[rare].sum()[None]])
        wanted = torch.cat([wanted, expected[rare].sum()[None]])
    wanted = wanted * observed.sum() / wanted.sum()
    return chisquare(observed, wanted, ddof=len(p_RV) - 1).pvalue


def one_step(sampling, topk, choose=choose, spread=None, drafts="sampled"):
    """(p-value of the token that 40,000 verifications of one drafted node each give, share that accept no child)"""
    tables, generator, root = Tables(), _seeded(5), 3
    p = probabilities(tables.target_VV[root][None], sampling).double()
    take = Sampled(sampling.temperature, generator) if drafts == "sampled" else first_choices
    _, ids, q_RD = take(tables.draft_VD[root].expand(ROWS, -1), topk)
    tokens, q = tables.ids_D[ids], None
    if q_RD is not None:
        q = torch.zeros(ROWS, VOCAB, dtype=torch.double)
        q[:, tables.ids_D if spread is None else spread] = q_RD.double()
    which, rest = choose(p.expand(ROWS, -1), tokens, q, generator)
    rejected = which == topk
    bonus = invert_cdf(rest, uniforms(rest, generator))
    drawn = torch.where(rejected, bonus, tokens.gather(1, which.clamp(max=topk - 1)[:, None])[:, 0])
    return pvalue(torch.bincount(drawn, minlength=VOCAB).double()[None], p), float(rejected.float().mean())


@pytest.mark.parametrize("drafts", ["greedy", "sampled"])
@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_a_node_gives_the_targets_distribution(sampling, topk, drafts):
    value, rejected = one_step(sampling, topk, drafts=drafts)
    assert value > SIGNIFICANCE
    assert 0.05 < rejected < 0.95, "nearly all alike, so nothing was tested"


def whole_residual(p, tokens, q, generator):  # what was drafted is not taken off
    return choose(p, tokens, q, generator)[0], p


def target_only_residual(p, tokens, q, generator):  # the rule of first choices for what a rejected draw leaves
    return choose(p, tokens, q, generator)[0], p.scatter(1, tokens, 0.0)


def target_only_share(p, tokens, q, generator):  # accepted with p instead of p / q
    return choose(p, tokens, None, generator)[0], choose(p, tokens, q, generator)[1]


def upside_down(p, tokens, q, generator):  # q / p
    return choose(q, tokens, p, generator)[0], choose(p, tokens, q, generator)[1]


def forgotten_siblings(p, tokens, q, generator):  # what they leave of p is compared with q as if it were all
    rest = p.scatter(1, tokens[:, :-1], 0.0)
    return choose(p, tokens, q, generator)[0], (rest - q).clamp(min=0)


@pytest.mark.parametrize("drafts", ["greedy", "sampled"])
def test_children_that_hold_all_of_p_leave_p(drafts):
    """Their shares may sum to less than 1 by rounding: then nothing is left to draw the bonus token from."""
    p = torch.tensor([[0.0, 0.7, 0.3, 0.0], [0.1, 0.6, 0.2, 0.1]])
    q = None if drafts == "greedy" else torch.tensor([[0.0, 0.0, 1.0, 0.0]]).expand(2, -1)
    _, rest = choose(p, torch.tensor([[1, 2], [1, 2]]), q, _seeded(0))
    torch.testing.assert_close(rest[0], p[0])
    assert rest[1, 1] == 0 < rest[1].sum()


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("broken", [whole_residual, target_only_residual, target_only_share, upside_down])
def test_a_broken_residual_or_ratio_is_seen(broken, sampling, topk):
    assert one_step(sampling, topk, broken)[0] < SIGNIFICANCE


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_what_siblings_hold_is_not_accepted_twice(sampling):
    assert one_step(sampling, 3, forgotten_siblings)[0] < SIGNIFICANCE


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_a_broken_map_is_seen(sampling, topk):
    assert one_step(sampling, topk, spread=torch.arange(DRAFT_VOCAB))[0] < SIGNIFICANCE


def transitions(sampling, shape, drafts, tables=None, size=TOKENS):
    """(p-value of every pair of neighbours in a text of `size` tokens, the text), by the decoder's own loop."""
    tables = tables or Tables()
    text = Decoder(tables, tables, draft_sampling=drafts).generate([3], sampling, size, shape, seed=1)
    counts = torch.zeros(VOCAB, VOCAB, dtype=torch.double)
    counts.index_put_((torch.tensor([3, *text.ids[:-1]]), torch.tensor(text.ids)), torch.ones(1).double(), True)
    return pvalue(counts, probabilities(tables.target_VV, sampling).double()), text


@pytest.mark.parametrize("drafts", ["greedy", "sampled"])
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 0.9, 8)], ids=str)
@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=str)
def test_a_drafted_text_is_plain_decodings(shape, sampling, drafts):
    value, text = transitions(sampling, shape, drafts, size=20_000)
    assert value > SIGNIFICANCE
    assert 1.2 < text.tau < shape.steps
    again = Decoder(Tables(), Tables(), draft_sampling=drafts).generate([3], sampling, 50, shape, seed=1)
    assert again.ids == text.ids[:50]


def test_broken_rules_are_caught(monkeypatch):
    """Three plausible mistakes, each of which the chi-square above must see."""

    def accept_likeliest(tree, probabilities_of, generator):  # accepts whatever the draft proposed first
        path, bonus = verify_sampling(tree, probabilities_of, generator)
        if len(path) == 1 and tree.children[0] and float(torch.rand((), generator=generator)) < 0.1:
            child = tree.children[0][0]
            _, bonus = verify_sampling(DraftTree([0], [-1]), lambda _: probabilities_of(child), generator)
            return [0, child], bonus
        return path, bonus

    def keep_rejected(tree, probabilities_of, generator):  # forgets to remove the rejected children
        path, _ = verify_sampling(tree, probabilities_of, generator)
        _, bonus = verify_sampling(DraftTree([0], [-1]), lambda _: probabilities_of(path[-1]), generator)
        return path, bonus

    def parent_bonus(tree, probabilities_of, generator):  # takes the bonus from the wrong node
        path, bonus = verify_sampling(tree, probabilities_of, generator)
        if len(path) == 1:
            return path, bonus
        _, bonus = verify_sampling(DraftTree([0], [-1]), lambda _: probabilities_of(path[-2]), generator)
        return path, bonus

    for broken, shape in zip((accept_likeliest, keep_rejected, parent_bonus), (CHAIN, TREE, CHAIN), strict=True):
        monkeypatch.setattr(speculate, "verify_sampling", broken)
        assert transitions(Sampling(1.0), shape, "greedy")[0] < SIGNIFICANCE, f"{broken.__name__} went unnoticed"


def test_a_drawn_token_that_decides_whether_it_is_kept_is_seen(monkeypatch):
    class Peeking(Sampled):
        def __call__(self, logits_KD, topk):
            scores, ids, q = super().__call__(logits_KD, topk)
            own = torch.softmax(logits_KD / self.temperature, -1).gather(1, ids[:, -1:])
            return torch.cat([scores[:, :-1], own], 1), ids, q

    monkeypatch.setattr("draftsmith.decoding.speculate.Sampled", Peeking)
    assert transitions(Sampling(1.0), TREE, "sampled")[0] < SIGNIFICANCE


def test_a_tree_that_tells_a_wrong_distribution_is_seen():
    class Shifted(Tables):
        def propose(self, root, shape, take=first_choices):
            tree = super().propose(root, shape, take)
            tree.drawn = {node: q.roll(1) for node, q in tree.drawn.items()}
            return tree

    assert transitions(Sampling(1.0), CHAIN, "sampled", Shifted())[0] < SIGNIFICANCE


def test_children_that_hold_everything_leave_no_remainder():
    p = torch.zeros(1, VOCAB, dtype=torch.double)
    p[0, 1] = p[0, 2] = 0.5
    q = torch.zeros(1, VOCAB, dtype=torch.double)
    q[0, 2] = 1.0
    for seed in range(50):
        which, rest = choose(p, torch.tensor([[1, 2]]), q, _seeded(seed))
        assert int(which) < 2
        assert float(rest.sum()) > 0


def test_greedy_descends_to_the_argmax():
    tree = DraftTree([9, 4, 5, 6, 7], [-1, 0, 0, 2, 3])  # 9 -> (4, 5 -> 6 -> 7)
    assert verify_greedy(tree, [5, 0, 6, 1, 2]) == ([0, 2, 3], 1)
    assert verify_greedy(tree, [8, 0, 6, 1, 2]) == ([0], 8)
