"""Stage 8: model.onnx in the profile's precision, judged against the float32 graph of the weights it ships.

Where the weights come from, the first that applies:

    trained    the student learnt on the profile's grid: its bytes
    gptq, hqq  the profile's `precision.method` (post_training.py)
    nearest    rounded

With `precision.graph_mib`, weights that were not trained may get 8 bits, the most sensitive first (mixed_precision.py).
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.compress.quantize.shipped import ShippedWeights
from edgestill.compress.stages import Stage, Workspace
from edgestill.export.blockwise import BlockWeight, quantize_int4, quantize_int8
from edgestill.export.engine.make import FLOATS, capacity_for, for_engine, lower_graph, ship_graph
from edgestill.export.graph_io import copy_graph
from edgestill.export.input_moments import F64, Feeds, looked_up_moment, window_feeds
from edgestill.export.mixed_precision import in_eight_bits, sensitivities
from edgestill.export.onnx_export import ExportedGraph, Exports
from edgestill.export.origin import Origin, calibration_hash, compared_windows, held_out_index
from edgestill.export.parity import (
    ParityRow,
    check_narrow_parity,
    check_parity,
    check_quantized_parity,
    narrow_limit,
    parity_limit,
    parity_rows,
)
from edgestill.export.post_training import by_values, matrices, matrix_names, quantize_weights, untied_tables
from edgestill.export.quantize import (
    Given,
    QuantizationReport,
    dequantize_graph,
    graph_bytes,
    quantize_graph,
)
from edgestill.export.rewrite.outcome import Outcome
from edgestill.export.rewrite.rules import join_weights
from edgestill.export.trained import trained_weights, why_not
from edgestill.profiles.load import LoadedProfile
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.errors import BadInput
from edgestill.runtime.manifest import Graph
from edgestill.runtime.progress import Progress
from edgestill.runtime.reference import save_parity

CODE = 6
"""Revision of what this stage computes; raise it when the same inputs would give another result."""
MIXED_WINDOWS = 8
"""Calibration windows on which sensitivities are measured: each is run once per weight."""
PARITY_ROWS = 32
PARITY_MARGIN = 2.0
"""A device may be this many times farther from the stored logit rows than the build machine was."""


def quantize_stage(origin: Origin, target: LoadedProfile, onnx: Stage, exports: Exports, space: Workspace) -> Stage:
    """model.onnx, portable/ when the profile asks, parity.safetensors, and facts: the rows of the parity gate, the weights with
    their origin, the limit for parity on the device, bits per weight."""
    precision = target.profile.precision
    engine = for_engine(target.profile)

    def run(folder: Path) -> dict[str, Any]:
        made = _engine_graph if engine else _quantized
        info, yardstick = made(origin, target, exports, folder, space.progress)
        limit = _store_parity(origin, precision, yardstick, folder, None if engine else exports.fused.graph)
        shutil.rmtree(folder / "yardstick", ignore_errors=True)
        bits = graph_bytes(folder / "model.onnx") * 8 / exports.fused.facts.parameters
        space.progress.say(
            f"weights: {precision.weights}, {info['weights_from']}, {bits:.2f} bits each with all that is stored"
        )
        return {**info, "parity_limit": limit, "bits_per_weight": round(bits, 3)}

    inputs = {
        "onnx": onnx.key,
        "precision": precision.model_dump(mode="json"),
        "portable": target.profile.portable,
        "cache": capacity_for(target.profile, exports.fused.facts) if engine else None,
        "reference": str(origin.reference and origin.reference.name),
        "calibration": calibration_hash(origin) if precision.needs_text else None,
        "code": CODE,
    }
    title = f"quantize: {precision.weights}" if precision.weights != "float32" else "quantize: float32 stays as it is"
    return space.stage(f"quantize-{target.name}", title, inputs, run)


def _quantized(
    origin: Origin, target: LoadedProfile, exports: Exports, folder: Path, progress: Progress
) -> tuple[dict[str, Any], ExportedGraph]:
    """(facts, the yardstick) of the graph that is written into `folder`.

    Weights are joined last, and judged by the graph of the weights that were not joined yet.
    """
    precision, fused = target.profile.precision, exports.fused
    shipped, yardstick = folder / "model.onnx", folder / "yardstick" / "model.onnx"
    if precision.weights == "float32":
        weights_from, yardstick = "checkpoint", fused.path
        report = QuantizationReport((), (), 0)
        copy_graph(fused.path, shipped)
    else:
        given, weights_from = _weights(origin, precision, exports.plain, progress)
        report = quantize_graph(fused.path, shipped, precision, given=given)
        _write_portable(target, exports, given, folder)
        yardstick.parent.mkdir(exist_ok=True)
        dequantize_graph(shipped, yardstick)
    joined = join_weights(shipped)
    rows = check_quantized_parity(shipped, yardstick, fused.facts, fused.graph, compared_windows(origin, fused.facts))
    for row in rows:
        progress.say(row.words())
    return _facts(rows, report, weights_from, joined), dataclasses.replace(fused, path=yardstick)


def _engine_graph(
    origin: Origin, target: LoadedProfile, exports: Exports, folder: Path, progress: Progress
) -> tuple[dict[str, Any], ExportedGraph]:
    """The same for an engine: standard operators, the profile's types in the graph. Its float32 form is compared with torch, and
    what ships with the float32 form of its weights, both in onnxruntime on this machine."""
    precision = target.profile.precision
    capacity = capacity_for(target.profile, exports.fused.facts)
    windows = compared_windows(origin, exports.fused.facts)[:, :capacity]
    lowered = lower_graph(exports.fused, folder / "yardstick" / "lowered", capacity)
    rows = check_parity(origin.student, lowered, windows, "engine, float32: ")
    given, weights_from = None, "checkpoint"
    if precision.weights not in FLOATS:
        given, weights_from = _weights(origin, precision, exports.plain, progress)
    yardstick = dataclasses.replace(lowered, path=folder / "yardstick" / "model.onnx")
    shipped, report = ship_graph(lowered, folder, precision, given, yardstick.path)
    if precision.weights == "bfloat16":
        progress.say("parity, engine: onnxruntime has no bfloat16 on a CPU; it is compared on the target")
    elif precision.weights != "float32":
        rows += check_narrow_parity(shipped, yardstick, windows)
    _write_portable(target, exports, given, folder)
    for row in rows:
        progress.say(row.words())
    return _facts(rows, report, weights_from, ()), yardstick


def _write_portable(target: LoadedProfile, exports: Exports, given: Given | None, folder: Path) -> None:
    """portable/model.onnx with the same integers in standard operators; other precisions ship the float32 graph as it is."""
    precision = target.profile.precision
    if target.profile.portable and precision.weights in ("int4", "int8"):
        quantize_graph(exports.plain.path, folder / "portable" / "model.onnx", precision, given=given, standard=True)


def _facts(
    rows: list[ParityRow], report: QuantizationReport, weights_from: str, rewrites: tuple[Outcome, ...]
) -> dict[str, Any]:
    return {
        "parity": [dataclasses.asdict(row) for row in rows],
        "quantized": [dataclasses.asdict(node) for node in report.quantized],
        "left_float": [dataclasses.asdict(node) for node in report.left_float],
        "weights_from": weights_from,
        "rewrites": [dataclasses.asdict(outcome) for outcome in rewrites],
    }


def _weights(
    origin: Origin, precision: PrecisionSpec, exported: ExportedGraph, progress: Progress
) -> tuple[Given | None, str]:
    """(what `quantize_graph` is given, where the weights come from)."""
    trained = trained_weights(origin.student, precision)
    if trained is not None:
        return trained, "trained"
    shipped = ShippedWeights.load(origin.student)
    if shipped is not None:
        progress.say(f"warning: the student was {why_not(shipped, precision)}: its weights are quantized anew")
    if precision.method == "nearest" and precision.graph_mib is None:
        return None, "nearest"
    if precision.needs_text and origin.calibration is None:
        word = "graph_mib" if precision.graph_mib is not None else "method: gptq"
        raise BadInput(
            f"precision.{word} needs text that is not judged on; build from a recipe, or use method: hqq without graph_mib"
        )
    windows = origin.calibration if origin.calibration is not None else np.zeros((0, 1), np.int64)
    feeds = list(window_feeds(exported.graph, windows))
    looked_up = looked_up_moment(origin.student, windows) if precision.method == "gptq" else None
    blocks = _int4_blocks(precision, exported.path, feeds, looked_up, progress)
    if precision.graph_mib is not None:
        blocks |= _in_eight_bits(precision, exported.path, blocks, feeds[:: -(-len(feeds) // MIXED_WINDOWS)], progress)
    return by_values(exported.path, blocks), precision.method


def _int4_blocks(
    precision: PrecisionSpec, graph: Path, feeds: list[Feeds], looked_up: F64 | None, progress: Progress
) -> dict[str, BlockWeight]:
    """Every linear layer's weight in 4 bits by the profile's method."""
    if precision.method != "nearest":
        with progress.task(precision.method, len(matrix_names(graph)), "weights") as task:
            return quantize_weights(graph, precision, precision.method, feeds, task, looked_up=looked_up)
    return {n: quantize_int4(m, precision.block_size, precision.symmetric) for n, m in matrices(graph).items()}


def _in_eight_bits(
    precision: PrecisionSpec, graph: Path, blocks: dict[str, BlockWeight], feeds: list[Feeds], progress: Progress
) -> dict[str, BlockWeight]:
    """Those layers that the budget lets have 8 bits."""
    float32 = matrices(graph)
    blocks = {name: blocks[name] for name in float32}
    with progress.task("sensitivity", len(blocks), "weights") as task:
        felt = sensitivities(graph, blocks, feeds, task)
    shapes = {name: (block.inputs, block.outputs) for name, block in blocks.items()}
    beside = untied_tables(graph)
    chosen = in_eight_bits(felt, shapes, precision.block_size, precision.graph_mib or 0.0, beside)
    progress.say(f"in 8 bits: {len(chosen)} of {len(blocks)} weights")
    return {name: quantize_int8(float32[name], precision.block_size) for name in chosen}


def _store_parity(
    origin: Origin, precision: PrecisionSpec, yardstick: ExportedGraph, folder: Path, shipped: Graph | None
) -> float:
    """Write parity.safetensors; returns the limit of `parity_max_abs_logit`. `shipped`: None for an engine's graph."""
    facts = yardstick.facts
    windows = compared_windows(origin, facts)[:, : facts.max_tokens]
    positions, logits = parity_rows(yardstick.path, facts, yardstick.graph, windows, PARITY_ROWS, seed=0)
    if origin.reference is not None:
        positions[:, 0] = held_out_index(origin.reference, positions[:, 0])
    save_parity(positions, logits, folder)
    if shipped is None:
        return narrow_limit(precision, logits)
    limit = parity_limit(precision, logits)
    if precision.rounds_activations:
        # the rule holds for any model; this one, measured here, must not do more than twice as badly elsewhere
        _, found = parity_rows(folder / "model.onnx", facts, shipped, windows, PARITY_ROWS, seed=0)
        limit = min(limit, PARITY_MARGIN * float(np.abs(found - logits).max()))
    return limit
