"""training.jsonl: one JSON object per log interval, and the moment after each optimizer step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from edgestill.compress.distill_module import DistillModule
from edgestill.compress.processes import is_first
from edgestill.runtime.progress import Task

LOG = "training.jsonl"
EXTRA = ("ranking", "features", "attention")
"""Losses that a recipe may add, in nats or as their own definition says, means over the rows."""


class JsonLog(TrainerCallback):  # type: ignore[misc]
    """One JSON object per log interval; rows past the resumed step are dropped, so a killed run leaves one clean log.

    Its values are sums over all processes; the first one writes them.
    """

    def __init__(
        self, path: Path, module: DistillModule, task: Task, tokens_per_step: int, names: dict[str, tuple[str, ...]]
    ) -> None:
        self.path, self.module, self.task = path, module, task
        self.tokens_per_step, self.names = tokens_per_step, names
        self.first_step = 0
        self._last = (0, time.perf_counter())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first_step = state.global_step
        self.module.begin(state.global_step)
        if is_first():
            rows = read_log(self.path) if self.path.exists() else []
            kept = [row for row in rows if row["step"] <= state.global_step]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._last = (state.global_step, time.perf_counter())
        if state.global_step:
            self.task.advance(state.global_step * self.tokens_per_step, f"resumed at step {state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.module.finish_step(state.global_step, state.max_steps)
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last steps have their row too

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "grad_norm" not in logs:
            return  # the Trainer's closing summary
        sums = self.module.meter.read()
        if not is_first():
            return
        now = time.perf_counter()
        steps = state.global_step - self._last[0]
        seen, labels = (max(float(sums.get(name, 1.0)), 1.0) for name in ("rows_seen", "labels"))
        row: dict[str, Any] = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "loss": logs["loss"],
            "output": float(sums["output"]) / seen,
            "cross_entropy": float(sums.get("cross_entropy", 0.0)) / labels,
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens_per_s": round(steps * self.tokens_per_step / (now - self._last[1]), 1),
        }
        row |= {name: float(sums[name]) / seen for name in EXTRA if name in sums}
        if self.module.taid is not None:
            row["interpolation"] = round(float(self.module.taid.t), 4)
        if "weights" in sums:
            for name in ("weights", "entropies"):
                row[name] = self._per_domain(sums[name], sums["rows"])
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        self._last = (state.global_step, now)
        shown = ["output", "cross_entropy", *(name for name in EXTRA if name in row)]
        self.task.advance(steps * self.tokens_per_step, " ".join(f"{name} {row[name]:.3f}" for name in shown))

    def _per_domain(self, sums: Tensor, rows: Tensor) -> dict[str, dict[str, float]]:
        """{domain: {teacher: mean}}; domains without a row in this interval are left out."""
        return {
            domain: {t: round(float(sums[k, d] / rows[d]), 4) for k, t in enumerate(self.names["teachers"])}
            for d, domain in enumerate(self.names["domains"])
            if rows[d] > 0
        }


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of training.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows
