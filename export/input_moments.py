"""What the linear layers of a float graph are fed: the second moment of each layer's input over calibration text.

    moment = mean of x x' over every row x [K] that reaches the layer       float64 [K, K]

Measured in onnxruntime on the float32 graph itself, so that no layer has to be matched with a torch module by name. Every
layer sees the inputs of the float model, not of a model whose earlier layers are quantized already.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgestill.compress.low_rank import load_student
from edgestill.compress.quantize.lookup_moment import lookup_moment
from edgestill.export.graph_io import load_graph, save_graph
from edgestill.export.linear_layers import Linear, Table, find_weights
from edgestill.export.nodes import constant_array
from edgestill.runtime.errors import BadInput
from edgestill.runtime.manifest import Graph

F64 = npt.NDArray[np.float64]
Feeds = dict[str, npt.NDArray[Any]]
"""Graph input -> array: one run of the graph."""

MOMENT_BYTES = 512 << 20
"""Moments held at a time: 16 inputs of width 2048, or every input of a small student."""


def looked_up_moment(checkpoint: Path, windows: npt.NDArray[np.int64]) -> F64:
    """`lookup_moment` float64 [H, H] of a checkpoint's embedding over `windows` int64 [W, T]; a graph has no gradients."""
    student = load_student(checkpoint, torch.float32).eval()
    return np.asarray(lookup_moment(student, windows).numpy(), np.float64)


def linear_layers(graph: ir.Graph) -> dict[str, list[Linear]]:
    """Name of a weight's initializer -> the layers that multiply by it, in graph order; several share a repeated weight.

    Raises:
        BadInput: one initializer read both as [K, N] and as [N, K], so that no one set of blocks serves it.
    """
    found: dict[str, list[Linear]] = {}
    rows: dict[str, bool] = {}
    for weight in find_weights(graph):
        if not isinstance(weight, Linear | Table):
            continue
        name = str(weight.weight.name)
        transposed = isinstance(weight, Table) or weight.transposed
        if rows.setdefault(name, transposed) != transposed:
            raise BadInput(f"weight {name!r} is multiplied both as stored and transposed; quantize it round-to-nearest")
        if isinstance(weight, Linear):
            found.setdefault(name, []).append(weight)
    return found


def moment_groups(layers: dict[str, list[Linear]], limit_bytes: int = MOMENT_BYTES) -> list[list[str]]:
    """The names of `layers` in graph order, cut into groups whose moments fit in `limit_bytes` together.

    An input costs 8 K^2 bytes, once in a group however many layers of the group share it. A layer that does not fit by
    itself is a group of its own.
    """
    groups: list[list[str]] = []
    held: dict[str, int] = {}
    for name, readers in layers.items():
        inputs = constant_array(readers[0].weight).shape[1 if readers[0].transposed else 0]
        own = dict.fromkeys(_sources(readers), 8 * inputs**2)
        if not groups or sum({**held, **own}.values()) > limit_bytes:
            groups.append([])
            held = {}
        held |= own
        groups[-1].append(name)
    return groups


def input_moments(graph_path: Path, feeds: Iterable[Feeds], names: Sequence[str]) -> dict[str, F64]:
    """Initializer name -> float64 [K, K], the mean of x x' over every row that `feeds` brings to its layers.

    The graph is run once per element of `feeds`, cut behind the last layer of `names`; held at a time are the inputs of
    one run and one moment per distinct input (a run's rows are summed in float32, runs in float64). Layers that share an
    input share one array: do not write to it. Rows of padding count like others, so `feeds` should have none.

    Raises:
        BadInput: no feeds, a name that no linear layer has, or inputs that are not finite.
    """
    import onnxruntime

    model = load_graph(graph_path)
    layers = linear_layers(model.graph)
    if unknown := [name for name in names if name not in layers]:
        raise BadInput(f"{graph_path} has no linear layer with the weight {unknown[0]!r}; export the checkpoint again")
    readers = {name: list(_sources(layers[name])) for name in names}
    values = {source: value for name in names for source, value in _sources(layers[name]).items()}
    _end_at(model, list(values.values()))
    moments: dict[str, Any] = dict.fromkeys(values, 0.0)
    counts = dict.fromkeys(values, 0)
    with tempfile.TemporaryDirectory(prefix="edgestill-moments-") as folder:
        save_graph(model, Path(folder) / "inputs.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        path = os.fspath(Path(folder) / "inputs.onnx")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        wanted = {i.name for i in session.get_inputs()}
        for feed in feeds:
            results = session.run(None, {name: array for name, array in feed.items() if name in wanted})
            for source, result in zip(values, results, strict=True):
                x = result.reshape(-1, result.shape[-1])
                moments[source] = moments[source] + (x.T @ x).astype(np.float64)
                counts[source] += len(x)
    if not all(counts.values()):
        raise BadInput("no calibration text reached the linear layers; give at least one window")
    if not all(np.isfinite(moment).all() for moment in moments.values()):
        raise BadInput(
            f"{graph_path} gives values that are not finite on the calibration text; train the student again"
        )
    means = {source: moments[source] / counts[source] for source in values}
    return {name: _pooled(own, moments, counts) if len(own) > 1 else means[own[0]] for name, own in readers.items()}


def window_feeds(graph: Graph, token_ids: npt.NDArray[np.integer[Any]]) -> Iterator[Feeds]:
    """One feed per window of `token_ids` [W, T] for a graph with cache inputs: all tokens in one step, no past.

    Raises:
        BadInput: a graph input that is none of Optimum's names.
    """
    for window in token_ids.astype(np.int64):
        feed: Feeds = {}
        for spec in graph.inputs:
            if spec.name == "input_ids":
                feed[spec.name] = window[None]
            elif spec.name == "position_ids":
                feed[spec.name] = np.arange(len(window), dtype=np.int64)[None]
            elif spec.name == "attention_mask":
                feed[spec.name] = np.ones((1, len(window)), np.int64)
            elif spec.name.startswith("past_key_values."):
                _, heads, _, size = spec.shape
                feed[spec.name] = np.zeros((1, int(heads), 0, int(size)), spec.dtype)
            else:
                raise BadInput(f"graph input {spec.name!r} has no known meaning; export the checkpoint again")
        yield feed


def _sources(readers: Sequence[Linear]) -> dict[str, ir.Value]:
    """Name -> value of the distinct inputs of `readers`."""
    values = [reader.node.inputs[0] for reader in readers]
    return {str(value.name): value for value in values if value is not None}


def _end_at(model: ir.Model, values: Sequence[ir.Value]) -> None:
    """Make `values` the graph's outputs, under names of their own, and drop what only the old outputs needed."""
    graph = model.graph
    graph.outputs.clear()
    for i, value in enumerate(values):
        node = ir.node("Identity", [value], name=f"moment_input_{i}")
        output = node.outputs[0]
        output.name, output.type = f"moment_input_{i}", ir.TensorType(ir.DataType.FLOAT)
        graph.append(node)
        graph.outputs.append(output)
    RemoveUnusedNodesPass()(model)


def _pooled(sources: Sequence[str], moments: dict[str, Any], counts: dict[str, int]) -> F64:
    """The mean over the rows of several inputs."""
    total: F64 = sum(moments[source] for source in sources) / sum(counts[source] for source in sources)
    return total
