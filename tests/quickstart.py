"""Bundles of the quickstart for the card at hand.

EDGESTILL_QUICKSTART_BUILD names a folder with a finished build of the quickstart: its student is taken, and bundles for the
card are added to it. Without it the quickstart is built, which takes minutes.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from pathlib import Path

BUILD = "EDGESTILL_QUICKSTART_BUILD"
CPU = "onnxruntime-cpu"
CPU_WEIGHTS = {"float16": "float32", "int4": "int4"}
"""The CPU's artifact of the same weights."""
PROFILE = """format: 1
device: {{arch: {arch}, engine: {engine}, threads: 2, memory_mib: 8192, memory_bandwidth_gb_per_s: 20{card}}}
workload: {{prompt_tokens: 128, new_tokens: 128, batch_size: 1}}
precision: {{weights: {weights}, block_size: 32, accuracy_level: 0}}
"""
Bundle = Callable[[str, str], Path]
"""(engine, weights) -> the quickstart's bundle for it."""
Say = Callable[[str, object], None]
"""Report a measured value."""


def make(build: Path, profiles: Path, engine: str, weights: str, compute_capability: str) -> Path:
    """The bundle of the quickstart in `build` for `engine`, its profile written to `profiles`."""
    from edgestill.export import build as building
    from edgestill.runtime.progress import QuietProgress

    path = profiles / f"test-{engine}-{weights}.yaml"
    known = "" if engine == "onnxruntime-cpu" else f', compute_capability: "{compute_capability}"'
    arch = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine())
    path.write_text(PROFILE.format(arch=arch, engine=engine, card=known, weights=weights), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        building.build("quickstart", [str(path)], build, False, QuietProgress())
    return build / path.stem


def student_of(build: Path) -> Path:
    """The checkpoint that was trained in `build`."""
    (found,) = (path.parent for path in build.glob("work/train-*/student/config.json") if ".partial" not in str(path))
    return found
