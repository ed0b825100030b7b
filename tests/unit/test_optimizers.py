"""Muon's update is the nearest semi-orthogonal matrix, by either way of multiplying."""

import pytest
import torch

from draftsmith.training.optimizers import orthogonalised


def matrix(rows: int, columns: int, smallest: float) -> torch.Tensor:
    """With singular values from 1 down to `smallest`."""
    torch.manual_seed(0)
    least = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, least))
    right, _ = torch.linalg.qr(torch.randn(columns, least))
    return left @ torch.diag(torch.logspace(0, float(torch.tensor(smallest).log10()), least)) @ right.T


@pytest.mark.parametrize("shape", [(24, 72), (72, 24), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_come_near_one_and_directions_stay(shape, dtype):
    gradient = 7.0 * matrix(*shape, smallest=0.05)
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    found = orthogonalised(gradient, dtype).float()
    assert found.shape == gradient.shape
    near = 0.15 if dtype == torch.float32 else 0.2
    assert (torch.linalg.svdvals(found) - 1).abs().max() < near
    assert (found - left @ right).abs().max() < near / 2


def test_small_singular_values_are_no_noise_in_squares():
    """Directions a thousand times weaker than the first are lifted as the polynomials say, in the Gram matrix too."""
    gradient = matrix(24, 72, smallest=1e-3)
    exact = orthogonalised(gradient.double(), torch.float64)  # multiplies each at once
    assert (orthogonalised(gradient, torch.float32) - exact.float()).abs().max() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_is_no_update(dtype):
    assert not orthogonalised(torch.zeros(8, 16), dtype).any()
