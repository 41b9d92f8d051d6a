"""Stages 3 and 4 of the story: a calibration temperature per teacher, and the teachers' stored answers where they pay."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from edgestill.compress.cache_answers import Mode
from edgestill.compress.cache_capture import capture
from edgestill.compress.calibrate import CalibrationAnswers, calibrate, calibration_windows, fit_offsets
from edgestill.compress.processes import from_first, on_this_machine
from edgestill.compress.setting import Setting
from edgestill.compress.stages import Stage
from edgestill.compress.teachers import TeacherFacts, fit_together, load_teacher
from edgestill.profiles.schema import Recipe
from edgestill.runtime.errors import BadInput

CODE = {"calibrate": 5, "cache": 2}
"""Revision of what each stage computes; raise it when the same inputs would give another result."""
REPEATS_THAT_PAY = 2.0
"""From this many passes over the same tokens, capturing the teachers once costs less than running them every time."""


def calibrations_of(at: Setting) -> list[float]:
    """One temperature per teacher, fitted where entropies are compared at it or answers may be stored; else 1.0.

    A cache holds the entropies at both temperatures, so it does not depend on the words of fusion. What a fusion that does
    not calibrate compares is `compared_at`.
    """
    if not (_compares_calibrated(at.recipe) or _may_store(at)):
        return [1.0] * len(at.teachers)
    return [float(_calibrated(at, facts).info["temperature"]) for facts in at.teachers]


def with_offsets(at: Setting) -> Setting:
    """The setting with the offsets of its teachers' entropies fitted, where the fusion asks for them."""
    fusion = at.recipe.fusion
    if fusion.weights != "entropy" or not fusion.calibrate or fusion.calibration != "offset" or len(at.teachers) < 2:
        return at
    validation = at.corpus.validation
    evidence = CalibrationAnswers.joined(
        [CalibrationAnswers.load(_calibrated(at, facts).folder) for facts in at.teachers]
    )
    offsets = fit_offsets(at.rule, evidence, validation, calibration_windows(validation))
    words = ", ".join(f"{t.name} {o:+.4f}" for t, o in zip(at.teachers, offsets, strict=True))
    at.progress.say(f"offsets of the normalised entropies: {words}")
    return replace(at, offsets=offsets)


def _calibrated(at: Setting, facts: TeacherFacts) -> Stage:
    """A teacher's temperature (in the info) and its evidence on validation windows; shared by all recipes that ask it."""
    batch = at.recipe.train.batch_size
    windows = calibration_windows(at.corpus.validation)

    def fit(folder: Path) -> dict[str, Any]:
        teacher = load_teacher(facts, at.device)
        with at.progress.task(f"teacher {facts.name}", len(windows), "windows") as task:
            result, evidence = calibrate(teacher, at.corpus.validation, windows, batch_size=batch, task=task)
        at.progress.say(
            f"teacher {facts.name}: temperature {result.temperature:.3f}, validation perplexity "
            f"{result.perplexity:.1f} -> {result.calibrated_perplexity:.1f}"
        )
        evidence.save(folder)
        return asdict(result)

    inputs = {
        "teacher": [facts.weights_sha256, facts.precision],
        "corpus": at.corpus_key,
        "code": CODE["calibrate"],
    }
    title = f"calibrate: how sure teacher {facts.name} is, and of what"
    return at.space.stage(f"calibrate-{facts.name}", title, inputs, fit)


def compared_at(recipe: Recipe, calibrations: Sequence[float]) -> list[float]:
    """The temperature at which the recipe's fusion takes each teacher's entropy: its calibration, or 1.0."""
    return list(calibrations) if _compares_calibrated(recipe) else [1.0] * len(calibrations)


def caches_of(at: Setting, calibrations: Sequence[float]) -> list[Path] | None:
    """Folders of the teachers' stored answers, or None when the teachers run during training."""
    train = at.recipe.train
    windows = np.unique(at.order())
    if not from_first(lambda: _cache_pays(at, len(at.order()) / len(windows))):  # free memory differs between processes
        return None
    mode: Mode = train.cache_mode
    size = min(train.cache_top_k, at.vocabulary) if mode == "top_k" else train.cache_samples
    folders = []
    for facts, calibration in zip(at.teachers, calibrations, strict=True):

        def store(folder: Path, facts: TeacherFacts = facts, calibration: float = calibration) -> None:
            capture(
                load_teacher(facts, at.device),
                at.corpus.training,
                windows,
                folder,
                mode=mode,
                size=size,
                seed=train.seed,
                batch_size=train.batch_size,
                corpus_sha256=at.corpus.sha256,
                calibration=calibration,
                progress=at.progress,
            )

        inputs = {
            "teacher": [facts.weights_sha256, facts.precision, calibration],
            "corpus": at.corpus_key,
            "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
            "stored": [mode, size] if mode == "top_k" else [mode, size, train.seed],
            "code": CODE["cache"],
        }
        title = f"cache: answers of teacher {facts.name} on {len(windows)} windows"
        folders.append(at.space.stage(f"cache-{facts.name}", title, inputs, store, together=True).folder)
    return folders


def _compares_calibrated(recipe: Recipe) -> bool:
    fusion = recipe.fusion
    return fusion.calibrate and fusion.calibration == "temperature" and fusion.weights in ("entropy", "reinforced")


def _needs_teachers(recipe: Recipe) -> str | None:
    """The word that wants the teachers during training, if there is one."""
    wants = {
        "losses.features": recipe.losses.features is not None,
        "losses.attention": recipe.losses.attention is not None,
        "train.on_policy": recipe.train.on_policy is not None,
    }
    return next((name for name, wanted in wants.items() if wanted), None)


def _may_store(at: Setting) -> bool:
    """Whether `_cache_pays` could say yes: by the words alone, for free memory changes from one call to the next."""
    return at.listens and at.recipe.train.teacher_cache != "never" and _needs_teachers(at.recipe) is None


def _cache_pays(at: Setting, repeats: float) -> bool:
    wanted = at.recipe.train.teacher_cache
    memory = psutil.virtual_memory().available // on_this_machine()
    if at.device.type == "cuda":
        memory = torch.cuda.mem_get_info()[0]
    fits = fit_together(at.teachers, memory)
    if not at.listens or wanted == "never":
        return False
    if (name := _needs_teachers(at.recipe)) is not None:
        if wanted == "always" or not fits:
            raise BadInput(
                f"{name} needs the teachers during training, which the cache replaces; remove {name} "
                + ("or teacher_cache: always" if fits else "or free memory: the teachers do not fit together")
            )
        return False
    return wanted == "always" or repeats >= REPEATS_THAT_PAY or not fits
