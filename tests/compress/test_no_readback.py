"""Nothing in the training loop reads a tensor back to the host between two rows of the log.

A guard watches every operation and every method of Tensor that makes the host wait for a device, from the first step to the
last; it rests while batches are made (host tensors, on the host) and while a row is written. On a GPU torch's own guard does it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import write_recipe
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training import ALIGNED, REMEMBERING, learn, prepared
from transformers import TrainerCallback

from edgestill.compress import trainer
from edgestill.compress.distill_module import DistillModule
from edgestill.compress.trainer import DistillTrainer

METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
OPERATORS = ("local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "bincount", "allclose")
"""Their results, or the shapes of their results, are values of a tensor. Underscores around a name are left out, and `unique`
stands for all that begin like it."""
CHOOSE = ("index", "index_put", "index_put_impl", "unsafe_index")
"""The same when they are given a mask."""
STEPS = 3
TRAIN = {"tokens": STEPS * 4 * 32 * 2, "gradient_accumulation": 2, "checkpoint_every_steps": 1000}

RECIPES: dict[str, dict[str, Any]] = {
    "teachers at work": {},
    "stored answers": {"train": {"teacher_cache": "always"}},
    "stored draws, moving averages": {
        "fusion": {"weights": "label", "granularity": "ema"},
        "train": {"teacher_cache": "always", "cache_mode": "sampling"},
    },
    "everything that remembers, on-policy": {
        **REMEMBERING,
        "train": {"on_policy": {"fraction": 0.5, "new_tokens": 4}},
    },
    "on a grid of tables": {"quantize": {"scheme": "nf4", "ramp_steps": 1}},
    "on a grid with zero points, scales frozen": {
        "quantize": {"scheme": "int4", "symmetric": False, "freeze_scales_at_step": 2, "activations": True}
    },
    "maps, noise, prototypes, ranking": {
        "losses": {
            **ALIGNED,
            "attention": {"kind": "maps"},
            "features": {"fit_tokens": 256, "stochastic": {}, "prototypes": {"count": 4}},
            "ranking": {},
        },
    },
}


class Guard(TorchDispatchMode):
    """Notes where a tensor is read back while `watching`."""

    def __init__(self) -> None:
        super().__init__()
        self.watching = False
        self.found: list[str] = []

    def note(self, what: str) -> None:
        if self.watching:
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
            self.found.append(f"{what}: {frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.strip("_")
        masks = name in CHOOSE and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if masks or name.startswith(OPERATORS):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def resting(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, unwatched."""

        def rested(*arguments: Any, **words: Any) -> Any:
            watching, self.watching = self.watching, False
            try:
                return work(*arguments, **words)
            finally:
                self.watching = watching

        return rested


class Moments(TrainerCallback):  # type: ignore[misc]
    """Calls `begin` before the first step and `end` after the last."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self.begin, self.end = begin, end

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            self.end()


def call_at(monkeypatch: pytest.MonkeyPatch, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Have every Trainer of ours call these after its own callbacks."""
    plain = DistillTrainer.__init__

    def with_moments(self: DistillTrainer, **words: Any) -> None:
        plain(self, **{**words, "callbacks": [*words["callbacks"], Moments(begin, end)]})

    monkeypatch.setattr(DistillTrainer, "__init__", with_moments)


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    """Watches from the first step to the last of a `learn` inside the test."""
    guard = Guard()
    for name in METHODS:
        plain = getattr(Tensor, name)

        def noted(self: Tensor, *arguments: Any, _name: str = name, _plain: Any = plain, **words: Any) -> Any:
            guard.note(_name)
            return _plain(self, *arguments, **words)

        monkeypatch.setattr(Tensor, name, noted)
    monkeypatch.setattr(trainer, "collate", guard.resting(trainer.collate))
    items = guard.resting(trainer.OrderedWindows.__getitems__)
    monkeypatch.setattr(trainer.OrderedWindows, "__getitems__", items)
    call_at(monkeypatch, lambda: setattr(guard, "watching", True), lambda: setattr(guard, "watching", False))
    with guard:
        yield guard


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_is_read_back(name: str, guard: Guard, tmp_path: Path) -> None:
    words = RECIPES[name]
    case = prepared(write_recipe(tmp_path, **{**words, "train": {**TRAIN, **words.get("train", {})}}))
    learn(case, tmp_path / "run", uneven=True)
    assert guard.found == []


PLANTS: dict[str, Callable[[Tensor], Any]] = {
    "local_scalar_dense": lambda x: x.sum().item(),
    "item": lambda x: x.sum().item(),
    "__float__": lambda x: float(x.sum()),
    "__bool__": lambda x: bool(x.sum() > 0),
    "__index__": lambda x: [0][: x.long().sum() * 0],
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.detach().numpy(),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "index": lambda x: x[x > 0],
    "index_put": lambda x: x.clone().__setitem__(x > 0, 1.0),
    "equal": lambda x: torch.equal(x, x),
    "unique2": lambda x: x.unique(),
}


def test_the_guard_finds_what_is_planted(guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = DistillModule._note

    def planted(self: DistillModule, rows: Any, values: Any, lesson: Any, own: bool) -> None:
        plain(self, rows, values, lesson, own)
        for read in PLANTS.values():
            read(values.divergence)

    monkeypatch.setattr(DistillModule, "_note", planted)
    learn(prepared(write_recipe(tmp_path, train=TRAIN)), tmp_path / "run")
    assert {line.split(":")[0] for line in guard.found} >= set(PLANTS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("name", RECIPES)
def test_the_host_never_waits_for_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = RECIPES[name]
    case = prepared(write_recipe(tmp_path, **{**words, "train": {**TRAIN, **words.get("train", {})}}))
    begin, end = (lambda mode=mode: torch.cuda.set_sync_debug_mode(mode) for mode in ("error", "default"))
    call_at(monkeypatch, begin, end)
    try:
        learn(case, tmp_path / "run", uneven=True)
    finally:
        end()
