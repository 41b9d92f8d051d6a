"""onnxruntime-genai: the graph of its own model builder, its own loop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from engine import I64, files_in, run_tool


def imports() -> None:
    """What is not counted as opening the model."""
    import onnxruntime_genai  # noqa: F401


def convert(checkpoint: Path, folder: Path, variant: str) -> None:
    """`python -m onnxruntime_genai.models.builder` with its defaults for `variant` on a CPU."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", variant]
    paths = ["-i", str(checkpoint), "-o", str(folder), "-c", str(folder / "cache")]
    if status := run_tool([*builder, *paths]):
        raise SystemExit(status)


def model_files(folder: Path) -> list[Path]:
    """The graph and its weights."""
    return files_in(folder, "*.onnx", "*.onnx.data")


class GenAI:
    """A generator per prompt: it has no other way to forget."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def prefill(self, ids: I64, new_tokens: int) -> I64:
        """See `Engine.prefill`."""
        import onnxruntime_genai as og

        B, T = ids.shape
        length = T + new_tokens + 1
        parameters = og.GeneratorParams(self._model)
        # min_length rules out the end of text
        parameters.set_search_options(batch_size=B, do_sample=False, max_length=length, min_length=length)
        self._generator = og.Generator(self._model, parameters)
        self._generator.append_tokens(ids.astype(np.int32))
        return self._next()

    def decode(self, n: int) -> I64:
        """See `Engine.decode`."""
        return np.stack([self._next() for _ in range(n)], axis=1)

    def _next(self) -> I64:
        self._generator.generate_next_token()
        return np.array(self._generator.get_next_tokens(), np.int64)


def load(folder: Path, threads: int, batch: int, tokens: int, variant: str) -> GenAI:
    """`threads` go through genai_config.json's session options."""
    import onnxruntime_genai as og

    og.disable_telemetry_events()
    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    return GenAI(og.Model(config))
