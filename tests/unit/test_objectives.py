"""Hand-made gradients against autograd, and the losses against their definitions."""

import pytest
import torch

from draftsmith.drafts.objectives import HeadLoss, Objective, teacher_probabilities

NAMES = ["soft_ce", "lk_alpha", "lk_lambda"]


def reference(name: str, logits: torch.Tensor, p: torch.Tensor, eta: float) -> torch.Tensor:
    log_q = torch.log_softmax(logits, -1)
    alpha = torch.minimum(p, log_q.exp()).sum(-1)
    if name == "soft_ce":
        return -(p * log_q).sum(-1)
    if name == "lk_alpha":
        return -alpha.log()
    weight = torch.exp(-eta * alpha.detach())
    kl = (torch.special.xlogy(p, p) - p * log_q).sum(-1)
    return weight * kl + (1 - weight) * (1 - alpha)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mass", [1.0, 0.7], ids=["renormalised", "true"])
def test_loss_and_gradients(name, mass):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(700, 16, generator=generator, requires_grad=True)  # more rows than a chunk
    head = torch.randn(30, 16, generator=generator, requires_grad=True)
    p = torch.softmax(torch.randn(50, 30, generator=generator) * 2, -1) * mass
    rows = torch.randint(0, 50, (700,), generator=generator)
    weights = torch.rand(700, generator=generator)
    objective = Objective(name, eta=3.0)
    loss, alphas = HeadLoss.apply(x, head, p, rows, weights, objective)
    got = torch.autograd.grad(loss, (x, head))
    expected_loss = (reference(name, x @ head.T, p[rows], 3.0) * weights).sum()
    expected = torch.autograd.grad(expected_loss, (x, head))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-4)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alphas, torch.minimum(p[rows], torch.softmax(x @ head.T, -1)).sum(-1))


def test_teacher_probabilities_are_those_of_the_full_softmax():
    generator = torch.Generator().manual_seed(5)
    last, head = torch.randn(90, 8, generator=generator), torch.randn(40, 8, generator=generator)
    ids = torch.tensor([1, 5, 6, 30])
    full = torch.softmax(last @ head.T, -1)[:, ids]
    true = teacher_probabilities(last, head[ids], head, None, torch.float32)
    torch.testing.assert_close(true, full)
    renormalised = teacher_probabilities(last, head[ids], None, None, torch.float32)
    torch.testing.assert_close(renormalised, full / full.sum(-1, keepdim=True))
    capped = teacher_probabilities(last, head[ids], head, 3.0, torch.float32)
    torch.testing.assert_close(capped, torch.softmax(torch.tanh(last @ head.T / 3) * 3, -1)[:, ids])
