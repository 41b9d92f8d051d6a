"""edgestill: a bundle made by `edgestill export`, driven through edgestill.runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from peers import I64, files_in

PROFILE = "peers"


def imports() -> None:
    """What is not counted as opening the model."""
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401

    import edgestill.runtime.model  # noqa: F401


def convert(checkpoint: Path, folder: Path, variant: str) -> None:
    """A bundle of `variant` weights without a budget: it is measured here, not judged."""
    from edgestill.runtime.device import architecture, memory_bandwidth_gb_per_s, memory_mib, usable_cores

    lines = (
        "format: 1",
        "device:",
        f"  arch: {architecture()}",
        "  engine: onnxruntime-cpu",
        f"  threads: {usable_cores()}",
        f"  memory_mib: {memory_mib()}",
        f"  memory_bandwidth_gb_per_s: {memory_bandwidth_gb_per_s()}",
        f"precision: {{weights: {variant}, block_size: 32, accuracy_level: 4}}",
    )
    folder.mkdir(parents=True)
    profile = folder / f"{PROFILE}.yaml"
    profile.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "edgestill.runtime.cli", "export", str(checkpoint), "--profile", str(profile)]
    done = subprocess.run([*command, "--out", str(folder / "build")], stdout=sys.stderr, check=False)
    if not _bundle(folder).is_dir():  # the status alone does not say: an unmeasured row makes it 3
        raise SystemExit(f"edgestill export ended with status {done.returncode} and no bundle")


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
        self._last = prefill_last(self._backend, self._state, ids).argmax(-1)
        return self._last

    def decode(self, n: int) -> I64:
        """See `Engine.decode`."""
        tokens = np.empty((len(self._last), n), np.int64)
        token = self._last[:, None]
        for i in range(n):
            token = self._backend.step(self._state, token, keep=1).argmax(-1)
            tokens[:, i] = token[:, 0]
        return tokens


def load(folder: Path, threads: int, batch: int, tokens: int, variant: str) -> Ours:
    """With every check on: hashes are part of opening a bundle."""
    from edgestill.runtime import load as load_bundle

    return Ours(load_bundle(_bundle(folder), threads=threads))
