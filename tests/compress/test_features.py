"""Feature losses against plain float64 arithmetic, their gradients by finite differences, and what must not count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from edgestill.compress.alignment import Alignment, PairFit
from edgestill.compress.features import FeatureLoss, check_features
from edgestill.profiles.schema import FeatureLossSpec
from edgestill.runtime.errors import BadInput

MASK = torch.ones(2, 6, dtype=torch.bool)
Array = npt.NDArray[np.float64]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module(fits: list[PairFit], width: int = 4, theirs: int = 4, **words: Any) -> FeatureLoss:
    """One pair for each of as many teachers as there are fits."""
    spec = FeatureLossSpec(**{"projection": "none", "skip_first_tokens": 0, **words})
    shapes = [(f"t{k}", theirs, 3) for k in range(len(fits))]
    return FeatureLoss(spec, Alignment([[fit] for fit in fits]), width, shapes, seed=0)


def test_mse_by_hand_and_weighted_by_sequence() -> None:
    ours, a, b = torch.zeros(2, 6, 4), torch.ones(2, 6, 4), 2 * torch.ones(2, 6, 4)
    weights = torch.tensor([[1.0, 0.25], [0.0, 0.75]])
    both = module([PairFit(1, 1), PairFit(1, 2)])
    # |0 - t|^2 / E t^2 = 1 for both teachers whatever their size; weights sum to 1 per sequence
    assert both({1: ours}, [{1: a}, {2: b}], weights, MASK).item() == pytest.approx(1.0)
    assert both({1: a}, [{1: a}, {2: a}], weights, MASK).item() == 0.0
    assert (both.student_layers(), both.teacher_layers(0), both.teacher_layers(1)) == ([1], [1], [2])


def unit(features: Tensor) -> Tensor:
    """A root mean square of 1 per token, written out."""
    return features / features.pow(2).mean(-1, keepdim=True).sqrt()


def test_the_size_of_features_does_not_matter() -> None:
    ours, theirs = normal(1, 2, 6, 4), normal(2, 2, 6, 4)
    one, ones = module([PairFit(0, 0)]), torch.ones(1, 2)
    torch.testing.assert_close(
        one({0: ours}, [{0: theirs}], ones, MASK), one({0: 7 * ours}, [{0: 0.01 * theirs}], ones, MASK)
    )


def test_only_the_weighted_teacher_pulls() -> None:
    ours, theirs = normal(1, 2, 6, 4), normal(2, 2, 6, 4)
    both = module([PairFit(0, 0), PairFit(0, 0)])
    assert both({0: ours}, [{0: ours}, {0: theirs}], torch.tensor([[1.0, 1.0], [0.0, 0.0]]), MASK).item() == 0.0
    value = both({0: ours}, [{0: ours}, {0: theirs}], torch.tensor([[0.0, 0.0], [1.0, 1.0]]), MASK)
    torch.testing.assert_close(value, (unit(ours) - unit(theirs)).square().mean())


def test_masked_and_first_tokens_neither_count_nor_pull() -> None:
    ours, theirs = torch.ones(2, 6, 4, requires_grad=True), torch.ones(2, 6, 4)
    theirs[:, :2] = 1e4  # an attention sink
    theirs[:, 5] = 1.5
    mask = MASK.clone()
    mask[:, 5] = False
    for kind in ("mse", "l1_logcos"):
        value = module([PairFit(0, 0)], skip_first_tokens=2, loss=kind)(
            {0: ours}, [{0: theirs}], torch.ones(1, 2), mask
        )
        (gradient,) = torch.autograd.grad(value, ours)
        assert torch.equal(gradient[:, [0, 1, 5]], torch.zeros(2, 3, 4))
        at_rest = 0.0 if kind == "mse" else 3 / 5 * np.log1p(np.exp(-1))
        assert value.item() == pytest.approx(at_rest, abs=1e-7)


def test_nothing_counts() -> None:
    ours = normal(1, 2, 6, 4).requires_grad_()
    value = module([PairFit(0, 0)])({0: ours}, [{0: normal(2, 2, 6, 4)}], torch.ones(1, 2), torch.zeros_like(MASK))
    value.backward()
    assert value.item() == 0.0
    assert ours.grad is not None
    assert torch.equal(ours.grad, torch.zeros_like(ours))


def test_batches_weighted_by_their_tokens_add_up() -> None:
    """Uneven lengths: gradient accumulation over single sequences must be the loss of all of them at once."""
    loss = module([PairFit(0, 0), PairFit(0, 0)], skip_first_tokens=1, loss="cosine")
    ours, a, b = normal(1, 3, 6, 4), normal(2, 3, 6, 4), normal(3, 3, 6, 4)
    weights = torch.rand(1, 3, generator=torch.Generator().manual_seed(4))
    weights = torch.cat([weights, 1 - weights])
    mask = torch.arange(6) < torch.tensor([[2], [6], [3]])
    whole = loss({0: ours}, [{0: a}, {0: b}], weights, mask)
    parts = [
        loss({0: ours[i : i + 1]}, [{0: a[i : i + 1]}, {0: b[i : i + 1]}], weights[:, i : i + 1], mask[i : i + 1])
        for i in range(3)
    ]
    torch.testing.assert_close(sum(p * mask[i].sum() for i, p in enumerate(parts)) / mask.sum(), whole)


# against plain float64 arithmetic -----------------------------------------------------------------------------------


def cosine(a: Array, b: Array) -> Array:
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "mse": lambda a, y: ((a - y) ** 2).mean(-1),
    "cosine": lambda a, y: 1 - cosine(a, y),
    "l1_logcos": lambda a, y: np.abs(a - y).mean(-1) + np.log1p(np.exp(-cosine(a, y))),
}
FITS = {
    "none": PairFit(0, 0),
    "linear": PairFit(0, 0, (normal(10, 7, 4),)),
    "low_rank": PairFit(0, 0, (normal(11, 7, 2), normal(12, 2, 4))),
    "pca": PairFit(0, 0, (normal(13, 4, 7), normal(14, 7))),
}


def compared(projection: str, ours: Array, theirs: Array) -> tuple[Array, Array]:
    """Both sides in the space of comparison."""
    weights = [w.double().numpy() for w in FITS[projection].weights]
    ours, theirs = (x / np.sqrt((x**2).mean(-1, keepdims=True)) for x in (ours, theirs))
    match projection:
        case "linear":
            return ours @ weights[0].T, theirs
        case "low_rank":
            return ours @ (weights[0] @ weights[1]).T, theirs
        case "pca":
            turned = (theirs - weights[1]) @ weights[0].T
            return ours, turned / np.sqrt((turned**2).mean(-1, keepdims=True))
    return ours, theirs


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("projection", FITS)
def test_value_and_gradient_against_float64(projection: str, kind: str) -> None:
    width = 4 if projection == "none" else 7
    loss = module([FITS[projection]], theirs=width, projection=projection, loss=kind, rank=2)
    student, teacher = normal(1, 2, 5, 4).requires_grad_(), normal(2, 2, 5, width)
    mask = torch.tensor([[1, 1, 1, 0, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
    weights = torch.tensor([[0.3, 0.9]])
    value = loss({0: student}, [{0: teacher}], weights, mask)
    value.backward()

    def reference(x: Array) -> float:
        a, y = compared(projection, x, teacher.double().numpy())
        share = weights.double().numpy()[0][:, None] * mask.numpy() / mask.sum().item()
        return float((DISTANCES[kind](a, y) * share).sum())

    at = student.detach().double().numpy()
    assert value.item() == pytest.approx(reference(at), rel=1e-5)
    expected, h = np.zeros_like(at), 1e-6
    for place in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[place] = h
        expected[place] = (reference(at + step) - reference(at - step)) / (2 * h)
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-4, atol=1e-6)
    trained = [p for p in loss.parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    assert len(trained) == len(list(loss.parameters())) == {"linear": 1, "low_rank": 2}.get(projection, 0)


# projections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["linear", "low_rank"])
def test_projection_without_a_fit_is_random_by_the_seed(projection: str) -> None:
    def state(seed: int) -> dict[str, Tensor]:
        spec = FeatureLossSpec(projection=projection, rank=2)  # type: ignore[arg-type]
        return FeatureLoss(spec, Alignment([[PairFit(0, 0)]]), 4, [("a", 9, 3)], seed).state_dict()

    one, again, other = state(1), state(1), state(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_fit_for_other_widths_is_a_bug() -> None:
    with pytest.raises(ValueError, match=r"not for widths \[5, 7\]"):
        module([FITS["linear"]], width=5, theirs=7, projection="linear")


def test_the_teacher_gets_no_gradient() -> None:
    teacher = normal(2, 2, 6, 4).requires_grad_()
    module([PairFit(0, 0)])({0: normal(1, 2, 6, 4).requires_grad_()}, [{0: teacher}], torch.ones(1, 2), MASK).backward()
    assert teacher.grad is None


class ReadBacks(TorchDispatchMode):
    """Operators that wait for the device: a value read on the host, or a shape that depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.all += 1
        if name in self.NAMES or (name.startswith("index") and any(_is_bool(a) for a in args)):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def _is_bool(argument: Any) -> bool:
    if isinstance(argument, list | tuple):
        return any(_is_bool(a) for a in argument)
    return isinstance(argument, Tensor) and argument.dtype == torch.bool


def test_nothing_is_read_back() -> None:
    fit = PairFit(0, 0, FITS["pca"].weights, torch.nn.functional.normalize(normal(5, 8, 4), dim=-1))
    loss = module(
        [fit], theirs=7, projection="pca", loss="l1_logcos", stochastic={"passes": 3}, prototypes={"count": 8}
    )
    student, views = normal(1, 2, 6, 4).requires_grad_(), normal(2, 3, 2, 6, 7)
    with ReadBacks() as watch:
        loss({0: student}, [{0: views}], torch.ones(1, 2), MASK).backward()
    assert watch.all > 20
    assert watch.seen == []
    with ReadBacks() as watch:  # it does see them
        student.detach()[MASK].sum().item()
    assert watch.seen


# refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"projection": "none"}, "the student is 8 wide and teacher 'b' 6; use projection: linear"),
        ({"projection": "pca"}, "the student is 8 wide and teacher 'b' has only 6 directions; use projection: linear"),
        ({"projection": "low_rank", "rank": 7}, "rank: 7, but .* teacher 'b' 6; lower it to at most 6, or use"),
        ({"layers": "origin"}, "origin needs a student that was cut from a teacher"),
        ({"layers": [(0, 3)]}, r"pair \[0, 3\] does not exist; the student has layers 0 to 1, the teacher 0 to 2"),
        ({"skip_first_tokens": 16}, "16 leaves nothing of windows of 16 tokens; lower it to at most 15"),
        (
            {"fit_tokens": 32, "prototypes": {"count": 31}},
            "31 prototypes cannot be found among 30 tokens; lower it, or",
        ),
    ],
)
def test_refused_before_work(words: dict[str, Any], message: str) -> None:
    teachers = [("a", 8, 4), ("b", 6, 3)]
    with pytest.raises(BadInput, match=message):
        check_features(FeatureLossSpec(**words), (8, 2), teachers, cut_from=None, length=16)


@pytest.mark.parametrize(
    "words",
    [{}, {"projection": "low_rank", "rank": 6}, {"layers": "origin"}, {"layers": "cka", "prototypes": {"count": 30}}],
)
def test_accepted(words: dict[str, Any]) -> None:
    spec = FeatureLossSpec(fit_tokens=32, **words)
    check_features(spec, (8, 2), [("a", 8, 4), ("b", 6, 3)], cut_from="a", length=16)


def test_pca_to_a_smaller_student_is_accepted() -> None:
    check_features(FeatureLossSpec(projection="pca"), (6, 2), [("a", 8, 4), ("b", 6, 3)], cut_from=None, length=16)
