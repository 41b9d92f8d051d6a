"""Weights of an exported graph in 4 or 8 bits, and back: the graph that multiplies exactly what was shipped.

    MatMul, Gemm  -> the product of stored.py (+ Add)    every linear layer, the head tied to the embedding included
    Gather        -> the lookup of stored.py             the embedding, where there is one for the precision

A tied embedding and head are one stored matrix. Integers that were trained or found before are taken as they are; all others
are rounded to nearest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgestill.export.blockwise import dequantize, sqnr_db
from edgestill.export.fp8 import Fp8Weight
from edgestill.export.graph_io import load_graph, save_graph, validate_graph
from edgestill.export.linear_layers import Linear, Table, Unfit, Weight, find_weights
from edgestill.export.nodes import add_constant, constant_array, input_of, substitute
from edgestill.export.quantized_ops import CONTRIB, OPERATORS, read_block
from edgestill.export.standard_ops import OPSET, read_standard
from edgestill.export.stored import (
    F32,
    Blocks,
    Eights,
    Form,
    Plain,
    Quantized,
    Tables,
    round_to_nearest,
    unfit_blocks,
    unfit_product,
    unfit_table,
    values_of,
)
from edgestill.export.tables import TableWeight, read_table
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.errors import BadInput

QUANTIZED = ("int4", "int8", "nf4", "fp4")
Given = Callable[[str, F32], Quantized | str | None]
"""(name of an initializer, its float32 [K, N]) -> what ships instead, or why it stays float32; None: round to nearest."""


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


def quantize_graph(
    source: Path,
    target: Path,
    precision: PrecisionSpec,
    *,
    given: Given | None = None,
    standard: bool = False,
    float_rows: bool = False,
) -> QuantizationReport:
    """Write the float32 graph `source` as `target` with weights in `precision`, checked and opened once.

    Args:
        given: integers that are there already (trained ones, or those of another method than rounding).
        standard: plain ONNX operators of opset 21 instead of onnxruntime's own.
        float_rows: with `standard`, tables are looked up in float32 rows of the same values.

    Raises:
        BadInput: a precision that has no form in this graph, or a result that onnxruntime refuses.
    """
    _require_known(precision, standard)
    model = load_graph(source)
    if isinstance(given, ByValues):
        given.found.clear()
    store = _Store(model.graph, precision, given, standard, float_rows)
    quantized: list[QuantizedNode] = []
    left_float: list[FloatNode] = []
    for weight in find_weights(model.graph):
        node = weight.node
        stored = store.put(weight)
        if isinstance(stored, str):
            shape = constant_array(weight.weight).shape
            left_float.append(FloatNode(str(node.name), node.op_type, shape, stored))
            continue
        form, quality = stored
        if isinstance(weight, Linear):
            shape = (form.inputs, form.outputs)
            product = form.product(input_of(node, 0), str(node.name))
            substitute(node, *product[:-1], *_with_bias(product[-1], weight.bias))
        else:
            shape = (form.outputs, form.inputs)
            substitute(node, *form.lookup(input_of(node, 1), str(node.name)))
        quantized.append(QuantizedNode(str(node.name), node.op_type, shape, form.bits, quality))
    store.write_float_values()
    if isinstance(given, ByValues):
        given.check(source)
    if standard:
        _convert(model)
    _finish(model, target)
    return QuantizationReport(tuple(quantized), tuple(left_float), graph_bytes(target))


def dequantize_graph(source: Path, target: Path) -> None:
    """Write `source` with each quantized weight as the float32 matrix it stands for: the yardstick of lossy operators."""
    model = load_graph(source)
    stored: dict[tuple[str, bool], ir.Value] = {}

    def matrix_of(name: str, matrix: F32, rows: bool) -> ir.Value:
        if (name, rows) not in stored:
            what, array = ("rows", matrix.T) if rows else ("matrix", matrix)
            stored[name, rows] = add_constant(model.graph, f"{name}_{what}", array)
        return stored[name, rows]

    for node in list(model.graph):
        lookup = node.op_type == "GatherBlockQuantized"
        if node.domain == CONTRIB and node.op_type in OPERATORS:
            name, block = read_block(node)
            matrix = matrix_of(name, dequantize(block), lookup)
        elif node.domain == CONTRIB and node.op_type == "MatMulBnb4":
            name, table = read_table(node)
            matrix = matrix_of(name, table.values(), False)
        elif node.op_type == "DequantizeLinear":
            name, values = read_standard(node)
            substitute(node, ir.node("Identity", [matrix_of(name, values, False)], name=node.name))
            continue
        else:
            continue
        inputs = [matrix, input_of(node, 1)] if lookup else [input_of(node, 0), matrix]
        substitute(node, ir.node("Gather" if lookup else "MatMul", inputs, name=node.name))
    _finish(model, target)


@dataclass(frozen=True)
class ByValues:
    """A `Given`: integers of weights known by their `digest_of`, for any graph of the model, whatever it calls them."""

    weights: Mapping[bytes, Quantized]
    otherwise: str | None = None
    """Why all others stay float32; None: they are rounded to nearest."""
    every: bool = False
    """Whether each of `weights` must be in the graph."""
    found: set[bytes] = field(default_factory=set)

    def __call__(self, _: str, matrix: F32) -> Quantized | str | None:
        key = digest_of(matrix)
        self.found.add(key)
        return self.weights.get(key, self.otherwise)

    def check(self, graph: Path) -> None:
        """Refuse a graph in which weights changed on their way: their integers would be left out.

        Raises:
            BadInput: not all were found that must be.
        """
        lost = len(self.weights.keys() - self.found) if self.every else 0
        if lost:
            raise BadInput(
                f"{graph}: {lost} of {len(self.weights)} weights that were trained on a grid are not in this graph; "
                "export the checkpoint that training left"
            )


def digest_of(matrix: F32) -> bytes:
    """Of float32 [K, N], by its shape and values."""
    return hashlib.sha256(np.ascontiguousarray(matrix.T).tobytes()).digest() + str(matrix.shape).encode()


def graph_bytes(path: Path) -> int:
    """Size of the graph file and of the external data that `save_graph` wrote beside it."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


class _Store:
    """Quantizes and stores each weight once, however many nodes read it."""

    def __init__(
        self, graph: ir.Graph, precision: PrecisionSpec, given: Given | None, standard: bool, float_rows: bool
    ) -> None:
        self._graph, self._precision = graph, precision
        self._given, self._standard, self._float_rows = given, standard, float_rows
        self._known: dict[tuple[str, bool], tuple[Form, float | None] | str] = {}
        self._float_values: dict[str, tuple[ir.Value, F32]] = {}

    def put(self, weight: Weight) -> tuple[Form, float | None] | str:
        """(the weight in the graph, its SQNR in dB), or why it stays float32."""
        if isinstance(weight, Unfit):
            return weight.reason
        rows = weight.transposed if isinstance(weight, Linear) else True
        array = constant_array(weight.weight)
        matrix = array.T if rows else array
        if isinstance(weight, Table) and (why := unfit_table(len(matrix), self._precision, self._standard)):
            return self._float(weight, matrix, rows, why)
        if self._float_rows and (why := unfit_blocks(len(matrix), self._precision)) is not None:
            return self._float(weight, matrix, rows, why)
        key = (str(weight.weight.name), rows)
        if key not in self._known:
            self._known[key] = self._stored(key[0], f"{key[0]}_rows" if rows else key[0], matrix)
        return self._known[key]

    def _float(self, weight: Linear | Table, matrix: F32, rows: bool, why: str) -> str:
        """Leave a weight in float; one that was trained on a grid with the values it was trained with."""
        name = str(weight.weight.name)
        found = self._given(name, matrix) if self._given is not None else None
        if found is not None and not isinstance(found, str):
            values = values_of(found)
            self._float_values[name] = weight.weight, np.ascontiguousarray(values.T if rows else values)
        return why

    def write_float_values(self) -> None:
        """Last, since a weight is known by the values it had."""
        for value, array in self._float_values.values():
            value.const_value = ir.tensor(array, name=value.name)

    def _stored(self, name: str, prefix: str, matrix: F32) -> tuple[Form, float | None] | str:
        found = self._given(name, matrix) if self._given is not None else None
        if isinstance(found, str):
            return found
        if found is None:
            if (why := unfit_product(len(matrix), self._precision)) is not None:
                return why
            found = round_to_nearest(matrix, self._precision)
        return self._form(prefix, found), sqnr_db(matrix, values_of(found))

    def _form(self, prefix: str, weight: Quantized) -> Form:
        if isinstance(weight, TableWeight):
            return Tables(self._graph, prefix, weight)
        if isinstance(weight, Fp8Weight):
            return Eights(self._graph, prefix, weight)
        if self._standard:
            return Plain(self._graph, prefix, weight, float_rows=self._float_rows)
        return Blocks(self._graph, prefix, weight, self._precision.accuracy_level)


def _convert(model: ir.Model) -> None:
    """Raise the opset to the first one whose DequantizeLinear has blocks."""
    from onnxscript import version_converter

    if model.graph.opset_imports.get("", 0) < OPSET:
        version_converter.convert_version(model, OPSET)


def _require_known(precision: PrecisionSpec, standard: bool) -> None:
    weights = precision.weights
    if weights == "fp8" and standard:
        return
    if weights not in QUANTIZED:
        raise BadInput(f"precision.weights {weights} has no blocks of codes; use {', '.join(QUANTIZED)} or float32")
    if weights != "int4" and not precision.symmetric:
        raise BadInput(f"precision.symmetric false is for int4, {weights} has no zero point; remove it")
    if standard and weights in ("nf4", "fp4"):
        raise BadInput(
            f"precision.weights {weights} has no form in standard ONNX; use int4 or int8, or portable: false"
        )


def _with_bias(product: ir.Node, bias: ir.Value | None) -> tuple[ir.Node, ...]:
    if bias is None:
        return (product,)
    return product, ir.node("Add", [product.outputs[0], bias], name=f"{product.name}_bias")


def _finish(model: ir.Model, target: Path) -> None:
    """Drop what nothing reads any more, write, and try the result."""
    RemoveUnusedNodesPass()(model)
    if any(node.domain == CONTRIB for node in model.graph):
        model.graph.opset_imports[CONTRIB] = 1
    save_graph(model, target)
    validate_graph(target)
