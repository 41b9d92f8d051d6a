"""model.onnx of a bundle for TensorRT: the fused graph lowered to standard operators, its weights in the profile's precision.

    lower          standard ONNX, cache of fixed length; float32: judged against torch
    quantize       int4, int8, fp8: weights as integers (8-bit floats) with DequantizeLinear before each product
    narrow         activations and cache in float16 or bfloat16, types written into the graph

The same file runs in onnxruntime on a CPU, so that what an engine is built from is judged before there is a GPU.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from edgestill.export.engine.float_types import Narrow, narrow_floats
from edgestill.export.engine.lower import lower
from edgestill.export.graph_io import copy_graph, load_graph, save_graph
from edgestill.export.onnx_export import ExportedGraph, describe_graph
from edgestill.export.quantize import Given, QuantizationReport, dequantize_graph, quantize_graph
from edgestill.profiles.schema import PrecisionSpec, Profile
from edgestill.runtime.manifest import Graph, ModelFacts

ENGINES = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")
"""Engines whose bundles hold this graph."""
FLOATS = ("float32", "float16", "bfloat16")


def for_engine(profile: Profile) -> bool:
    """Whether a profile's bundle holds a graph with a cache of fixed length."""
    return profile.device.engine in ENGINES


def capacity_for(profile: Profile, facts: ModelFacts) -> int:
    """Slots of the cache: what the workload states, else all that the model takes."""
    return min(facts.max_tokens, profile.workload.cache_tokens or facts.max_tokens)


def engine_facts(facts: ModelFacts, capacity: int) -> ModelFacts:
    """The facts of a model whose texts end with the cache."""
    return dataclasses.replace(facts, max_tokens=min(facts.max_tokens, capacity))


def describe_engine_graph(path: Path) -> Graph:
    """Inputs and outputs for the manifest."""
    return dataclasses.replace(describe_graph(path), cache="fixed")


def lower_graph(fused: ExportedGraph, out: Path, capacity: int) -> ExportedGraph:
    """Write `out`/model.onnx: the model in standard operators, float32.

    Raises:
        BadInput: its attention stayed plain, or an operator has no standard form.
    """
    model = load_graph(fused.path)
    lower(model, capacity)
    path = out / "model.onnx"
    save_graph(model, path)
    return ExportedGraph(path, describe_engine_graph(path), engine_facts(fused.facts, capacity))


def ship_graph(
    lowered: ExportedGraph, out: Path, precision: PrecisionSpec, given: Given | None, yardstick: Path
) -> tuple[ExportedGraph, QuantizationReport]:
    """Write `out`/model.onnx in the profile's precision, and at `yardstick` the float32 graph of the weights it ships."""
    path = out / "model.onnx"
    report = QuantizationReport((), (), 0)
    if precision.weights in FLOATS:
        copy_graph(lowered.path, path)
        copy_graph(lowered.path, yardstick)
    else:
        report = quantize_graph(lowered.path, path, precision, given=given, standard=True, float_rows=True)
        yardstick.parent.mkdir(parents=True, exist_ok=True)
        dequantize_graph(path, yardstick)
    if precision.weights != "float32":
        model = load_graph(path)
        kind: Narrow = "bfloat16" if precision.weights == "bfloat16" else "float16"
        narrow_floats(model, kind)
        save_graph(model, path)
    return ExportedGraph(path, describe_engine_graph(path), lowered.facts), report
