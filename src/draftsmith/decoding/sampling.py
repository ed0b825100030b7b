"""Turning logits into distributions and draws: temperature, then top-k, then top-p, then renormalise.

Shapes: R rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NUCLEUS = 1024  # tokens looked at first where top-p alone filters


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
    if sampling.top_p < 1.0:
        probs = probs / probs.sum(-1, keepdim=True)
        sorted_p, order = probs.sort(dim=-1, descending=True)
        outside = sorted_p.cumsum(-1) - sorted_p >= sampling.top_p  # the token that crosses top_p stays in
        probs = torch.zeros_like(probs).scatter_(-1, order, sorted_p.masked_fill(outside, 0.0))
    return probs / probs.sum(-1, keepdim=True)


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


def _sample_nucleus(logits_RV: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Draws for top-p alone: a nucleus is small, so the whole vocabulary is sorted only for rows where it is not."""
    values, ids = logits_RV.topk(min(NUCLEUS, logits_RV.shape[-1]), dim=-1)
    total = (logits_RV.float() / sampling.temperature).logsumexp(-1, keepdim=True)
    probs = (values.float() / sampling.temperature - total).exp()
    cumulative = probs.cumsum(-1)
    probs = probs.masked_fill(cumulative - probs >= sampling.top_p, 0.0)
    drawn = ids.gather(1, invert_cdf(probs, uniform)[:, None]).squeeze(1)
    wide = cumulative[:, -1] < sampling.top_p
    if bool(wide.any()):
        drawn[wide] = invert_cdf(probabilities(logits_RV[wide], sampling), uniform[wide])
    return drawn


def sample(logits_RV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One draw per row [R]: the distribution of `probabilities`, without building it over the whole vocabulary."""
    if sampling.greedy:
        return logits_RV.argmax(-1)
    uniform = uniforms(logits_RV, generator)
    if sampling.top_k and sampling.top_k < logits_RV.shape[-1]:
        values, ids = blockwise_topk(logits_RV, sampling.top_k)  # in descending order
        probs = torch.softmax(values.float() / sampling.temperature, dim=-1)
        if sampling.top_p < 1.0:
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= sampling.top_p, 0.0)
        return ids.gather(1, invert_cdf(probs, uniform)[:, None]).squeeze(1)
    if sampling.top_p < 1.0:
        return _sample_nucleus(logits_RV, sampling, uniform)
    # Plain temperature: pick a block of the vocabulary by its mass, then a token inside it.
    rows, vocab = logits_RV.shape
    weights = torch.softmax(logits_RV.float() / sampling.temperature, dim=-1)
    block = 512
    if vocab % block:
        return invert_cdf(weights, uniform)
    blocks = weights.view(rows, vocab // block, block)
    mass = blocks.sum(-1, dtype=torch.float64)
    chosen = invert_cdf(mass, uniform)
    inner = invert_cdf(blocks[torch.arange(rows), chosen], uniforms(logits_RV, generator))
    return chosen * block + inner
