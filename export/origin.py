"""A student to ship, where it comes from, and the windows it is compared on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgestill.compress.packing import Part
from edgestill.runtime.manifest import ModelFacts
from edgestill.runtime.reference import load_reference

PARITY_WINDOWS = 4


@dataclass(frozen=True)
class Origin:
    """What `distill` made, or somebody's checkpoint."""

    name: str
    student: Path
    student_key: str
    reference: Path | None
    limits: dict[str, float]
    provenance: dict[str, Any]
    teachers: list[dict[str, Any]]
    teacher_paths: dict[str, tuple[Path, str]]
    """Name -> (folder, precision)."""
    training_log: list[dict[str, Any]]
    calibration: npt.NDArray[np.int64] | None = None
    """int64 [W, T] windows of training text, for methods that look at activations; None: there is no text but held-out text."""
    validation: Part | None = None
    """Windows to choose by, None where there are none."""


def calibration_hash(origin: Origin) -> str | None:
    """sha256 of the windows that quantization looks at."""
    return None if origin.calibration is None else hashlib.sha256(origin.calibration.tobytes()).hexdigest()


def compared_windows(origin: Origin, facts: ModelFacts) -> npt.NDArray[np.int64]:
    """int64 [W, T] token ids for the parity gates: held-out text, or random ids where there is no text."""
    if origin.reference is None:
        length = min(64, facts.max_tokens)
        return np.random.default_rng(0).integers(0, facts.vocab_size, (PARITY_WINDOWS, length))
    ids = load_reference(origin.reference).token_ids
    return np.asarray(ids[_picked(len(ids))], np.int64)


def held_out_index(reference: Path, picked: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Window numbers among the compared windows -> window numbers of the reference."""
    return _picked(len(load_reference(reference).token_ids)).astype(np.int32)[picked]


def _picked(total: int) -> npt.NDArray[np.int64]:
    return np.linspace(0, total - 1, min(PARITY_WINDOWS, total)).round().astype(np.int64)
