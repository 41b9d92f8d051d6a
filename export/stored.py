"""A quantized weight in a graph: its constants, and the nodes that multiply by it or look its rows up.

Blocks   int4, int8    MatMulNBits, GatherBlockQuantized (quantized_ops.py)
Tables   nf4, fp4      MatMulBnb4, rows by plain operators (tables.py)
Plain    int4, int8    DequantizeLinear and MatMul, standard ONNX (standard_ops.py)
Eights   fp8           the same with 8-bit floats, for engines (fp8.py)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgestill.export.blockwise import BlockWeight, dequantize, quantize_int4, quantize_int8
from edgestill.export.fp8 import Fp8Weight, fp8_constants, fp8_product, quantize_fp8
from edgestill.export.nodes import add_constant
from edgestill.export.quantized_ops import lookup_nodes, lookup_runs, product_node
from edgestill.export.standard_ops import standard_constants, standard_product, standard_table
from edgestill.export.tables import TableWeight, quantize_table, table_constants, table_lookup, table_product
from edgestill.profiles.schema import PrecisionSpec

F32 = npt.NDArray[np.float32]
WHOLE_FROM = 16
"""The smallest block that TensorRT-RTX was seen to build."""
Quantized = BlockWeight | TableWeight | Fp8Weight


def round_to_nearest(weight: F32, precision: PrecisionSpec) -> Quantized:
    """float32 [K, N] in the precision of a profile, which has a quantized one."""
    if precision.weights == "fp8":
        return quantize_fp8(weight)
    if precision.weights == "int8":
        return quantize_int8(weight, precision.block_size)
    if precision.weights == "int4":
        return quantize_int4(weight, precision.block_size, precision.symmetric)
    return quantize_table(weight, "nf4" if precision.weights == "nf4" else "fp4", precision.block_size)


def values_of(weight: Quantized) -> F32:
    """The float32 [K, N] that ships."""
    return dequantize(weight) if isinstance(weight, BlockWeight) else weight.values()


class Form(ABC):
    """One weight in one graph. Its constants are added once and shared by all nodes that read them."""

    outputs: int
    inputs: int
    bits: int

    @abstractmethod
    def product(self, x: ir.Value, name: str) -> tuple[ir.Node, ...]:
        """x W; the last node gives the result."""

    @abstractmethod
    def lookup(self, ids: ir.Value, name: str) -> tuple[ir.Node, ...]:
        """Rows `ids` of W'; the last node gives the result."""


class Blocks(Form):
    def __init__(self, graph: ir.Graph, prefix: str, block: BlockWeight, accuracy_level: int) -> None:
        self.outputs, self.inputs, self.bits = block.outputs, block.inputs, block.bits
        self._graph, self._block, self._level = graph, block, accuracy_level
        self._constants = [
            add_constant(graph, f"{prefix}_codes", block.packed),
            add_constant(graph, f"{prefix}_scales", block.scales),
        ]
        if block.zero_points is not None:
            self._constants.append(add_constant(graph, f"{prefix}_zero_points", block.zero_points))

    def product(self, x: ir.Value, name: str) -> tuple[ir.Node, ...]:
        return (product_node(x, self._block, self._constants, self._level, name),)

    def lookup(self, ids: ir.Value, name: str) -> tuple[ir.Node, ...]:
        return lookup_nodes(self._graph, ids, self._block, self._constants, name)


class Tables(Form):
    def __init__(self, graph: ir.Graph, prefix: str, table: TableWeight) -> None:
        self.outputs, self.inputs, self.bits = table.outputs, table.inputs, table.bits
        self._graph, self._table = graph, table
        self._constants = table_constants(graph, table, prefix)

    def product(self, x: ir.Value, name: str) -> tuple[ir.Node, ...]:
        return (table_product(x, self._table, self._constants, name),)

    def lookup(self, ids: ir.Value, name: str) -> tuple[ir.Node, ...]:
        return table_lookup(self._graph, ids, self._table, self._constants, name)


class Plain(Form):
    """`float_rows`: a lookup reads float32 rows of W', since TensorRT takes integers nowhere but before a product."""

    def __init__(self, graph: ir.Graph, prefix: str, block: BlockWeight, *, float_rows: bool = False) -> None:
        self.outputs, self.inputs, self.bits = block.outputs, block.inputs, block.bits
        self._graph, self._block, self._prefix, self._float_rows = graph, block, prefix, float_rows
        self._constants: list[ir.Value] | None = None

    def product(self, x: ir.Value, name: str) -> tuple[ir.Node, ...]:
        if self._constants is None:  # a table that is only looked up has rows of its own
            self._constants = standard_constants(self._graph, self._block, self._prefix)
        return standard_product(x, self._block, self._constants, name)

    def lookup(self, ids: ir.Value, name: str) -> tuple[ir.Node, ...]:
        if self._float_rows:
            rows = add_constant(self._graph, f"{self._prefix}_float_rows", dequantize(self._block).T)
            return (ir.node("Gather", [rows, ids], name=name),)
        return standard_table(self._graph, ids, self._block, self._prefix, name)


class Eights(Form):
    def __init__(self, graph: ir.Graph, prefix: str, weight: Fp8Weight) -> None:
        self.outputs, self.inputs, self.bits = weight.outputs, weight.inputs, 8
        self._graph, self._weight, self._prefix = graph, weight, prefix
        self._constants: list[ir.Value] | None = None

    def product(self, x: ir.Value, name: str) -> tuple[ir.Node, ...]:
        if self._constants is None:
            self._constants = fp8_constants(self._graph, self._prefix, self._weight)
        return fp8_product(x, self._constants, name)

    def lookup(self, ids: ir.Value, name: str) -> tuple[ir.Node, ...]:
        rows = add_constant(self._graph, f"{self._prefix}_float_rows", self._weight.values().T)
        return (ir.node("Gather", [rows, ids], name=name),)


def unfit_table(hidden: int, precision: PrecisionSpec, standard: bool) -> str | None:
    """Why rows of `hidden` values cannot be looked up in this precision; None when they can."""
    if precision.weights in ("nf4", "fp4"):
        whole = hidden % precision.block_size == 0
        return None if whole else f"rows of {hidden} are no whole blocks of {precision.block_size}"
    bits = 8 if precision.weights == "int8" else 4
    if standard:
        return None
    if hidden * bits % 8:
        return f"a row of {hidden} x {bits} bits is no whole number of bytes"
    if not lookup_runs(bits, precision.block_size, precision.symmetric):
        return f"this onnxruntime has no GatherBlockQuantized for {bits} bits in blocks of {precision.block_size}"
    return None


def unfit_blocks(inputs: int, precision: PrecisionSpec) -> str | None:
    """Why a layer of so many inputs stays float in an engine, which wants whole blocks of WHOLE_FROM at least; None when it need
    not."""
    whole = math.gcd(inputs, precision.block_size)
    if precision.weights != "int4" or whole >= WHOLE_FROM:
        return None
    return f"{inputs} inputs make no whole blocks of {WHOLE_FROM} or more, which engines want"


def unfit_product(inputs: int, precision: PrecisionSpec) -> str | None:
    """Why a layer of so many inputs stays float32 in this precision; None when it need not."""
    if precision.weights in ("nf4", "fp4") and inputs % precision.block_size:
        return f"{inputs} inputs are no multiple of the block of {precision.block_size}, misread by bitsandbytes on AVX-512"
    return None
