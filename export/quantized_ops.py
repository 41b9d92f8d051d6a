"""Operators of onnxruntime that read blocks of integers: how a `BlockWeight` becomes a node, and back.

    com.microsoft.MatMulNBits(x, codes, scales[, zero_points])             y [.., N] = x [.., K] W
    com.microsoft.GatherBlockQuantized(rows, ids, scales[, zero_points])   y [.., K] = row ids of W^T

Both read the layout of blockwise.py, so a tied embedding and head share their constants; the lookup takes the codes as
[N, padded K * bits / 8] (a Reshape of a constant, folded when the session opens), and cuts the padding off the rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgestill.export.blockwise import BlockWeight
from edgestill.export.nodes import add_constant, constant_array

CONTRIB = "com.microsoft"
OPERATORS = ("MatMulNBits", "GatherBlockQuantized")


def product_node(x: ir.Value, block: BlockWeight, constants: list[ir.Value], accuracy_level: int, name: str) -> ir.Node:
    """`x` times the weight whose arrays are `constants` (codes, scales, zero points if any)."""
    attributes = {"K": block.inputs, "N": block.outputs, "bits": block.bits, "block_size": block.block_size}
    if accuracy_level:  # 0 is the default, and other execution providers do not know the attribute
        attributes["accuracy_level"] = accuracy_level
    return ir.node("MatMulNBits", [x, *constants], attributes, domain=CONTRIB, name=name)


def lookup_nodes(
    graph: ir.Graph, ids: ir.Value, block: BlockWeight, constants: list[ir.Value], name: str
) -> tuple[ir.Node, ...]:
    """Row `ids` of the weight whose arrays are `constants`; the last node gives the result."""
    codes = str(constants[0].name)
    attributes = {"bits": block.bits, "block_size": block.block_size, "gather_axis": 0, "quantize_axis": 1}
    shape = add_constant(graph, f"{codes}_shape", np.array([block.outputs, -1], np.int64))
    reshape = ir.node("Reshape", [constants[0], shape], name=f"{name}_codes")
    inputs = [reshape.outputs[0], ids, *constants[1:]]
    rows = ir.node("GatherBlockQuantized", inputs, attributes, domain=CONTRIB, name=name)
    if block.inputs % block.block_size == 0:
        return reshape, rows
    bounds = [
        add_constant(graph, f"{codes}_{what}", np.array([number], np.int64))
        for what, number in (("from", 0), ("to", block.inputs), ("axis", -1))
    ]
    return reshape, rows, ir.node("Slice", [rows.outputs[0], *bounds], name=f"{name}_without_padding")


def read_block(node: ir.Node) -> tuple[str, BlockWeight]:
    """(name of the codes, weight) that one of `OPERATORS` reads."""
    lookup = node.op_type == "GatherBlockQuantized"
    source = node.inputs[0 if lookup else 1]
    if source is not None and (producer := source.producer()) is not None:
        source = producer.inputs[0]
    packed, scales = constant_array(source), constant_array(node.inputs[2])
    zero_points = node.inputs[3] if len(node.inputs) > 3 else None
    bits = node.attributes.get_int("bits", 4)
    inputs = packed.size * 8 // bits // len(packed) if lookup else node.attributes["K"].as_int()
    block = BlockWeight(
        packed=packed,
        scales=scales.reshape(len(packed), -1),
        zero_points=None if zero_points is None else constant_array(zero_points).reshape(len(packed), -1),
        bits=bits,
        block_size=node.attributes["block_size"].as_int(),
        inputs=inputs,
    )
    return str(source.name if source is not None else ""), block


@cache
def lookup_runs(bits: int, block_size: int, symmetric: bool) -> bool:
    """Whether this onnxruntime's CPU has GatherBlockQuantized for uint8 codes (older ones know int4 only): tries it."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    codes, scales, zeros = (
        np.zeros((4, block_size * bits // 8), np.uint8),
        np.zeros((4, 1), np.float32),
        np.zeros((4, 1), np.uint8),
    )
    arrays: list[npt.NDArray[Any]] = [codes, scales] if symmetric else [codes, scales, zeros]
    constants = [ir.Value(name=f"c{i}", const_value=ir.Tensor(array)) for i, array in enumerate(arrays)]
    ids = ir.Value(name="ids", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    attributes = {"bits": bits, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1}
    node = ir.node("GatherBlockQuantized", [constants[0], ids, *constants[1:]], attributes, domain=CONTRIB)
    row = node.outputs[0]
    row.name, row.type = "row", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 18, CONTRIB: 1}
    graph = ir.Graph([ids], [row], nodes=[node], initializers=constants, opset_imports=opsets, name="probe")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        probe = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
        session = onnxruntime.InferenceSession(probe, options, providers=["CPUExecutionProvider"])
        session.run(None, {"ids": np.zeros(1, np.int64)})
    except (states.Fail, states.InvalidGraph, states.InvalidArgument, states.NotImplemented, states.RuntimeException):
        return False
    return True
