"""OpenVINO GenAI. Its continuous batching pipeline, which also serves its LLMPipeline on a CPU, is driven step by step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from engine import I64, files_in, run_tool

GROUPS = (128, 64, 32)
"""Weights that share a scale; its default first."""


def imports() -> None:
    """What is not counted as opening the model."""
    import openvino_genai  # noqa: F401


def convert(checkpoint: Path, folder: Path, variant: str) -> None:
    """`optimum-cli export openvino` with its defaults for `variant`, but for a group size that divides; with the tokenizer.

    Raises:
        ValueError: no usual group size divides the widths of this model.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    widths = [config["hidden_size"], config["intermediate_size"]]
    group = next((size for size in GROUPS if not any(width % size for width in widths)), None)
    if group is None:
        raise ValueError(f"none of the group sizes {GROUPS} divides the widths {widths}")
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(checkpoint)]
    words = ["--task", "text-generation-with-past", "--weight-format", variant, "--group-size", str(group)]
    if status := run_tool([*command, *words, str(folder)]):
        raise SystemExit(status)


def model_files(folder: Path) -> list[Path]:
    """The graph and its weights."""
    return files_in(folder, "openvino_model.*")


class OpenVINO:
    """A request per row. A step gives one token to every row whose prompt is done."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._requests = 0

    def prefill(self, ids: I64, new_tokens: int) -> I64:
        """See `Engine.prefill`."""
        import openvino as ov
        import openvino_genai as ov_genai

        config = ov_genai.GenerationConfig(max_new_tokens=new_tokens + 1, ignore_eos=True, do_sample=False)
        self._handles = [
            self._pipeline.add_request(self._requests + row, ov.Tensor(ids[row : row + 1].copy()), config)
            for row in range(len(ids))
        ]
        self._requests += len(ids)
        self._found: list[list[int]] = [[] for _ in self._handles]
        self._until(1)
        return np.array([row[0] for row in self._found], np.int64)

    def decode(self, n: int) -> I64:
        """See `Engine.decode`."""
        self._until(n + 1)
        return np.array([row[1:] for row in self._found], np.int64)

    def _until(self, n: int) -> None:
        """Steps until every row has `n` tokens."""
        while min(map(len, self._found)) < n and self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for handle, found in zip(self._handles, self._found, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        found.extend(output.generated_ids)


def load(folder: Path, threads: int, batch: int, tokens: int, variant: str) -> OpenVINO:
    """Its defaults but for the threads and the size of the cache."""
    import openvino_genai as ov_genai

    scheduler = ov_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, batch * tokens)
    return OpenVINO(ov_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}))
