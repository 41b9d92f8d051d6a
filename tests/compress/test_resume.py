"""`kill -9` in training, then the same call: the weights and everything that is remembered end the same, to the bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import write_recipe
from training import ALIGNED, REMEMBERING, alone, learn, prepared

from edgestill.compress import checkpoints
from edgestill.compress.distill_module import DistillModule
from edgestill.compress.training_log import read_log

STEPS, EVERY, DIES_AT = 6, 2, 3
TRAIN = {"tokens": STEPS * 4 * 2 * 32, "gradient_accumulation": 2, "checkpoint_every_steps": EVERY}
DROPOUT = {"config": {"attention_dropout": 0.2}}
"""The student draws in every pass, so the random state has to come back too."""

RECIPES: dict[str, dict[str, Any]] = {
    "everything that remembers": {
        **REMEMBERING,
        "student": DROPOUT,
        "train": {**TRAIN, "on_policy": {"fraction": 0.5, "new_tokens": 8}},
    },
    "moving averages and noisy teachers": {
        "fusion": {"weights": "entropy", "granularity": "ema"},
        "losses": {**ALIGNED, "features": {"fit_tokens": 256, "stochastic": {}}},
        "student": DROPOUT,
        "train": TRAIN,
    },
    "8-bit optimizer": {
        "quantize": {"scheme": "int4"},
        "student": {"config": {**DROPOUT["config"], "hidden_size": 64}},
        "train": {**TRAIN, "optimizer": "adamw_8bit"},
    },
    "entering the grid by gptq": {
        "quantize": {"scheme": "int4", "from_step": 4, "initialize": "gptq"},
        "student": DROPOUT,
        "train": TRAIN,
    },
    "moving averages from the cache": {
        "fusion": {"weights": "label", "granularity": "ema"},
        "losses": {"ranking": {}, "output": {"divergence": "taid"}},
        "student": DROPOUT,
        "train": {**TRAIN, "teacher_cache": "always"},
    },
}


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(recipe: Path, run: Path, moment: str) -> None:
    """`learn` in a process that dies in a step, or when a checkpoint is written and not yet in its place."""
    if moment == "in a step":
        finish = DistillModule.finish_step
        DistillModule.finish_step = lambda self, step, steps: die() if step == DIES_AT else finish(self, step, steps)  # type: ignore[method-assign]
    else:
        publish = checkpoints.publish

        def first_only(beside: Path, folder: Path, keep: int) -> None:
            if checkpoints.checkpoints(folder):
                die()
            publish(beside, folder, keep)

        checkpoints.publish = first_only
    learn(prepared(recipe), run, uneven=True)


def flat(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter; bitsandbytes keeps what is quantized in a level of its own."""
    inner = {k: v for value in state.values() if isinstance(value, dict) for k, v in value.items()}
    return {name: value for name, value in state.items() if not isinstance(value, dict)} | inner


def left(module: DistillModule, run: Path) -> dict[str, Any]:
    """Every tensor that a run ends with: the module's state, what the optimizer remembers, the random state."""
    last = run / f"checkpoint-{STEPS}"
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    moments = {f"{i}.{n}": torch.as_tensor(v) for i, state in optimizer.items() for n, v in flat(state).items()}
    drawn = torch.load(last / "rng_state.pth", weights_only=True)
    return {**module.state_dict(), **moments, "drawn": drawn["torch"]}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def disturbed(name: str, folder: Path, moment: str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder of a run that died at `moment` and went on, what it ended with, and what one ends with that did not die."""
    recipe = write_recipe(folder, **RECIPES[name])
    start, run = prepared(recipe), folder / "run"
    assert alone(folder, train_and_die, recipe, run, moment).code == -signal.SIGKILL
    assert [path.name for path in checkpoints.checkpoints(run)] == [f"checkpoint-{EVERY}"]
    assert (run / "tmp").is_dir() == (moment != "in a step")
    found, whole = (left(learn(start, place, uneven=True), place) for place in (run, folder / "whole"))
    assert [row["step"] for row in read_log(run / "training.jsonl")] == [STEPS]
    assert not (run / "tmp").exists()
    return run, found, whole


@pytest.mark.parametrize("name", RECIPES)
def test_killed_in_a_step(name: str, tmp_path: Path) -> None:
    _, found, whole = disturbed(name, tmp_path, "in a step")
    assert same(found, whole)


def test_killed_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    name = "everything that remembers"
    run, found, whole = disturbed(name, tmp_path, "while a checkpoint is written")
    assert same(found, whole)
    # the comparison sees what is lost: two steps again, from the right weights and another random state
    late, early = run / f"checkpoint-{STEPS}", run / f"checkpoint-{STEPS - 2}"
    (late / "rng_state.pth").replace(early / "rng_state.pth")
    again = left(learn(prepared(tmp_path / "recipe.yaml"), run, uneven=True), run)
    assert not same(again, whole)
