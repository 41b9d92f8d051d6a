"""Tiny bundles for engines: a random model exported for `tensorrt-rtx`, once per session and then copied."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import warnings
from pathlib import Path

from tiny import write_model

from edgestill.export.build import export_checkpoint
from edgestill.runtime.progress import QuietProgress

PROFILE = """format: 1
device: {{arch: x86_64, engine: {engine}, threads: 1, memory_mib: 8192, memory_bandwidth_gb_per_s: 1008, gpu: NVIDIA card,
  compute_capability: "8.9"}}
workload: {{prompt_tokens: 16, new_tokens: 8, batch_size: {batch}}}
precision: {{weights: {weights}, block_size: 32}}
"""


def make_engine_bundle(
    folder: Path, family: str = "llama", weights: str = "float16", *, engine: str = "tensorrt-rtx"
) -> Path:
    """A bundle of a random `family` model for `engine` in `folder` (made, must not exist); returns `folder`."""
    shutil.copytree(_exported(family, weights, engine), folder)
    return folder


def write_profile(
    path: Path, weights: str = "float16", *, engine: str = "tensorrt-rtx", batch: int = 2, more: str = ""
) -> Path:
    """A profile of a card of compute capability 8.9."""
    path.write_text(PROFILE.format(weights=weights, engine=engine, batch=batch) + more, encoding="utf-8")
    return path


@functools.cache
def _exported(family: str, weights: str, engine: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="edgestill-test-engines-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    checkpoint = write_model(folder / "checkpoint", family, **({"width": 128} if family == "gpt_neox" else {}))
    profile = write_profile(folder / "card.yaml", weights, engine=engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_checkpoint(checkpoint, str(profile), folder / "out", None, None, QuietProgress())
    return folder / "out" / "card"
