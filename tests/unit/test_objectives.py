"""Hand-made gradients against autograd, and the losses against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from draftsmith.drafts.objectives import HeadLoss, Objective, teacher_probabilities

NAMES = ["soft_ce", "lk_alpha", "lk_lambda"]
ETA = 3.0


def reference(name: str, logits: torch.Tensor, p: torch.Tensor, depths: list[int]) -> torch.Tensor:
    """[M]; p is the target's full distribution where it sums to less than 1."""
    if name == "soft_ce":
        return -(p * F.log_softmax(logits, -1)).sum(-1)
    mass, losses = p.sum(-1, keepdim=True), []
    for z, full, m in zip(logits.split(depths), p.split(depths), mass.split(depths), strict=True):
        alpha = torch.minimum(full, F.softmax(z, -1)).sum(-1)
        if name == "lk_alpha":
            losses.append(-alpha.log())
        else:
            weight = torch.exp(-ETA * alpha.detach().mean())
            kl = F.kl_div(F.log_softmax(z, -1), full / m, reduction="none").sum(-1)
            losses.append(weight * kl + (1 - weight) * (1 - alpha))
    return mass[:, 0] * torch.cat(losses)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mass", [1.0, 0.7], ids=["whole", "part"])
def test_loss_and_gradients(name, mass):
    generator = torch.Generator().manual_seed(4)
    depths = [400, 0, 300]  # more rows than a chunk, which cuts through the first depth
    x = torch.randn(700, 16, generator=generator, requires_grad=True)
    head = torch.randn(30, 16, generator=generator, requires_grad=True)
    masses = 1 - (1 - mass) * torch.rand(50, 1, generator=generator)
    p = torch.softmax(torch.randn(50, 30, generator=generator) * 2, -1) * masses
    rows = torch.randint(0, 50, (700,), generator=generator)
    weights = torch.rand(700, generator=generator)
    loss, alphas = HeadLoss.apply(x, head, p, rows, weights, Objective(name, eta=ETA), depths)
    got = torch.autograd.grad(loss, (x, head))
    expected_loss = (reference(name, x @ head.T, p[rows], [400, 300]) * weights).sum()
    expected = torch.autograd.grad(expected_loss, (x, head))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-4)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alphas, torch.minimum(p[rows], torch.softmax(x @ head.T, -1)).sum(-1))
    frozen, _ = HeadLoss.apply(x, head.detach(), p, rows, weights, Objective(name, eta=ETA), depths)
    assert frozen.grad_fn.saved_tensors[1] is None, "nothing was made of it"
    (alone,) = torch.autograd.grad(frozen, x)
    assert torch.equal(alone, got[0])


def test_the_acceptance_that_is_told_is_that_of_the_full_distribution():
    """With 61 % of the mass inside, a draft equal to the renormalised target is accepted 61 % of the time."""
    p = torch.tensor([[0.4, 0.21]])
    _, alpha = HeadLoss.apply(p.log(), torch.eye(2), p, torch.tensor([0]), torch.ones(1), Objective("lk_lambda"), [1])
    assert alpha.item() == pytest.approx(0.61)


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
