"""Weights of an exported graph in 4 or 8 bits, and back: the graph that multiplies exactly what was shipped.

    MatMul, Gemm  -> MatMulNBits (+ Add)      every linear layer, the head tied to the embedding included
    Gather        -> GatherBlockQuantized     the embedding, where this onnxruntime has the kernel

A tied embedding and head are one stored matrix: MatMulNBits keeps [vocab, hidden] row by row, as a lookup reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgestill.export.blockwise import BlockWeight, dequantize, quantize_int4, quantize_int8, sqnr_db
from edgestill.export.graph_io import load_graph, save_graph, validate_graph
from edgestill.export.linear_layers import Linear, Table, Unfit, Weight, find_weights
from edgestill.export.quantized_ops import (
    CONTRIB,
    OPERATORS,
    add_constant,
    constant_array,
    lookup_nodes,
    lookup_runs,
    product_node,
    read_block,
)
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.errors import BadInput


@dataclass(frozen=True)
class QuantizedNode:
    """One weight that ships in `bits`. `shape` is [K, N] of y = x W, or [rows, hidden] of a table."""

    name: str
    operator: str
    shape: tuple[int, int]
    bits: int
    sqnr_db: float | None
    """Of the weight alone: 10 log10(sum w^2 / sum (w - shipped w)^2); None when it was on the grid already."""


@dataclass(frozen=True)
class FloatNode:
    """One constant matrix that stays float32, and why."""

    name: str
    operator: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_graph` did. `graph_bytes`: the .onnx file with its external data."""

    quantized: tuple[QuantizedNode, ...]
    left_float: tuple[FloatNode, ...]
    graph_bytes: int

    def bits_per_weight(self, parameters: int) -> float:
        """Effective bits: graph bytes x 8 / parameters (1 MB for 2 M parameters is 4)."""
        return self.graph_bytes * 8 / parameters


def quantize_graph(source: Path, target: Path, precision: PrecisionSpec) -> QuantizationReport:
    """Write the float32 graph `source` as `target` with weights in `precision`, checked and opened once.

    Raises:
        BadInput: a precision that has no form in this graph, or a result that onnxruntime refuses.
    """
    _require_known(precision)
    model = load_graph(source)
    store = _Store(model.graph, precision)
    quantized: list[QuantizedNode] = []
    left_float: list[FloatNode] = []
    for weight in find_weights(model.graph):
        weight = _unless_table_is_unfit(weight, store.bits, precision)
        node = weight.node
        if isinstance(weight, Unfit):
            shape = constant_array(weight.weight).shape
            left_float.append(FloatNode(str(node.name), node.op_type, shape, weight.reason))
            continue
        block, constants, quality = store.put(weight)
        if isinstance(weight, Table):
            shape = (block.outputs, block.inputs)
            _substitute(node, *lookup_nodes(model.graph, _input(node, 1), block, constants, str(node.name)))
        else:
            shape = (block.inputs, block.outputs)
            product = product_node(_input(node, 0), block, constants, precision.accuracy_level, str(node.name))
            _substitute(node, *_with_bias(product, weight.bias))
        quantized.append(QuantizedNode(str(node.name), node.op_type, shape, store.bits, quality))
    _finish(model, target)
    return QuantizationReport(tuple(quantized), tuple(left_float), graph_bytes(target))


def dequantize_graph(source: Path, target: Path) -> None:
    """Write `source` with each quantized weight as the float32 matrix it stands for: the yardstick of lossy operators."""
    model = load_graph(source)
    stored: dict[tuple[str, bool], ir.Value] = {}
    for node in [n for n in model.graph if n.domain == CONTRIB and n.op_type in OPERATORS]:
        lookup = node.op_type == "GatherBlockQuantized"
        name, block = read_block(node)
        if (name, lookup) not in stored:
            matrix = dequantize(block)
            stored[name, lookup] = add_constant(
                model.graph, f"{name}_{'rows' if lookup else 'matrix'}", matrix.T if lookup else matrix
            )
        matrix_value = stored[name, lookup]
        inputs = [matrix_value, _input(node, 1)] if lookup else [_input(node, 0), matrix_value]
        _substitute(node, ir.node("Gather" if lookup else "MatMul", inputs, name=node.name))
    _finish(model, target)


def graph_bytes(path: Path) -> int:
    """Size of the graph file and of the external data that `save_graph` wrote beside it."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


class _Store:
    """Quantizes and stores each weight once, however many nodes read it."""

    def __init__(self, graph: ir.Graph, precision: PrecisionSpec) -> None:
        self.bits = 8 if precision.weights == "int8" else 4
        self._graph = graph
        self._precision = precision
        self._known: dict[tuple[str, bool], tuple[BlockWeight, list[ir.Value], float | None]] = {}

    def put(self, weight: Linear | Table) -> tuple[BlockWeight, list[ir.Value], float | None]:
        """(blocks, initializers of codes, scales and zero points, SQNR in dB)."""
        rows = weight.transposed if isinstance(weight, Linear) else True
        name = str(weight.weight.name)
        if (name, rows) not in self._known:
            array = constant_array(weight.weight)
            matrix = array.T if rows else array
            spec = self._precision
            if self.bits == 8:
                block = quantize_int8(matrix, spec.block_size)
            else:
                block = quantize_int4(matrix, spec.block_size, spec.symmetric)
            prefix = f"{name}_rows" if rows else name
            constants = [
                add_constant(self._graph, f"{prefix}_codes", block.packed),
                add_constant(self._graph, f"{prefix}_scales", block.scales),
            ]
            if block.zero_points is not None:
                constants.append(add_constant(self._graph, f"{prefix}_zero_points", block.zero_points))
            self._known[name, rows] = (block, constants, sqnr_db(matrix, dequantize(block)))
        return self._known[name, rows]


def _require_known(precision: PrecisionSpec) -> None:
    if precision.weights not in ("int4", "int8"):
        raise BadInput(f"precision.weights {precision.weights} has no blocks of integers; use int4, int8 or float32")
    if precision.weights == "int8" and not precision.symmetric:
        raise BadInput("precision.symmetric false is for int4, int8 has no zero point; remove it")


def _unless_table_is_unfit(weight: Weight, bits: int, precision: PrecisionSpec) -> Weight:
    """`weight`, or why the embedding must stay float32."""
    if not isinstance(weight, Table):
        return weight
    hidden = constant_array(weight.weight).shape[1]
    if hidden * bits % 8:
        return Unfit(weight.node, weight.weight, f"a row of {hidden} x {bits} bits is no whole number of bytes")
    if not lookup_runs(bits, precision.block_size, precision.symmetric):
        why = f"this onnxruntime has no GatherBlockQuantized for {bits} bits in blocks of {precision.block_size}"
        return Unfit(weight.node, weight.weight, why)
    return weight


def _with_bias(product: ir.Node, bias: ir.Value | None) -> tuple[ir.Node, ...]:
    if bias is None:
        return (product,)
    return product, ir.node("Add", [product.outputs[0], bias], name=f"{product.name}_bias")


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise BadInput(f"node {node.name!r} ({node.op_type}) lacks input {index}; export the checkpoint again")
    return value


def _substitute(node: ir.Node, *new: ir.Node) -> None:
    """Put `new` where `node` is; the last one's result takes the place, the name and the type of `node`'s."""
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise BadInput(f"node {node.name!r} lies in no graph; export the checkpoint again")
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, new[-1].outputs)


def _finish(model: ir.Model, target: Path) -> None:
    """Drop what nothing reads any more, write, and try the result."""
    RemoveUnusedNodesPass()(model)
    if any(node.domain == CONTRIB for node in model.graph):
        model.graph.opset_imports[CONTRIB] = 1
    save_graph(model, target)
    validate_graph(target)
