"""Training runs of tiny recipes without the story around them: what `compress.trainer.train` is given, and what it leaves.

case = prepared(write_recipe(tmp_path, losses={"features": {}}))     # corpus, student and alignment are made
module = learn(case, tmp_path / "run")                               # as often as wanted, from the same start
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgestill.compress.alignment import Alignment
from edgestill.compress.distill import corpus_of
from edgestill.compress.distill_module import DistillModule
from edgestill.compress.distill_student import aligned_of, made_of
from edgestill.compress.distill_teachers import caches_of, calibrations_of
from edgestill.compress.inputs import check_inputs
from edgestill.compress.low_rank import load_student
from edgestill.compress.objectives import module_of
from edgestill.compress.packing import Part
from edgestill.compress.setting import Setting
from edgestill.compress.stages import Stage, Workspace
from edgestill.compress.teachers import best_device
from edgestill.compress.trainer import train
from edgestill.compress.windows import OrderedWindows
from edgestill.profiles.load import load_recipe
from edgestill.profiles.schema import TrainSpec
from edgestill.runtime.progress import QuietProgress

ALIGNED: dict[str, Any] = {"features": {"fit_tokens": 256}, "attention": {}}
REMEMBERING: dict[str, Any] = {
    "fusion": {"weights": "reinforced"},
    "losses": {"output": {"divergence": "taid"}, **ALIGNED},
}
"""Everything that remembers from step to step: TAID, the policy that selects teachers, and two balances."""


@dataclass
class Case:
    """What training starts from; every `learn` loads it anew."""

    at: Setting
    made: Stage
    aligned: Stage | None
    calibrations: list[float]
    caches: list[Path] | None

    @property
    def part(self) -> Part:
        return self.at.corpus.training


def prepared(recipe: Path) -> Case:
    """Everything before training, in the folder `out` beside the recipe."""
    loaded = load_recipe(str(recipe))
    given = check_inputs(loaded)
    with Workspace(recipe.parent / "out", QuietProgress()).locked() as space:
        stage, corpus = corpus_of(loaded, space, given.teachers[0])
        at = Setting(loaded, space, given.teachers, given.vocabulary, corpus, stage.key, best_device())
        made = made_of(at)
        aligned = aligned_of(at, made) if at.recipe.losses.features is not None else None
        calibrations = calibrations_of(at)
        return Case(at, made, aligned, calibrations, caches_of(at, calibrations))


def learn(case: Case, run: Path, *, uneven: bool = False, **words: Any) -> DistillModule:
    """Train in the folder `run`, from its newest checkpoint if it has one; `words` change the recipe's `train`."""
    spec = TrainSpec.model_validate({**case.at.recipe.train.model_dump(), **words})
    student = load_student(case.made.folder / "student", torch.float32).to(case.at.device)
    alignment = Alignment.load(case.aligned.folder) if case.aligned is not None else None
    module = module_of(case.at, student, alignment, case.calibrations, case.caches)
    run.mkdir(exist_ok=True)
    names = {"teachers": tuple(t.name for t in case.at.teachers), "domains": case.at.domains}
    data = OrderedWindows(with_uneven_mask(case.part) if uneven else case.part, case.at.order())
    with QuietProgress().task("training", 1) as task:
        train(module, data, spec, run, task, names=names)
    return module


def with_uneven_mask(part: Part) -> Part:
    """Prompts of any length, whole windows among them, whose tokens are no labels."""
    windows, length = part.token_ids.shape
    prompts = np.random.default_rng(0).integers(0, length + length // 3, windows)
    return dataclasses.replace(part, loss_mask=(np.arange(length) >= prompts[:, None]).astype(np.uint8))


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two states; histograms are left out, a value on an edge may fall to either side."""
    assert one.keys() == other.keys()
    names = [name for name in one if not name.startswith("meter.")]
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in names)


def numbers(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row of training.jsonl by path, without those of a clock."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}/")
        elif name != "tokens_per_s":
            found[prefix + name] = value
    return found


# several processes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """Exit code (negative: the signal) and everything it printed."""

    code: int
    text: str


def together(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Ended]:
    """Run `work(*arguments)` in `size` processes that are started as torchrun starts them; its int result is the exit code."""
    # torchrun's store lives in the process that starts the others, too
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    places = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(size)]
    return _run(places, folder, work, arguments)


def alone(folder: Path, work: Callable[..., Any], *arguments: Any) -> Ended:
    """The same in one process of its own, which is free to die."""
    return _run([{}], folder, work, arguments)[0]


def _run(places: list[dict[str, Any]], folder: Path, work: Callable[..., Any], arguments: Any) -> list[Ended]:
    """One process per place (environment). They are forked from a server that has torch and transformers loaded: that takes a
    second where starting anew takes ten."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["edgestill.compress.distill"])
    logs = [folder / f"process-{rank}.log" for rank in range(len(places))]
    processes = [
        context.Process(target=_process, args=(place, log, work, arguments))
        for place, log in zip(places, logs, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()  # it hangs, and its exit code says so
            process.join()
    return [
        Ended(process.exitcode or 0, log.read_text(encoding="utf-8"))
        for process, log in zip(processes, logs, strict=True)
    ]


def _process(place: dict[str, Any], log: Path, work: Callable[..., Any], arguments: Any) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    code = work(*arguments)
    sys.stdout.flush()
    sys.exit(code)
