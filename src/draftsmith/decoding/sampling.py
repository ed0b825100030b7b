"""Turning logits into distributions and draws: temperature, then top-k, then top-p, then renormalise.

Shapes: R rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NUCLEUS = 128  # tokens sorted first to find where top-p ends; most rows need no more


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1.0 switch the filter off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def probabilities(logits_RV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [R, V] (fp32) that plain decoding draws from; one-hot when greedy."""
    if sampling.greedy:
        return torch.nn.functional.one_hot(logits_RV.argmax(-1), logits_RV.shape[-1]).float()
    probs = torch.softmax(logits_RV.float() / sampling.temperature, dim=-1)
    if sampling.top_k and sampling.top_k < probs.shape[-1]:
        kept_p, kept = probs.topk(sampling.top_k, dim=-1)
        probs = torch.zeros_like(probs).scatter_(-1, kept, kept_p)
        probs = probs / probs.sum(-1, keepdim=True)
    if sampling.top_p < 1.0:
        probs *= nucleus(probs, sampling.top_p)
    return probs.div_(probs.sum(-1, keepdim=True))


def nucleus(probs_RV: Tensor, top_p: float, first: int = NUCLEUS) -> Tensor:
    """[R, V] bool: the largest entries up to the one with which their sum crosses `top_p`; of equal ones the first.

    The `first` largest are sorted, and many more for the rows that do not reach `top_p` with them.
    """
    vocab = probs_RV.shape[-1]
    largest = probs_RV.topk(min(first, vocab), dim=-1).values
    sums = largest.cumsum(-1, dtype=torch.float64)
    inside = sums - largest < top_p  # the token that crosses it stays in
    count = inside.sum(-1, keepdim=True)
    least = largest.gather(-1, count - 1)
    kept = probs_RV >= least
    short = sums[:, -1] < top_p
    following = largest.gather(-1, count.clamp(max=largest.shape[-1] - 1))
    if bool(((following == least)[:, 0] & ~short).any()):  # rows that may end among equal entries
        equal = probs_RV == least
        kept_equal = (inside & (largest == least)).sum(-1, keepdim=True)
        kept = kept & (~equal | (equal.cumsum(-1) <= kept_equal))
    if first < vocab and bool(short.any()):
        kept[short] = nucleus(probs_RV[short], top_p, 32 * first)
    return kept


def blockwise_topk(logits_RV: Tensor, k: int, block: int = 512) -> tuple[Tensor, Tensor]:
    """Exact top k of each row, several times faster than `topk` over a vocabulary of 2**18.

    The k blocks with the largest maxima hold the k largest entries, so only those are searched.
    """
    rows, vocab = logits_RV.shape
    if vocab % block or vocab // block <= k:
        return logits_RV.topk(k, dim=-1)
    blocks = logits_RV.view(rows, vocab // block, block)
    candidates = blocks.amax(-1).topk(k, dim=-1).indices
    values, inner = blocks.gather(1, candidates[:, :, None].expand(-1, -1, block)).flatten(1).topk(k, dim=-1)
    return values, candidates.gather(1, inner // block) * block + inner % block


def invert_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index per row where the running sum of non-negative `weights` passes uniform * total."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=weights.shape[-1] - 1)


def uniforms(rows: Tensor, generator: torch.Generator) -> Tensor:
    """One number in [0, 1) per row, on the rows' device; of a generator on the CPU, so that devices draw alike."""
    return torch.rand(len(rows), generator=generator, dtype=torch.float64).to(rows.device)


def _draw(weights_RV: Tensor, generator: torch.Generator) -> Tensor:
    """A block of the vocabulary by its mass, then a token inside it."""
    rows, vocab = weights_RV.shape
    block = math.gcd(vocab, 512)
    blocks = weights_RV.view(rows, vocab // block, block)
    chosen = invert_cdf(blocks.sum(-1), uniforms(weights_RV, generator))
    inner = blocks[torch.arange(rows, device=chosen.device), chosen]
    return chosen * block + invert_cdf(inner, uniforms(weights_RV, generator))


def _in_nucleus(probs_RV: Tensor, ids_R: Tensor, top_p: float) -> Tensor:
    """[R] bool, of one token of every row: nothing has to be sorted for that."""
    own = probs_RV.gather(1, ids_R[:, None])
    rows, ids = (probs_RV >= own).nonzero(as_tuple=True)
    values = probs_RV[rows, ids]
    first = (values > own[rows, 0]) | (ids < ids_R[rows])
    before = own.new_zeros(len(own), dtype=torch.float64).index_add_(0, rows, (values * first).double())
    return before < top_p


def _draw_nucleus(probs_RV: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """From everything, and again where the nucleus was missed: it has at least `top_p` of the mass."""
    drawn = _draw(probs_RV, generator)
    missed = (~_in_nucleus(probs_RV, drawn, top_p)).nonzero()[:, 0]
    while len(missed):
        probs = probs_RV[missed]
        drawn[missed] = again = _draw(probs, generator)
        missed = missed[~_in_nucleus(probs, again, top_p)]
    return drawn


def sample(logits_RV: Tensor, sampling: Sampling, generator: torch.Generator, greedy_R: Tensor | None = None) -> Tensor:
    """One draw per row [R]: the distribution of `probabilities`, without building it over the whole vocabulary.
    `greedy_R` [R] bool, on the CPU: rows that take their first choice beside the others."""
    if sampling.greedy:
        return logits_RV.argmax(-1)
    if greedy_R is not None and greedy_R.any():
        ids, drawn = logits_RV.argmax(-1), (~greedy_R).nonzero()[:, 0].to(logits_RV.device)
        if len(drawn):
            ids[drawn] = sample(logits_RV[drawn], sampling, generator)
        return ids
    if sampling.top_k and sampling.top_k < logits_RV.shape[-1]:
        values, ids = blockwise_topk(logits_RV, sampling.top_k)  # in descending order
        probs = torch.softmax(values.float() / sampling.temperature, dim=-1)
        if sampling.top_p < 1.0:
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= sampling.top_p, 0.0)
        return ids.gather(1, invert_cdf(probs, uniforms(probs, generator))[:, None]).squeeze(1)
    if sampling.top_p < 0.5:  # small enough to be looked up
        probs = probabilities(logits_RV, sampling)
        return invert_cdf(probs, uniforms(probs, generator))
    probs = torch.softmax(logits_RV.float() / sampling.temperature, dim=-1)
    return _draw(probs, generator) if sampling.top_p == 1.0 else _draw_nucleus(probs, sampling.top_p, generator)
