"""The fit on real tiny models: least squares, pca, planted layers, one teacher at a time."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_model
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgestill.compress import feature_fit
from edgestill.compress.alignment import Alignment, PairFit
from edgestill.compress.feature_fit import evenly, fit_alignment
from edgestill.compress.features import FeatureLoss
from edgestill.compress.teachers import Teacher, hidden_states, load_teacher, resolve_teachers
from edgestill.profiles.schema import FeatureLossSpec, TeacherSpec
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import Progress, QuietProgress, Task

CPU = torch.device("cpu")
IDS = np.random.default_rng(0).integers(0, 263, (20, 16)).astype(np.uint16)
MASK = torch.ones(20, 16, dtype=torch.bool)
Make = Callable[[], Teacher]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    write_model(folder / "student", width=32, layers=3, seed=1)
    write_model(folder / "wide", width=64, layers=6, seed=2)
    write_model(folder / "other", "gpt2", width=48, layers=4, seed=3)
    return folder


@pytest.fixture(scope="module")
def student(root: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(root / "student", dtype=torch.float32)


def loader(path: Path) -> Make:
    spec = TeacherSpec.model_validate({"name": path.name, "model": str(path), "precision": "float32"})
    (facts,) = resolve_teachers([spec], Path, device=CPU)
    return lambda: load_teacher(facts, CPU)


@pytest.fixture(scope="module")
def wide(root: Path) -> Make:
    teacher = loader(root / "wide")()
    return lambda: teacher


def fit(
    student: PreTrainedModel, teachers: Sequence[Make], origin_of: Sequence[Sequence[int] | None] = (), **words: Any
) -> Alignment:
    origins = origin_of or [None] * len(teachers)
    with QuietProgress().task("fit", 0, "tokens") as task:
        spec = FeatureLossSpec(**words)
        return fit_alignment(spec, student, teachers, IDS, origins, batch_size=8, task=task)


def features(model: Any, layer: int, skip: int = 1) -> Tensor:
    with torch.no_grad():
        raw = hidden_states(model, torch.from_numpy(IDS.astype(np.int64)), [layer])[1][layer][:, skip:].flatten(0, 1)
        return raw / raw.square().mean(-1, keepdim=True).sqrt()


def test_linear_is_the_least_squares_fit_of_counted_tokens(student: PreTrainedModel, wide: Make) -> None:
    alignment = fit(student, [wide], skip_first_tokens=2)
    assert alignment.pairs == [[(0, 1), (1, 3), (2, 5)]]
    teacher = wide().model
    for pair in alignment.fits[0]:
        x, y = features(student, pair.student_layer, 2).double(), features(teacher, pair.teacher_layer, 2).double()
        theirs = torch.linalg.lstsq(x, y).solution.T
        torch.testing.assert_close(pair.weights[0].double(), theirs, atol=1e-3, rtol=1e-3)
        assert pair.weights[0].dtype == torch.float32


def loss_at_start(student: PreTrainedModel, make: Make, spec: FeatureLossSpec, alignment: Alignment) -> float:
    module = FeatureLoss(spec, alignment, 32, [("wide", 64, 6)], seed=0)
    ids = torch.from_numpy(IDS.astype(np.int64))
    with torch.no_grad():
        ours = hidden_states(student, ids, module.student_layers())[1]
        theirs = make().hidden(ids, module.teacher_layers(0))[1]
        return float(module(ours, [theirs], torch.ones(1, 20), MASK))


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_a_fitted_start_beats_a_random_one_and_more_rank_beats_less(
    student: PreTrainedModel, wide: Make, kind: str
) -> None:
    reached = {}
    for name, words in {"linear": {}, "rank 16": {"rank": 16}, "rank 4": {"rank": 4}}.items():
        projection = "linear" if name == "linear" else "low_rank"
        spec = FeatureLossSpec.model_validate({"projection": projection, "loss": kind, **words})
        fitted = fit(student, [wide], projection=projection, loss=kind, **words)
        unfitted = Alignment([[PairFit(s, t) for s, t in fitted.pairs[0]]])
        reached[name] = loss_at_start(student, wide, spec, fitted)
        assert reached[name] < 0.9 * loss_at_start(student, wide, spec, unfitted)
    assert reached["linear"] < reached["rank 16"] < reached["rank 4"]


def test_pca_is_the_svd_of_the_centred_features(student: PreTrainedModel, wide: Make) -> None:
    (pair,) = fit(student, [wide], layers="last", projection="pca").fits[0]
    y = features(wide().model, 5).double()
    directions, mean = pair.weights
    assert directions.shape == (32, 64)
    torch.testing.assert_close(mean.double(), y.mean(0), atol=1e-5, rtol=1e-5)
    _, _, theirs = torch.linalg.svd(y - y.mean(0), full_matrices=False)
    torch.testing.assert_close((directions.double() @ theirs[:8].T)[:8].abs(), torch.eye(8).double(), atol=1e-3, rtol=0)
    projected = (y - y.mean(0)) @ directions.double().T
    spec = FeatureLossSpec(layers="last", projection="pca", skip_first_tokens=1)
    module = FeatureLoss(spec, Alignment([[pair]]), 32, [("wide", 64, 6)], seed=0)
    assert not list(module.parameters())
    shaped = torch.cat([torch.zeros(20, 1, 32), projected.float().view(20, 15, 32)], 1)
    theirs_all = {5: wide().hidden(torch.from_numpy(IDS.astype(np.int64)), [5])[1][5]}
    assert module({2: shaped}, [theirs_all], torch.ones(1, 20), MASK).item() == pytest.approx(0, abs=1e-6)


def planted_student(path: Path, layers: int) -> PreTrainedModel:
    """The first blocks of a model: its features are the model's own."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    config.num_hidden_layers = layers
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:Some weights")
@pytest.mark.parametrize("room", [1 << 30, 1])
def test_cka_finds_planted_layers(root: Path, wide: Make, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_fit, "PASS_BYTES", room)  # all teacher layers in one pass, or one by one
    planted = planted_student(root / "wide", 3)
    assert fit(planted, [wide], layers="uniform").pairs == [[(0, 1), (1, 3), (2, 5)]]
    alignment = fit(planted, [wide], layers="cka")
    assert alignment.pairs == [[(0, 0), (1, 1), (2, 2)]]
    for pair in alignment.fits[0]:  # the same features: the projection is the identity
        torch.testing.assert_close(pair.weights[0], torch.eye(64), atol=5e-3, rtol=0)


def test_origin_for_the_teacher_it_was_cut_from_and_uniform_for_the_other(
    student: PreTrainedModel, root: Path, wide: Make
) -> None:
    other = loader(root / "other")
    alignment = fit(student, [other, wide], [None, [0, 1, 4]], layers="origin")
    assert alignment.pairs == [[(0, 0), (1, 2), (2, 3)], [(0, 0), (1, 1), (2, 4)]]
    assert [f.weights[0].shape for fits in alignment.fits for f in fits] == [(48, 32)] * 3 + [(64, 32)] * 3
    with pytest.raises(BadInput, match="origin needs a student that was cut from a teacher"):
        fit(student, [other, wide], layers="origin")


@pytest.mark.parametrize(("projection", "room"), [("linear", 1 << 30), ("pca", 1 << 30), ("pca", 1)])
def test_prototypes_lie_in_the_space_of_comparison(
    student: PreTrainedModel, wide: Make, projection: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_fit, "PASS_BYTES", room)
    pairs = [(0, 1), (1, 4), (2, 4)]
    _, one, two = fit(student, [wide], layers=pairs, projection=projection, prototypes={"count": 8}).fits[0]
    assert one.prototypes is not None
    assert two.prototypes is not None
    assert torch.equal(one.prototypes, two.prototypes)
    assert one.prototypes.shape == (8, 64 if projection == "linear" else 32)
    y = features(wide().model, 4)
    if projection == "pca":
        y = (y - one.weights[1]) @ one.weights[0].T  # k-means is on directions
    points = normalize(y, dim=-1)
    owner = (points @ one.prototypes.T).argmax(1)
    for i in range(8):  # a fixed point of k-means: each is the direction of the mean of what it owns
        torch.testing.assert_close(one.prototypes[i], normalize(points[owner == i].sum(0), dim=0), atol=1e-5, rtol=1e-4)


def test_one_teacher_at_a_time_and_the_student_is_left_as_it_was(student: PreTrainedModel, root: Path) -> None:
    alive: list[weakref.ref[Teacher]] = []

    def watched(make: Make) -> Make:
        def load() -> Teacher:
            assert all(reference() is None for reference in alive)
            teacher = make()
            alive.append(weakref.ref(teacher))
            return teacher

        return load

    before = {name: value.clone() for name, value in student.state_dict().items()}
    student.train()
    state = torch.get_rng_state()
    wide, other = loader(root / "wide"), loader(root / "other")
    fit(student, [watched(wide), watched(other), watched(wide)], layers="cka", prototypes={"count": 4})
    assert len(alive) == 3
    assert student.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not any(p.grad is not None for p in student.parameters())
    student.eval()


def test_progress_counts_the_tokens_of_each_teacher(student: PreTrainedModel, wide: Make) -> None:
    done: list[Task] = []
    for fit_tokens, used in ((1000, 320), (100, 112)):
        with Progress(io.StringIO()).task("fit", 2 * used, "tokens") as task:
            spec = FeatureLossSpec(fit_tokens=fit_tokens)
            fit_alignment(spec, student, [wide, wide], IDS, [None, None], batch_size=8, task=task)
            done.append(task)
        assert done[-1].done == 2 * used


def test_windows_are_taken_evenly() -> None:
    ids = np.arange(40).reshape(10, 4)
    assert evenly(ids, 12)[:, 0].tolist() == [0, 16, 36]
    assert evenly(ids, 1).shape == (1, 4)
    assert np.array_equal(evenly(ids, 4000), ids)


def test_too_little_to_fit_on(student: PreTrainedModel, wide: Make) -> None:
    with pytest.raises(BadInput, match="16 leaves nothing of windows of 16 tokens"):
        fit(student, [wide], skip_first_tokens=16)
    with pytest.raises(BadInput, match="301 prototypes cannot be found among 300 tokens"):
        fit(student, [wide], prototypes={"count": 301})
    fit(student, [wide], layers="last", prototypes={"count": 300})


def test_fit_of_repeated_runs_is_the_same_to_the_bit(student: PreTrainedModel, wide: Make, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        fit(student, [wide], projection="pca", prototypes={"count": 8}).save(tmp_path / name)
    a, b = (sorted(p.read_bytes() for p in (tmp_path / name).iterdir()) for name in ("a", "b"))
    assert a == b
