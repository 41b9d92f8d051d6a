"""Divergences: real values, and closed-form gradients against finite differences in float64."""

from __future__ import annotations

import pytest
import torch

from edgestill.compress.divergence import DIVERGENCES, Settings, row_dot
from edgestill.profiles.schema import OutputLossSpec

DETACHED = ("adaptive_kl", "taid")
"""Their gradient holds a part of the loss constant, so finite differences must hold it too."""


def rows(seed: int, n: int = 5, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(n, classes, generator=generator, dtype=torch.float64) * 2
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * 2
    return torch.log_softmax(target, -1), logits


def both(name: str, log_p: torch.Tensor, logits: torch.Tensor, x: float) -> tuple[torch.Tensor, torch.Tensor]:
    settings = Settings(beta=x, skew=x, head_mass=x, interpolation=x)
    log_q = torch.log_softmax(logits, -1)
    return DIVERGENCES[name](log_p.exp(), log_p.clone(), log_q.exp(), log_q, settings)


def held(name: str, log_p: torch.Tensor, at: torch.Tensor, logits: torch.Tensor, x: float) -> torch.Tensor:
    """The value at `logits` with what the method detaches taken at `at`; written from the papers' formulas."""
    p, log_q, log_q_at = log_p.exp(), torch.log_softmax(logits, -1), torch.log_softmax(at, -1)
    if name == "taid":
        log_t = torch.log_softmax((1 - x) * at + x * log_p, -1)
        return (log_t.exp() * (log_t - log_q)).sum(-1)
    forward, reverse = (p * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
    gap = (p - log_q_at.exp()).abs()
    head = torch.zeros_like(p, dtype=torch.bool)
    for i, row in enumerate(p):
        mass = 0.0
        for token in row.argsort(descending=True).tolist():
            if mass >= x:
                break
            head[i, token] = True
            mass += float(row[token])
    a = (gap * head).sum(-1) / gap.sum(-1)
    return a * forward + (1 - a) * reverse


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("x", [0.1, 0.5, 0.9])
def test_gradient_equals_finite_differences(name: str, x: float) -> None:
    log_p, logits = rows(1)
    ours = both(name, log_p, logits, x)[1]
    theirs = torch.zeros_like(logits)
    step = 1e-6

    def value(moved: torch.Tensor) -> torch.Tensor:
        return held(name, log_p, logits, moved, x) if name in DETACHED else both(name, log_p, moved, x)[0]

    for column in range(logits.shape[1]):
        shift = torch.zeros_like(logits)
        shift[:, column] = step
        theirs[:, column] = (value(logits + shift) - value(logits - shift)) / (2 * step)
    assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("name", DETACHED)
def test_value_equals_the_formula(name: str) -> None:
    log_p, logits = rows(5)
    torch.testing.assert_close(both(name, log_p, logits, 0.6)[0], held(name, log_p, logits, logits, 0.6))


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_zero_exactly_when_equal_and_positive_otherwise(name: str) -> None:
    log_p, logits = rows(2)
    assert both(name, log_p, log_p.clone(), 0.3)[0].abs().max() < 1e-12
    assert (both(name, log_p, logits, 0.3)[0] > 1e-3).all()


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_finite_where_probabilities_underflow(name: str) -> None:
    """float32, one class far below the smallest normal number on either side."""
    log_p = torch.log_softmax(torch.tensor([[0.0, 0.0, -300.0], [0.0, -300.0, 0.0]]), -1).clamp_min(-87.0)
    logits = torch.tensor([[0.0, -300.0, 0.0], [-300.0, 0.0, 0.0]])
    value, gradient = both(name, log_p, logits, 0.1)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


def test_every_divergence_of_a_recipe_is_in_the_table() -> None:
    words = OutputLossSpec.model_json_schema()["properties"]["divergence"]["enum"]
    assert sorted(words) == sorted(DIVERGENCES)


def test_forward_kl_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = log 2 / 2 + log(2/3) / 2."""
    p = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    got, gradient = DIVERGENCES["forward_kl"](p.clone(), p.log(), q, q.log(), Settings())
    assert got.item() == pytest.approx(0.5 * torch.tensor(4 / 3, dtype=torch.float64).log().item(), abs=1e-12)
    assert gradient.tolist() == [[-0.25, 0.25]]


def test_tvd_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): TVD = 1/4; J(sign / 2) = q (g - <q, g>) with g = (-1/2, 1/2), <q, g> = 1/4."""
    p = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    got, gradient = DIVERGENCES["tvd"](p.clone(), p.log(), q, q.log(), Settings())
    assert got.item() == 0.25
    assert gradient.tolist() == [[-0.1875, 0.1875]]


def test_jsd_is_symmetric_at_one_half() -> None:
    log_p, logits = rows(3)
    log_q = torch.log_softmax(logits, -1)
    there, back = both("jsd", log_p, logits, 0.5)[0], both("jsd", log_q, log_p, 0.5)[0]
    torch.testing.assert_close(there, back, atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl"])
def test_skewing_bounds_the_divergence(name: str) -> None:
    """KL to a mixture that holds a share s of the first side is at most -log s, however far apart the two are."""
    log_p = torch.tensor([[-100.0, 0.0]], dtype=torch.float64)
    value = both(name, log_p, torch.tensor([[0.0, -100.0]], dtype=torch.float64), 0.1)[0]
    assert value.item() == pytest.approx(2.302585092994046, abs=1e-9)


def test_row_dot_is_exact_over_a_large_vocabulary() -> None:
    """Entropy of 49,155 classes in float32 against float64."""
    log_p = torch.log_softmax(torch.randn(3, 49_155, generator=torch.Generator().manual_seed(0)) * 3, -1)
    exact = (log_p.double().exp() * log_p.double()).sum(-1)
    torch.testing.assert_close(row_dot(log_p.exp(), log_p).double(), exact, atol=5e-6, rtol=0)
