"""Checkpoints of a training run: which are complete, and the parts of them that the Trainer does not write as we need them.

The random state is the same in all processes (each draws what all of them draw, or from a generator of its own), so it is written
once, and a run may go on with another number of processes.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MODULE = "module.safetensors"
RANDOM, OPTIMIZER, SCHEDULER = "rng_state.pth", "optimizer.pt", "scheduler.pt"
COMPLETE = ("trainer_state.json", OPTIMIZER, SCHEDULER, RANDOM, MODULE)
"""Files without which a checkpoint is not resumed."""


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def newest(folder: Path) -> str | None:
    """The newest complete checkpoint in `folder`. What a kill left half-written is removed, so that nothing resumes from it."""
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    for path in folder.glob("checkpoint-*"):
        if not all((path / name).is_file() for name in COMPLETE):
            shutil.rmtree(path)
    found = checkpoints(folder)
    return str(found[-1]) if found else None


def publish(beside: Path, folder: Path, keep: int) -> None:
    """Move the finished checkpoints in `beside` to `folder`, and leave the `keep` newest there."""
    for finished in beside.iterdir():
        shutil.rmtree(folder / finished.name, ignore_errors=True)
        finished.rename(folder / finished.name)
    beside.rmdir()
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without second names of the same storage (tied embedding and head), which safetensors refuses."""
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    kept = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() == 0 or place not in seen:
            seen[place] = name
            kept[name] = tensor.contiguous()
    return kept


def save_random_state(path: Path) -> None:
    """Everything that default generators of this process would draw next."""
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, path)


def load_random_state(path: Path) -> None:
    """Draw on from what `save_random_state` wrote."""
    state = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
