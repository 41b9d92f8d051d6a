"""Two real processes (gloo) train as one does, with the student whole in each (DDP) or spread over them (FSDP2)."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes import write_recipe
from safetensors.torch import load_file
from training import REMEMBERING, furthest, learn, numbers, prepared, together, with_uneven_mask

from edgestill.compress import checkpoints
from edgestill.compress.distill_module import DistillModule
from edgestill.compress.processes import is_first, joined
from edgestill.compress.sharding import whole_state
from edgestill.compress.training_log import read_log

STEPS = 4
TRAIN = {"tokens": STEPS * 4 * 2 * 32, "gradient_accumulation": 2, "checkpoint_every_steps": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {"train": TRAIN},
    "remembering": {**REMEMBERING, "train": TRAIN},
    "cached": {"train": {**TRAIN, "teacher_cache": "always"}},
    "on a grid": {"train": TRAIN, "quantize": {"scheme": "int4", "from_step": 2}},
    "on-policy": {"train": {**TRAIN, "on_policy": {"fraction": 0.5, "new_tokens": 6}}},
}
SPREAD = ("remembering", "on a grid", "on-policy", "gpu")
"""Those that are trained with `sharding: full` too."""
TOLERANCE = 2e-6
"""After 4 steps of 1e-3 per weight: the sums are made in another order, nothing else differs."""


def train_all(recipes: dict[str, Path], out: Path) -> int:
    """Train each of them with the student whole and spread; the first process keeps what they end with."""
    with joined():
        for name, recipe in recipes.items():
            case = prepared(recipe)
            for sharding in ("none", "full") if name in SPREAD else ("none",):
                run = out / f"{name}-{sharding}"
                state = whole_state(learn(case, run, uneven=True, sharding=sharding))
                if is_first():
                    torch.save(state, run / "state")
    return 0


def train_until(last: int, recipe: Path, out: Path, sharding: str) -> int:
    """Train until step `last`, where both processes are killed."""
    finish = DistillModule.finish_step

    def die(self: DistillModule, step: int, steps: int) -> None:
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, step, steps)

    DistillModule.finish_step = die  # type: ignore[method-assign]
    with joined():
        state = whole_state(learn(prepared(recipe), out, uneven=True, sharding=sharding))
        if is_first():
            torch.save(state, out / "state")
    return 0


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """What two processes made of every recipe, and the recipes."""
    folder = tmp_path_factory.mktemp("two")
    recipes = {name: write_recipe(folder / name, **words) for name, words in RECIPES.items()}
    ended = together(2, folder, train_all, recipes, folder)
    assert [end.code for end in ended] == [0, 0], [end.text for end in ended]
    return folder, recipes


@pytest.mark.parametrize(
    ("name", "sharding"),
    [
        ("default", "none"),
        ("cached", "none"),
        ("remembering", "none"),
        ("remembering", "full"),
        ("on a grid", "none"),
        ("on a grid", "full"),
    ],
)
def test_two_processes_end_as_one(name: str, sharding: str, two: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, recipes = two
    case = prepared(recipes[name])
    mask = with_uneven_mask(case.part).loss_mask
    assert mask is not None
    labels = mask[case.at.order()][:, 1:].sum(1).reshape(-1, 2, 2).sum(-1)  # micro-steps, processes, windows
    assert (labels == 0).any() and (np.abs(labels[:, 0] - labels[:, 1]) > 20).any()
    module = learn(case, tmp_path / "one", uneven=True)
    run = folder / f"{name}-{sharding}"
    assert furthest(torch.load(run / "state", weights_only=True), module.state_dict()) < TOLERANCE
    rows, alone_rows = (read_log(place / "training.jsonl") for place in (run, tmp_path / "one"))
    assert len(rows) == len(alone_rows) == 1
    assert numbers(rows[0]) == pytest.approx(numbers(alone_rows[0]), rel=1e-4, abs=2e-4)


def test_a_spread_student_writes_as_a_whole_one(two: tuple[Path, dict[str, Path]]) -> None:
    """Each process draws its own continuation, so two are compared with two."""
    folder, _ = two
    whole, spread = (torch.load(folder / f"on-policy-{how}" / "state", weights_only=True) for how in ("none", "full"))
    assert furthest(whole, spread) < TOLERANCE


def test_histograms_count_what_all_processes_saw(two: tuple[Path, dict[str, Path]]) -> None:
    folder, recipes = two
    case = prepared(recipes["default"])
    mask = with_uneven_mask(case.part).loss_mask
    assert mask is not None
    state = torch.load(folder / "default-none" / "state", weights_only=True)
    stored = load_file(folder / "default-none" / f"checkpoint-{STEPS}" / checkpoints.MODULE)
    for counts in (state["meter.weight_counts"], stored["meter.entropy_counts"]):
        assert counts.sum() == 2 * mask[case.at.order()][:, 1:].sum()  # two teachers


def test_a_run_of_two_goes_on_with_one(two: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, recipes = two
    ended = together(2, tmp_path, train_until, 3, recipes["remembering"], tmp_path / "run", "none")
    assert all(end.code in (-signal.SIGKILL, 2) for end in ended), ended
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    module = learn(prepared(recipes["remembering"]), tmp_path / "run", uneven=True)
    whole = torch.load(folder / "remembering-none" / "state", weights_only=True)
    assert furthest(whole, module.state_dict()) < TOLERANCE


def test_a_spread_run_goes_on(two: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, recipes = two
    for last, codes in ((3, {-signal.SIGKILL, 2}), (STEPS + 1, {0})):
        ended = together(2, tmp_path, train_until, last, recipes["remembering"], tmp_path / "run", "full")
        assert {end.code for end in ended} <= codes, ended
    whole, found = (
        torch.load(run / "state", weights_only=True) for run in (folder / "remembering-full", tmp_path / "run")
    )
    assert furthest(whole, found) == 0
    assert len(read_log(tmp_path / "run" / "training.jsonl")) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_spread_student_on_one_gpu(precision: str, tmp_path: Path) -> None:
    """World size 1, nccl. Tolerance: with bfloat16 products a rounding may fall to the other side, so 5 % of a step."""
    words = {**RECIPES["remembering"], "train": {**TRAIN, "precision": precision}}
    recipes = {"gpu": write_recipe(tmp_path / "gpu", **words)}
    (ended,) = together(1, tmp_path, train_all, recipes, tmp_path)
    assert ended.code == 0, ended.text
    whole, spread = (torch.load(tmp_path / f"gpu-{how}" / "state", weights_only=True) for how in ("none", "full"))
    cpu = {name: value.cpu() for name, value in whole.items()}
    assert furthest(cpu, spread) < (TOLERANCE if precision == "float32" else 5e-5)
