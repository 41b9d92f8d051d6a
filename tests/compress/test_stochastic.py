"""Noisy views of a real teacher, and the student's choice among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_model
from torch import Tensor

from edgestill.compress.alignment import Alignment, PairFit
from edgestill.compress.features import FeatureLoss
from edgestill.compress.stochastic import guided_target, noisy_features
from edgestill.compress.teachers import Teacher, load_teacher, resolve_teachers
from edgestill.profiles.schema import FeatureLossSpec, StochasticSpec, TeacherSpec

CPU = torch.device("cpu")
IDS = torch.randint(0, 263, (2, 9), generator=torch.Generator().manual_seed(0))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    path = write_model(tmp_path_factory.mktemp("noisy") / "t", request.param, width=32, layers=3)
    spec = TeacherSpec.model_validate({"name": "t", "model": str(path), "precision": "float32"})
    return load_teacher(resolve_teachers([spec], Path, device=CPU)[0], CPU)


def test_views_differ_by_dropout_and_the_teacher_stays_as_it_was(teacher: Teacher) -> None:
    before = teacher.hidden(IDS, [0, 2])
    torch.manual_seed(1)
    views = noisy_features(teacher, IDS, [2, 0], StochasticSpec(passes=3, dropout=0.25))
    assert {layer: v.shape for layer, v in views.items()} == dict.fromkeys((0, 2), (3, 2, 9, 32))
    assert not any(v.requires_grad for v in views.values())
    clean = before[1][0]
    first = views[0]
    dropped = first == 0
    assert 0.15 < dropped.float().mean() < 0.35
    torch.testing.assert_close(
        first, torch.where(dropped, 0.0, clean / 0.75)
    )  # inverted dropout of the block's own output
    assert not torch.equal(views[2][0], views[2][1])
    after = teacher.hidden(IDS, [0, 2])
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(before[1][layer], after[1][layer]) for layer in (0, 2))


def test_noise_passes_through_the_blocks_above(teacher: Teacher) -> None:
    clean = teacher.hidden(IDS, [2])[1][2]
    view = noisy_features(teacher, IDS, [2], StochasticSpec(dropout=0.25))[2][0]
    kept = view != 0
    assert ((view * 0.75 - clean)[kept].abs() > 1e-3).float().mean() > 0.9


def test_noise_comes_from_the_default_generator(teacher: Teacher) -> None:
    spec = StochasticSpec()
    torch.manual_seed(7)
    one, next_one = (noisy_features(teacher, IDS, [1], spec)[1] for _ in range(2))
    torch.manual_seed(7)
    again = noisy_features(teacher, IDS, [1], spec)[1]
    assert torch.equal(one, again)
    assert not torch.equal(one, next_one)


@pytest.mark.parametrize(("passes", "kept"), [(2, 1), (3, 2), (4, 2)])
def test_target_by_the_formula(passes: int, kept: int) -> None:
    ours, views = normal(1, 2, 5, 6), normal(2, passes, 2, 5, 6)
    keep = torch.tensor([[0.0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    target = guided_target(ours, views, keep, 0.3)
    for b in range(2):
        x, z = ours[b].double().numpy(), views[:, b].double().numpy()
        counted = keep[b].bool().numpy()
        cosines = (z * x).sum(-1) / np.linalg.norm(z, axis=-1) / np.linalg.norm(x, axis=-1)
        a = cosines[:, counted].mean(1)
        chosen = a >= np.median(a)
        assert chosen.sum() == kept
        w = np.where(chosen, np.exp(a / 0.3), 0)
        np.testing.assert_allclose(target[b].numpy(), np.einsum("n,ntd->td", w / w.sum(), z), rtol=1e-4, atol=1e-6)


def test_equal_views_are_all_kept_and_no_token_is_no_trouble() -> None:
    ours, view = normal(1, 2, 5, 6), normal(2, 2, 5, 6)
    views = view.expand(4, 2, 5, 6)
    for keep in (torch.ones(2, 5), torch.zeros(2, 5)):
        torch.testing.assert_close(guided_target(ours, views, keep, 0.1), view)


def test_loss_is_towards_the_guided_target_only() -> None:
    """The chosen mean is a constant: the gradient is that of the plain loss towards it."""
    ours, views, weight = normal(3, 2, 6, 4).requires_grad_(), normal(4, 3, 2, 6, 5), normal(5, 5, 4)
    mask, ones = torch.ones(2, 6, dtype=torch.bool), torch.ones(1, 2)
    alignment = Alignment([[PairFit(0, 0, (weight,))]])

    def loss(**words: object) -> FeatureLoss:
        spec = FeatureLossSpec.model_validate({"loss": "cosine", "skip_first_tokens": 2, **words})
        return FeatureLoss(spec, alignment, 4, [("a", 5, 1)], 0)

    keep = mask.float()
    keep[:, :2] = 0
    views = views / views.square().mean(-1, keepdim=True).sqrt()
    unit = ours / ours.square().mean(-1, keepdim=True).sqrt()
    target = guided_target(unit @ weight.T, views, keep, 0.1)
    stochastic = loss(stochastic={"passes": 3})({0: ours}, [{0: views}], ones, mask)
    plain = loss()({0: ours}, [{0: target}], ones, mask)
    torch.testing.assert_close(stochastic, plain)
    theirs, mine = torch.autograd.grad(plain, ours)[0], torch.autograd.grad(stochastic, ours)[0]
    torch.testing.assert_close(mine, theirs)
