"""Feature alignment: by hand, scale-free, weighted by sequence, and refused where widths differ without a projection."""

from __future__ import annotations

import pytest
import torch

from edgestill.compress.features import Balance, FeatureLoss
from edgestill.profiles.schema import FeatureLossSpec
from edgestill.runtime.errors import BadInput

MASK = torch.ones(2, 6, dtype=torch.bool)


def loss(**words: object) -> FeatureLoss:
    spec = FeatureLossSpec(layers="last", projection="none", skip_first_tokens=0, **words)  # type: ignore[arg-type]
    return FeatureLoss(spec, (4, 2), [("a", 4, 2), ("b", 4, 3)], seed=0)


def states(seed: int) -> torch.Tensor:
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(seed))


def test_mse_by_hand_and_weighted_by_sequence() -> None:
    ours, a, b = torch.zeros(2, 6, 4), torch.ones(2, 6, 4), 2 * torch.ones(2, 6, 4)
    weights = torch.tensor([[1.0, 0.25], [0.0, 0.75]])
    # |0 - t|^2 / E t^2 = 1 for both teachers whatever their scale; weights sum to 1 per sequence
    assert loss()({1: ours}, [{1: a}, {2: b}], weights, MASK).item() == pytest.approx(1.0)
    assert loss()({1: a}, [{1: a}, {2: a}], weights, MASK).item() == 0.0


def test_only_the_weighted_teacher_pulls() -> None:
    ours = states(1).requires_grad_()
    theirs = states(2)
    value = loss()({1: ours}, [{1: ours.detach()}, {2: theirs}], torch.tensor([[1.0, 1.0], [0.0, 0.0]]), MASK)
    assert value.item() == 0.0
    value = loss()({1: ours}, [{1: ours.detach()}, {2: theirs}], torch.tensor([[0.0, 0.0], [1.0, 1.0]]), MASK)
    expected = ((ours - theirs) ** 2).mean() / (theirs**2).mean()
    torch.testing.assert_close(value, expected)


def test_cosine_ignores_length() -> None:
    ours = states(3)
    weights = torch.full((2, 2), 0.5)
    assert loss(loss="cosine")({1: ours}, [{1: 7 * ours}, {2: ours / 3}], weights, MASK).item() == pytest.approx(
        0, abs=1e-6
    )


def test_masked_and_first_tokens_do_not_count() -> None:
    spec = FeatureLossSpec(layers="last", projection="none", skip_first_tokens=2)
    module = FeatureLoss(spec, (4, 2), [("a", 4, 2)], seed=0)
    ours, theirs = torch.ones(2, 6, 4), torch.ones(2, 6, 4)
    theirs[:, :2] = 1.5
    theirs[:, 5] = 1.5
    mask = MASK.clone()
    mask[:, 5] = False
    assert module({1: ours}, [{1: theirs}], torch.ones(1, 2), mask).item() == 0.0


def test_linear_projection_learns_another_width() -> None:
    module = FeatureLoss(FeatureLossSpec(layers="last"), (4, 2), [("a", 9, 3)], seed=0)
    ours = states(4)
    target = ours @ torch.randn(4, 9, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = module({1: ours}, [{2: target}], torch.ones(1, 2), MASK)
        value.backward()
        return value

    first = closure().item()
    optimizer.step(closure)
    assert closure().item() < 1e-4 < first


def test_widths_without_projection_are_refused() -> None:
    with pytest.raises(BadInput, match="the student is 4 wide and teacher 'a' 9; use projection: linear"):
        FeatureLoss(FeatureLossSpec(projection="none"), (4, 2), [("a", 9, 3)], seed=0)


def test_balance_scales_to_the_ratio() -> None:
    balance = Balance(0.3)
    for _ in range(5):
        factor = balance(torch.tensor(4.0), torch.tensor(0.5))
        assert factor.item() * 0.5 == pytest.approx(0.3 * 4.0)
    assert set(balance.state_dict()) == {"main", "auxiliary"}
