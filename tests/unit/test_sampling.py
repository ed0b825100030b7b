import pytest
import torch
from scipy.stats import chisquare

from draftsmith.decoding.sampling import Sampling, _in_nucleus, blockwise_topk, nucleus, probabilities, sample

DRAWS = 40_000


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.7),
        Sampling(1.0, top_k=7),
        Sampling(1.0, top_p=0.6),
        Sampling(1.0, top_p=0.45),
        Sampling(1.3, 0.9, 12),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [96, 1024])
def test_draws_follow_the_distribution(sampling, vocab):
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)) * 3
    p = probabilities(logits, sampling)[0].double()
    generator = torch.Generator().manual_seed(2)
    drawn = torch.cat([sample(logits.expand(1000, -1), sampling, generator) for _ in range(DRAWS // 1000)])
    counts = torch.bincount(drawn, minlength=vocab).double()
    assert counts[p == 0].sum() == 0
    common = p * DRAWS >= 10
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([p[common], p[~common].sum()[None]]) * DRAWS
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "sparse"])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.9999])
def test_the_nucleus_is_that_of_a_sorted_vocabulary(kind, top_p):
    logits = torch.randn(6, 320, generator=torch.Generator().manual_seed(3)) * 2
    if kind == "ties":
        logits = logits.round()
    elif kind == "equal":
        logits[:] = 0.0
    elif kind == "sparse":
        logits[:, 5:] = -torch.inf
    probs = torch.softmax(logits, -1)
    sorted_p, order = probs.sort(dim=-1, descending=True, stable=True)
    inside = sorted_p.cumsum(-1, dtype=torch.float64) - sorted_p < top_p
    wanted = torch.zeros_like(inside).scatter_(1, order, inside)
    for first in (2, 64, 1024):  # too few for all or some of the rows, and enough
        assert torch.equal(nucleus(probs, top_p, first), wanted)
    every = torch.arange(320)
    for row, kept in zip(probs, wanted, strict=True):
        assert torch.equal(_in_nucleus(row.expand(320, -1), every, top_p), kept)


def test_top_p_keeps_the_token_that_crosses_it():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert probabilities(logits, Sampling(1.0, top_p=0.6))[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert probabilities(logits, Sampling(1.0, top_p=0.5))[0].tolist() == pytest.approx([1, 0, 0, 0])


def test_greedy_is_the_argmax():
    logits = torch.tensor([[0.1, 2.0, -1.0]])
    assert probabilities(logits, Sampling()).tolist() == [[0.0, 1.0, 0.0]]
    assert sample(logits, Sampling(), torch.Generator()).tolist() == [1]


@pytest.mark.parametrize("k", [1, 5, 64])
def test_blockwise_topk_is_exact(k):
    logits = torch.randn(3, 2**16, generator=torch.Generator().manual_seed(k))
    values, ids = blockwise_topk(logits, k)
    expected = logits.topk(k)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids, expected.indices)


def test_greedy_rows_take_their_first_choice_beside_drawn_ones():
    logits = torch.randn(5, 512, generator=torch.Generator().manual_seed(1))
    sampling, greedy = Sampling(3.0, 0.9), torch.tensor([True, False, False, True, False])
    ids = sample(logits, sampling, torch.Generator().manual_seed(2), greedy)
    assert ids[greedy].tolist() == logits[greedy].argmax(-1).tolist()
    assert ids[~greedy].tolist() == sample(logits[~greedy], sampling, torch.Generator().manual_seed(2)).tolist()
    assert ids[~greedy].tolist() != logits[~greedy].argmax(-1).tolist()
    assert torch.equal(sample(logits, sampling, torch.Generator(), torch.ones(5).bool()), logits.argmax(-1))
