"""Prototypes: planted clusters are found, assignments match by the formula, gradients by finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from edgestill.compress.alignment import Alignment, PairFit
from edgestill.compress.features import FeatureLoss
from edgestill.compress.prototypes import assignment_distance, cluster_directions
from edgestill.profiles.schema import FeatureLossSpec


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted() -> tuple[Tensor, Tensor]:
    """Five directions, and 40 points near each with different lengths."""
    centres = normalize(normal(0, 5, 16), dim=-1)
    points = (centres.repeat_interleave(40, 0) + 0.05 * normal(1, 200, 16)) * (1 + normal(2, 200, 1).abs())
    return centres, points[torch.randperm(200, generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("seed", range(4))
def test_planted_clusters_are_found(seed: int) -> None:
    centres, points = planted()
    found = cluster_directions(points, 5, seed=seed)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    cosines = centres @ found.T
    assert sorted(cosines.argmax(1).tolist()) == [0, 1, 2, 3, 4]
    assert cosines.amax(1).min() > 0.995


def test_same_seed_same_prototypes() -> None:
    points = normal(4, 300, 8)
    assert torch.equal(cluster_directions(points, 12), cluster_directions(points, 12))
    assert not torch.equal(cluster_directions(points, 12), cluster_directions(points, 12, seed=1))


def test_lloyd_steps_bring_prototypes_nearer() -> None:
    points = normalize(normal(5, 400, 6), dim=-1)
    nearness = [(points @ cluster_directions(points, 10, steps=n).T).amax(1).mean().item() for n in (0, 1, 25)]
    assert nearness == sorted(nearness)
    assert nearness[0] < nearness[2]


def test_as_many_prototypes_as_points_and_not_more() -> None:
    points = normalize(normal(6, 5, 6), dim=-1)
    assert sorted((points @ cluster_directions(points, 5).T).argmax(1).tolist()) == [0, 1, 2, 3, 4]
    repeated = points[:2].repeat(3, 1)  # two places for four prototypes: k-means++ must still return four
    assert cluster_directions(repeated, 4).isfinite().all()
    with pytest.raises(ValueError, match="5 features cannot have 6 prototypes"):
        cluster_directions(points, 6)


def test_distance_by_hand_is_zero_for_equals_and_ignores_length() -> None:
    prototypes = torch.eye(2)
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    # softmax([1, 0] / 0.5) against softmax([0, 1] / 0.5): KL = 2 (2 p - 1) with p = sigmoid(2)
    p = 1 / (1 + np.exp(-2))
    assert assignment_distance(a, b, prototypes, 0.5).item() == pytest.approx(2 * (2 * p - 1), rel=1e-6)
    assert assignment_distance(a, 100 * a, prototypes, 0.5).item() == pytest.approx(0, abs=1e-6)


def test_loss_adds_it_with_its_weight_and_its_gradient() -> None:
    """Against numpy in float64, gradients by finite differences."""
    prototypes = normalize(normal(7, 3, 6), dim=-1)
    weight = normal(8, 6, 4)
    student, teacher = normal(9, 1, 3, 4).requires_grad_(), normal(10, 1, 3, 6)
    words = {"loss": "cosine", "skip_first_tokens": 0}
    ones, mask = torch.ones(1, 1), torch.ones(1, 3, dtype=torch.bool)

    def value(**more: object) -> Tensor:
        spec = FeatureLossSpec.model_validate(words | more)
        alignment = Alignment([[PairFit(0, 0, (weight,), prototypes)]])
        found: Tensor = FeatureLoss(spec, alignment, 4, [("a", 6, 1)], 0)({0: student}, [{0: teacher}], ones, mask)
        return found

    added = value(prototypes={"count": 3, "temperature": 0.2, "weight": 1.7}) - value()
    added.backward()

    def reference(x: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
        logs = []
        for h in (teacher.double().numpy(), x @ weight.double().numpy().T):
            z = h / np.linalg.norm(h, axis=-1, keepdims=True) @ prototypes.double().numpy().T / 0.2
            logs.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
        return float(1.7 * (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())

    at = student.detach().double().numpy()
    assert added.item() == pytest.approx(reference(at), rel=1e-5)
    assert student.grad is not None
    for place in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[place] = 1e-6
        expected = (reference(at + step) - reference(at - step)) / 2e-6
        assert student.grad[place].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
