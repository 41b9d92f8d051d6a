"""What accumulating gradients must not change, and what the log and the checkpoints of a run hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import write_recipe
from training import ALIGNED, REMEMBERING, furthest, learn, numbers, prepared, with_uneven_mask

from edgestill.compress import checkpoints
from edgestill.compress.training_log import read_log

STEPS = 5
SPLITS = {"whole": (8, 1), "split": (2, 4)}
"""(windows at a time, micro-steps of an optimizer step): 8 windows per step either way."""


def trained(folder: Path, **words: Any) -> dict[str, tuple[dict[str, torch.Tensor], list[dict[str, Any]]]]:
    """What each split ends with: the state and the log."""
    found = {}
    for name, (batch, micro_steps) in SPLITS.items():
        train = {"tokens": STEPS * 8 * 32, "batch_size": batch, "gradient_accumulation": micro_steps}
        case = prepared(write_recipe(folder, name, train=train, **words))
        module = learn(case, folder / name, uneven=True)
        found[name] = module.state_dict(), read_log(folder / name / "training.jsonl")
        rows = with_uneven_mask(case.part).loss_mask[case.at.order()][:, 1:].reshape(STEPS, micro_steps, -1).sum(-1)
        if micro_steps > 1:  # a mean of the micro-steps' means would be far off
            assert (rows.max(1) > 1.3 * rows.min(1)).all()
    return found


RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "remembering": REMEMBERING,
    "on a grid": {"quantize": {"scheme": "int8", "from_step": 2}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_four_micro_steps_are_one(name: str, tmp_path: Path) -> None:
    """Sums are rounded in another order and nothing else: after 5 steps of 1e-3 per weight they are within 2e-6."""
    (whole, log), (split, log_of_split) = trained(tmp_path, **RECIPES[name]).values()
    assert furthest(whole, split) < 2e-6
    for row, other in zip(log, log_of_split, strict=True):
        assert numbers(other) == pytest.approx(numbers(row), rel=1e-4, abs=2e-4)


def test_auxiliary_losses_are_a_share_of_the_output_loss_as_it_is_minimised(tmp_path: Path) -> None:
    """With its weight and the square of its temperature: after one step the balance holds (1 - 0.98) of that mean."""
    losses = {"output": {"temperature": 2.0, "weight": 0.5}, **ALIGNED}
    case = prepared(write_recipe(tmp_path, losses=losses, train={"tokens": 4 * 32}))
    module = learn(case, tmp_path / "run")
    (row,) = read_log(tmp_path / "run" / "training.jsonl")
    for balance in (module.feature_balance, module.attention_balance):
        assert balance is not None
        assert float(balance.main) == pytest.approx(0.02 * 0.5 * 2.0**2 * row["output"], rel=1e-4)


@pytest.mark.parametrize("quantize", [None, {"scheme": "int8"}])
def test_eight_bit_states_leave_the_embedding_in_32(quantize: dict[str, str] | None, tmp_path: Path) -> None:
    """Also where its weight is read through a grid."""
    config = {"hidden_size": 64, "intermediate_size": 96}
    words = {"student": {"config": config}} | ({} if quantize is None else {"quantize": quantize})
    case = prepared(write_recipe(tmp_path, train={"tokens": 2 * 4 * 32, "checkpoint_every_steps": 2}, **words))
    module = learn(case, tmp_path / "run", optimizer="adamw_8bit")
    state = torch.load(tmp_path / "run" / "checkpoint-2" / checkpoints.OPTIMIZER, weights_only=True)["state"]
    moments = [
        next(v["state1"] for v in (entry, *entry.values()) if isinstance(v, dict) and "state1" in v)
        for entry in state.values()
    ]
    kinds = {moment.shape: moment.dtype for moment in moments}
    assert kinds[module.student.get_input_embeddings()._parameters["weight"].shape] == torch.float32
    assert kinds[torch.Size([64, 96])] == torch.uint8


def test_precision_is_that_of_the_recipe_whatever_was_trained_before(tmp_path: Path) -> None:
    """transformers keeps bf16=True in the environment of the process."""
    case = prepared(write_recipe(tmp_path, train={"tokens": 2 * 4 * 32}))
    words = [("one", "float32"), ("rounded", "bfloat16"), ("other", "float32")]
    one, rounded, other = (learn(case, tmp_path / name, precision=to).state_dict() for name, to in words)
    assert furthest(one, other) == 0
    assert furthest(one, rounded) > 0


def test_checkpoints_hold_what_is_resumed_and_no_more_than_two_are_kept(tmp_path: Path) -> None:
    case = prepared(write_recipe(tmp_path, train={"tokens": 6 * 4 * 32, "checkpoint_every_steps": 2}))
    run = tmp_path / "run"
    learn(case, run)
    assert [path.name for path in checkpoints.checkpoints(run)] == ["checkpoint-4", "checkpoint-6"]
    for path in checkpoints.checkpoints(run):
        assert {file.name for file in path.iterdir()} >= set(checkpoints.COMPLETE)
        stored = torch.load(path / checkpoints.OPTIMIZER, weights_only=True)
        assert [group["betas"] for group in stored["param_groups"]] == [(0.9, 0.95)] * len(stored["param_groups"])
    (run / "checkpoint-6" / "optimizer.pt").unlink()
    (run / "tmp").mkdir()
    assert checkpoints.newest(run) == str(run / "checkpoint-4")
    assert not (run / "checkpoint-6").exists() and not (run / "tmp").exists()


def test_random_state_comes_back(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    checkpoints.save_random_state(tmp_path / "state")
    first, second = draw(), draw()
    checkpoints.load_random_state(tmp_path / "state")
    assert draw() == first != second
