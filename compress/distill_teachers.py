"""Stages 3 and 4 of the story: a calibration temperature per teacher, and the teachers' stored answers where they pay."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from edgestill.compress.calibrate import calibrate, calibration_windows
from edgestill.compress.setting import Setting
from edgestill.compress.teacher_cache import capture
from edgestill.compress.teachers import TeacherFacts, fit_together, load_teacher
from edgestill.runtime.errors import BadInput

CODE = {"calibrate": 1, "cache": 1}
"""Revision of what each stage computes; raise it when the same inputs would give another result."""
REPEATS_THAT_PAY = 2.0
"""From this many passes over the same tokens, capturing the teachers once costs less than running them every time."""


def calibrations_of(at: Setting) -> list[float]:
    """One temperature per teacher; 1.0 where entropies are not compared."""
    fusion = at.recipe.fusion
    if not (fusion.weights == "entropy" and fusion.calibrate):
        return [1.0] * len(at.teachers)
    batch = at.recipe.train.batch_size
    windows = calibration_windows(at.corpus.validation)

    def fit(folder: Path) -> dict[str, Any]:
        found = {}
        for facts in at.teachers:
            teacher = load_teacher(facts, at.device)
            with at.progress.task(f"teacher {facts.name}", len(windows), "windows") as task:
                result = calibrate(teacher, at.corpus.validation, windows, batch_size=batch, task=task)
            at.progress.say(
                f"teacher {facts.name}: temperature {result.temperature:.3f}, validation perplexity "
                f"{result.perplexity:.1f} -> {result.calibrated_perplexity:.1f}"
            )
            found[facts.name] = asdict(result)
        return found

    inputs = {"teachers": at.teacher_hashes(), "corpus": at.corpus_key, "code": CODE["calibrate"]}
    stage = at.space.stage("calibrate", "calibrate: one temperature per teacher", inputs, fit)
    return [float(stage.info[t.name]["temperature"]) for t in at.teachers]


def caches_of(at: Setting, calibrations: Sequence[float]) -> list[Path] | None:
    """Folders of the teachers' stored answers, or None when the teachers run during training."""
    recipe = at.recipe
    windows = np.unique(at.order())
    if not _cache_pays(at, len(at.order()) / len(windows)):
        return None
    folders = []
    for facts, calibration in zip(at.teachers, calibrations, strict=True):

        def store(folder: Path, facts: TeacherFacts = facts, calibration: float = calibration) -> None:
            capture(
                load_teacher(facts, at.device),
                at.corpus.training,
                windows,
                folder,
                top_k=min(recipe.train.cache_top_k, at.vocabulary),
                batch_size=recipe.train.batch_size,
                corpus_sha256=at.corpus.sha256,
                calibration=calibration,
                progress=at.progress,
            )

        inputs = {
            "teacher": [facts.weights_sha256, facts.precision, calibration],
            "corpus": at.corpus_key,
            "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
            "top_k": recipe.train.cache_top_k,
            "code": CODE["cache"],
        }
        title = f"cache: answers of teacher {facts.name} on {len(windows)} windows"
        folders.append(at.space.stage(f"cache-{facts.name}", title, inputs, store).folder)
    return folders


def _cache_pays(at: Setting, repeats: float) -> bool:
    recipe = at.recipe
    wanted = recipe.train.teacher_cache
    memory = torch.cuda.mem_get_info()[0] if at.device.type == "cuda" else psutil.virtual_memory().available
    fits = fit_together(at.teachers, memory)
    if not at.listens or wanted == "never":
        return False
    if recipe.losses.features is not None:
        if wanted == "always" or not fits:
            raise BadInput(
                "losses.features needs the teachers during training, which the cache replaces; remove losses.features "
                + ("or teacher_cache: always" if fits else "or free memory: the teachers do not fit together")
            )
        return False
    return wanted == "always" or repeats >= REPEATS_THAT_PAY or not fits
