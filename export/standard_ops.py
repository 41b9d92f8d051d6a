"""Quantized weights as plain ONNX: DequantizeLinear of opset 21, for engines without onnxruntime's own operators.

    int4   codes INT4 [K, N] (UINT4 with zero points), scales [K / block, N], axis 0, block_size
    int8   codes INT8 [K, N], scales [N], axis 1
    rows of an embedding: Cast(Gather(codes)) * Gather(scales), since DequantizeLinear has no scale per chosen row

The integers and the scales are those of blockwise.py, another way round: y = x W reads [K, N]. Where the last block is not full
(TensorRT wants whole ones) the same weight is written in smaller blocks that divide K, each with the scale it had.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgestill.export.blockwise import BlockWeight, codes_of
from edgestill.export.nodes import add_constant, constant_array

OPSET = 21


def standard_constants(graph: ir.Graph, block: BlockWeight, prefix: str) -> list[ir.Value]:
    """Initializers of codes, scales, and zero points if there are any."""
    codes, zero = codes_of(block)
    if block.bits == 8:
        signed = add_constant(graph, f"{prefix}_codes", (codes.T - 128).astype(np.int8))
        return [signed, add_constant(graph, f"{prefix}_scales", block.scales[:, 0])]
    symmetric, parts = block.zero_points is None, block.block_size // whole_block(block)
    kind = ir.DataType.INT4 if symmetric else ir.DataType.UINT4
    values = [_add_packed(graph, f"{prefix}_codes", (codes - 8 if symmetric else codes).T, kind)]
    count = block.inputs // whole_block(block)
    values.append(add_constant(graph, f"{prefix}_scales", np.repeat(block.scales, parts, axis=1)[:, :count].T))
    if not symmetric:
        values.append(_add_packed(graph, f"{prefix}_zero_points", np.repeat(zero, parts, axis=1)[:, :count].T, kind))
    return values


def whole_block(block: BlockWeight) -> int:
    """The largest block that divides both K and the block of the scales."""
    return math.gcd(block.block_size, block.inputs)


def standard_product(x: ir.Value, block: BlockWeight, constants: list[ir.Value], name: str) -> tuple[ir.Node, ...]:
    """DequantizeLinear and the product that reads it."""
    attributes = {"axis": 1} if block.bits == 8 else {"axis": 0, "block_size": whole_block(block)}
    weight = ir.node("DequantizeLinear", constants, attributes, name=f"{name}_weight")
    return weight, ir.node("MatMul", [x, weight.outputs[0]], name=name)


def standard_table(graph: ir.Graph, ids: ir.Value, block: BlockWeight, prefix: str, name: str) -> tuple[ir.Node, ...]:
    """Rows of W', one byte per code: a lookup reads bytes, not halves of them."""
    codes, zero = codes_of(block)
    rows = add_constant(
        graph, f"{prefix}_row_codes", (codes - np.repeat(zero, block.block_size, 1)[:, : block.inputs]).astype(np.int8)
    )
    scales = add_constant(graph, f"{prefix}_row_scales", block.scales)
    picked = ir.node("Gather", [rows, ids], {"axis": 0}, name=f"{name}_codes")
    whole = ir.node("Cast", [picked.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{name}_float")
    scale = ir.node("Gather", [scales, ids], {"axis": 0}, name=f"{name}_scales")
    pick = np.arange(block.inputs, dtype=np.int64) // block.block_size
    spread = add_constant(graph, f"{prefix}_block_of", pick)
    wide = ir.node("Gather", [scale.outputs[0], spread], {"axis": -1}, name=f"{name}_scale_of_each")
    return picked, whole, scale, wide, ir.node("Mul", [whole.outputs[0], wide.outputs[0]], name=name)


def read_standard(node: ir.Node) -> tuple[str, npt.NDArray[np.float32]]:
    """(name of the codes, float32 [K, N]) of a DequantizeLinear over constants."""
    codes, scales = constant_array(node.inputs[0]), constant_array(node.inputs[1])
    zero = constant_array(node.inputs[2]).astype(np.float32) if len(node.inputs) > 2 else np.float32(0)
    if scales.ndim == 2:
        of = np.arange(len(codes)) // node.attributes["block_size"].as_int()
        scales, zero = scales[of], zero[of] if isinstance(zero, np.ndarray) else zero
    values: npt.NDArray[np.float32] = (codes.astype(np.float32) - zero) * scales
    return str(node.inputs[0].name if node.inputs[0] is not None else ""), values


def _add_packed(graph: ir.Graph, name: str, codes: npt.NDArray[np.int16], kind: ir.DataType) -> ir.Value:
    """An initializer of 4-bit integers."""
    tensor = ir.Tensor(np.ascontiguousarray(codes).astype(kind.numpy()), dtype=kind, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(kind), const_value=tensor)
    graph.register_initializer(value)
    return value
