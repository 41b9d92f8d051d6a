"""edgestill: a bundle made by `edgestill export`, driven through edgestill.runtime."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from engine import I64, files_in, run_tool

PROFILE = "peers"


def imports() -> None:
    """What is not counted as opening the model."""
    import onnxruntime  # noqa: F401

    import edgestill.runtime.model  # noqa: F401


def convert(checkpoint: Path, folder: Path, variant: str) -> None:
    """An int4 bundle in blocks of `variant`, without a budget: it is measured here, not judged."""
    from edgestill.runtime.device import memory_bandwidth_gb_per_s, memory_mib
    from edgestill.runtime.processor import architecture, usable_cores

    lines = (
        "format: 1",
        "device:",
        f"  arch: {architecture()}",
        "  engine: onnxruntime-cpu",
        f"  threads: {usable_cores()}",
        f"  memory_mib: {memory_mib()}",
        f"  memory_bandwidth_gb_per_s: {memory_bandwidth_gb_per_s()}",
        "workload: {prompt_tokens: 16, new_tokens: 16}",  # what the export measures is not used; it must fit any model
        f"precision: {{weights: int4, block_size: {variant}, accuracy_level: 4}}",
    )
    folder.mkdir(parents=True)
    profile = folder / f"{PROFILE}.yaml"
    profile.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "edgestill.runtime.cli", "export", str(checkpoint), "--profile", str(profile)]
    status = run_tool([*command, "--out", str(folder / "build")])
    if not _bundle(folder).is_dir():  # the status alone does not say: an unmeasured row makes it 3
        raise SystemExit(status or 1)


def _bundle(folder: Path) -> Path:
    return folder / "build" / PROFILE


def model_files(folder: Path) -> list[Path]:
    """The graph of the profile; neither portable/ nor reference/."""
    return files_in(_bundle(folder), "model.onnx*")


class Ours:
    """Greedy in numpy."""

    def __init__(self, model: Any) -> None:
        self._backend = model.backend

    def prefill(self, ids: I64, new_tokens: int) -> I64:
        """See `Engine.prefill`."""
        from edgestill.runtime.backends import prefill_last

        B, T = ids.shape
        self._state = self._backend.new_state(B, T + max(new_tokens, 1))
        first: I64 = prefill_last(self._backend, self._state, ids).argmax(-1)
        self._first = first
        return first

    def decode(self, n: int) -> I64:
        """See `Engine.decode`."""
        tokens = np.empty((len(self._first), n), np.int64)
        token = self._first[:, None]
        for i in range(n):
            token = self._backend.step(self._state, token, keep=1).argmax(-1)
            tokens[:, i] = token[:, 0]
        return tokens


def load(folder: Path, threads: int, batch: int, tokens: int, variant: str) -> Ours:
    """With every check on: hashes are part of opening a bundle."""
    from edgestill.runtime import load as load_bundle

    return Ours(load_bundle(_bundle(folder), threads=threads))
