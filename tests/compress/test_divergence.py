"""Divergences: real values, and closed-form gradients against finite differences in float64."""

from __future__ import annotations

import pytest
import torch

from edgestill.compress.divergence import DIVERGENCES


def rows(seed: int, n: int = 5, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(n, classes, generator=generator, dtype=torch.float64) * 2
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * 2
    return torch.log_softmax(target, -1), logits


def value(name: str, log_p: torch.Tensor, logits: torch.Tensor, beta: float) -> torch.Tensor:
    return DIVERGENCES[name](log_p.exp(), log_p, logits.softmax(-1), torch.log_softmax(logits, -1), beta)[0]


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_gradient_equals_finite_differences(name: str, beta: float) -> None:
    log_p, logits = rows(1)
    ours = DIVERGENCES[name](log_p.exp(), log_p, logits.softmax(-1), torch.log_softmax(logits, -1), beta)[1]
    theirs = torch.zeros_like(logits)
    step = 1e-6
    for column in range(logits.shape[1]):
        shift = torch.zeros_like(logits)
        shift[:, column] = step
        difference = value(name, log_p, logits + shift, beta) - value(name, log_p, logits - shift, beta)
        theirs[:, column] = difference / (2 * step)
    assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_zero_exactly_when_equal_and_positive_otherwise(name: str) -> None:
    log_p, logits = rows(2)
    assert value(name, log_p, log_p.clone(), 0.3).abs().max() < 1e-12
    assert (value(name, log_p, logits, 0.3) > 1e-3).all()


def test_forward_kl_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = log 2 / 2 + log(2/3) / 2."""
    p = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    got, gradient = DIVERGENCES["forward_kl"](p, p.log(), q, q.log(), 0.5)
    assert got.item() == pytest.approx(0.5 * torch.tensor(4 / 3, dtype=torch.float64).log().item(), abs=1e-12)
    assert gradient.tolist() == [[-0.25, 0.25]]


def test_jsd_is_symmetric_at_one_half() -> None:
    log_p, logits = rows(3)
    log_q = torch.log_softmax(logits, -1)
    there = DIVERGENCES["jsd"](log_p.exp(), log_p, log_q.exp(), log_q, 0.5)[0]
    back = DIVERGENCES["jsd"](log_q.exp(), log_q, log_p.exp(), log_p, 0.5)[0]
    torch.testing.assert_close(there, back, atol=1e-14, rtol=0)
