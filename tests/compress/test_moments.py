"""Streamed moments and what is solved from them, against torch.pca_lowrank, lstsq, and the SVD of all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from edgestill.compress.moments import (
    Product,
    least_squares,
    linear_cka,
    low_rank_factors,
    principal_directions,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streamed(x: Tensor, y: Tensor) -> Product:
    product = Product()
    for a, b in zip(x.split(7), y.split(7), strict=True):
        product.add(a, b)
    return product


def test_moments_equal_all_rows_at_once() -> None:
    x, y = normal(0, 40, 5) + 3, normal(1, 40, 3) - 100
    product = streamed(x, y)
    torch.testing.assert_close(product.raw(), x.T @ y / 40)
    torch.testing.assert_close(product.mean_left(), x.mean(0))
    theirs = np.cov(x.numpy().T, y.numpy().T, ddof=0)[:5, 5:]
    np.testing.assert_allclose(product.covariance().numpy(), theirs, atol=1e-11)
    with pytest.raises(ValueError, match="no tokens"):
        Product().raw()


def test_float32_features_are_summed_in_float64() -> None:
    """A mean of 1000 beside a spread of 0.01: float32 sums would lose the covariance whole."""
    x = (1000 + 0.01 * normal(0, 500, 2)).float()
    expected = np.cov(x.double().numpy().T, ddof=0)
    np.testing.assert_allclose(streamed(x, x).covariance().numpy(), expected, rtol=1e-4)


def test_directions_are_those_of_pca() -> None:
    x = normal(2, 60, 6) @ normal(3, 6, 6) + 5
    directions, variances = principal_directions(streamed(x, x).covariance(), 3)
    _, values, theirs = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close((directions @ theirs[:3].T).abs(), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(variances, values[:3] ** 2 / 60)
    torch.manual_seed(0)
    _, _, low = torch.pca_lowrank(x, q=6, niter=8)
    torch.testing.assert_close((directions @ low[:, :3]).abs(), torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert bool((directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all())


def test_least_squares_equals_lstsq() -> None:
    x, noise = normal(4, 50, 5), normal(5, 50, 3)
    y = x @ normal(6, 5, 3) + 0.1 * noise
    ours = least_squares(streamed(x, x).raw(), streamed(y, x).raw())
    torch.testing.assert_close(ours, torch.linalg.lstsq(x, y).solution.T, atol=1e-5, rtol=1e-5)


def test_least_squares_of_features_that_repeat() -> None:
    x = normal(7, 50, 3)
    x = torch.cat([x, x[:, :1], torch.zeros(50, 1, dtype=torch.float64)], 1)
    y = x @ normal(8, 5, 2)
    ours = least_squares(streamed(x, x).raw(), streamed(y, x).raw())
    torch.testing.assert_close(x @ ours.T, y, atol=1e-4, rtol=1e-4)


def test_low_rank_is_the_best_of_its_rank_on_the_data() -> None:
    x = normal(9, 80, 6) * torch.tensor([10, 5, 1, 1, 0.1, 0.1], dtype=torch.float64)
    weight = normal(10, 7, 6)
    a, b = low_rank_factors(weight, streamed(x, x).raw(), 2)
    assert (a.shape, b.shape) == ((7, 2), (2, 6))
    u, s, v = torch.linalg.svd(x @ weight.T, full_matrices=False)
    torch.testing.assert_close(x @ (a @ b).T, u[:, :2] * s[:2] @ v[:2])  # Eckart-Young on the outputs
    torch.testing.assert_close(a.norm(), b.norm())
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    plain = left[:, :2] * values[:2] @ right[:2]
    assert (x @ (a @ b - weight).T).norm() < (x @ (plain - weight).T).norm()


def cka(x: Tensor, y: Tensor) -> float:
    return linear_cka(streamed(x, x), streamed(y, y), streamed(x, y))


def test_cka_equals_its_gram_form_and_its_laws() -> None:
    x, y = normal(11, 60, 5) + 2, normal(12, 60, 9)
    centre = torch.eye(60, dtype=torch.float64) - 1 / 60
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    assert cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())))  # Kornblith et al., HSIC of Grams
    rotation, _ = torch.linalg.qr(normal(13, 5, 5))
    assert cka(x, 3 * x @ rotation + 7) == pytest.approx(1.0)
    assert cka(x, torch.ones(60, 4, dtype=torch.float64)) == 0.0
