"""Optional stage: the student with its weights stored in other ways, beside its float weights and what ships.

For profiles with `compare_weights`. Judged on validation text, so that a precision may be chosen by it with the held-out text
still unseen. The table goes into report.json and report.html; the graphs are not kept.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.compress.packing import Part
from edgestill.compress.stages import Stage, Workspace
from edgestill.export.alternatives import FLOAT, WORDS, Alternative, alternatives, write_alternative
from edgestill.export.onnx_export import ExportedGraph, Exports
from edgestill.export.origin import Origin, calibration_hash
from edgestill.export.quantize import graph_bytes
from edgestill.export.weights_table import Judged, decode_speeds, judge_windows, open_graph, table
from edgestill.profiles.load import LoadedProfile
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import Progress

CODE = 1
"""Revision of what this stage computes; raise it when the same inputs would give another result."""


def compare_weights(
    origin: Origin, target: LoadedProfile, onnx: Stage, exports: Exports, space: Workspace
) -> dict[str, Any] | None:
    """{"rows" (see `weights_table.table`), "windows", "threads"} for the report; None when the profile asks for nothing.

    Raises:
        BadInput: the student came without validation text.
    """
    profile = target.profile
    if not profile.compare_weights:
        return None
    part = origin.validation
    if part is None or origin.calibration is None:
        raise BadInput(
            "compare_weights: needs validation text, which a checkpoint of its own does not bring; build from a recipe"
        )
    wanted = alternatives(profile.compare_weights, profile.precision, origin.student)

    def run(folder: Path) -> dict[str, Any]:
        judged, speeds = _judge(
            wanted, origin, part, exports, folder / "graphs", profile.device.threads, space.progress
        )
        shutil.rmtree(folder / "graphs")
        windows = np.arange(part.n_windows)
        rows = table(part, windows, judged, speeds)
        for row in rows:
            space.progress.say(_words(row))
        return {"rows": rows, "windows": part.n_windows, "threads": profile.device.threads}

    inputs = {
        "onnx": onnx.key,
        "schemes": list(profile.compare_weights),
        "precision": profile.precision.model_dump(mode="json"),
        "threads": profile.device.threads,
        "windows": hashlib.sha256(np.ascontiguousarray(part.token_ids).tobytes()).hexdigest(),
        "calibration": calibration_hash(origin),
        "code": CODE,
    }
    title = f"weights: {', '.join(profile.compare_weights)} in every way, on validation text"
    return space.stage(f"weights-{target.name}", title, inputs, run).info


def name_of_shipped(precision: PrecisionSpec, weights_from: str) -> str | None:
    """The row of what ships; None where no row is like it."""
    if precision.weights == FLOAT:
        return FLOAT
    return f"{precision.weights}, {WORDS[weights_from]}" if precision.graph_mib is None else None


def _judge(
    wanted: list[Alternative],
    origin: Origin,
    part: Part,
    exports: Exports,
    folder: Path,
    threads: int,
    progress: Progress,
) -> tuple[dict[str, dict[int, Judged]], dict[str, float]]:
    """(sums per window of each, decode speed of each), by name."""
    graphs: dict[str, ExportedGraph] = {}
    judged: dict[str, dict[int, Judged]] = {}
    plain = open_graph(exports.fused, threads)
    tokenizer = (origin.student / "tokenizer.json").stat().st_size
    with progress.task("ways to store the weights", len(wanted), "ways") as task:
        for one in wanted:
            path = folder / str(len(graphs)) / "model.onnx"
            graphs[one.name] = write_alternative(one, origin.student, exports, origin.calibration, path)
            backend = open_graph(graphs[one.name], threads)
            nll, kl = judge_windows(backend, plain, part, range(part.n_windows))
            judged[one.name] = {0: Judged(nll, kl, graph_bytes(path), tokenizer)}
            task.advance(note=one.name)
    return judged, decode_speeds(graphs, part.token_ids[0].astype(np.int64), threads)


def _words(row: dict[str, Any]) -> str:
    """`int4, GPTQ: perplexity 176.20, +0.0012 nats of float, 2.31 MiB, 5,000 tokens/s`."""
    over = "" if row["over_float_nats"] is None else f", {row['over_float_nats']:+.4f} nats of float"
    return (
        f"{row['cell']}: perplexity {row['perplexity']:.2f}{over}, {row['graph_mib']:.2f} MiB, "
        f"{row['decode_tokens_per_s']:,.0f} tokens/s"
    )
