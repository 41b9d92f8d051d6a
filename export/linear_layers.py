"""Finding the weights of a traced graph: linear layers and tables, whatever operators the tracer wrote them as.

    y = x W           MatMul(x, W)                     nn.Linear without bias (a bias is an Add behind it)
    y = x E^T         MatMul(x, Transpose(E))          a head tied to the embedding E [vocab, hidden]
    y = x W + b       Gemm(x, W, b), transB 0 or 1     GPT-2's Conv1D
    y = E[ids]        Gather(E, ids), axis 0           embedding and position tables

Equal initializers are merged by the tracer and reach their nodes through Identity: constants are resolved through it.
A weight that is found but cannot be quantized carries the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Linear:
    """y = x W (+ b). `weight` is the initializer; `transposed`: it is stored as [N, K]."""

    node: ir.Node
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None


@dataclass(frozen=True)
class Table:
    """y = E[ids]: rows of the initializer `weight` [rows, hidden]."""

    node: ir.Node
    weight: ir.Value


@dataclass(frozen=True)
class Unfit:
    """A node with a constant float matrix that stays as it is."""

    node: ir.Node
    weight: ir.Value
    reason: str


Weight = Linear | Table | Unfit


def find_weights(graph: ir.Graph) -> list[Weight]:
    """Every MatMul, Gemm and Gather of `graph` that reads a constant float matrix, in graph order."""
    readers = {"MatMul": _match_matmul, "Gemm": _match_gemm, "Gather": _match_gather}
    found = [readers[node.op_type](node) for node in graph if node.domain == "" and node.op_type in readers]
    return [weight for weight in found if weight is not None]


def constant_of(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """(initializer, transposed) behind `value`, through Identity and Transpose of a matrix; None for an activation."""
    transposed = False
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in ("Identity", "Transpose"):
            return None
        transposed ^= node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", (1, 0))) != (0, 1)
        value = node.inputs[0]
    return None if value is None else (value, transposed)


def fed_by_input(value: ir.Value | None, name: str) -> bool:
    """Whether `value` is the graph input `name`, reshaped or cast at most."""
    while value is not None and not value.is_graph_input():
        node = value.producer()
        if node is None or node.op_type not in ("Identity", "Reshape", "Cast", "Unsqueeze", "Squeeze"):
            return False
        value = node.inputs[0]
    return value is not None and value.name == name


def _is_float_matrix(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype is ir.DataType.FLOAT and len(tensor.shape) >= 2


def _match_matmul(node: ir.Node) -> Weight | None:
    left, right = constant_of(node.inputs[0]), constant_of(node.inputs[1])
    if right is None:
        if left is not None and _is_float_matrix(left[0]):
            return Unfit(node, left[0], "the constant is the left factor")
        return None
    weight, transposed = right
    if not _is_float_matrix(weight):
        return None
    if _rank(weight) != 2:
        return Unfit(node, weight, f"the weight has {_rank(weight)} dimensions, not 2")
    return Linear(node, weight, transposed, None)


def _match_gemm(node: ir.Node) -> Weight | None:
    right = constant_of(node.inputs[1])
    if right is None or not _is_float_matrix(right[0]):
        return None
    weight, transposed = right
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    scales = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    if scales != [1.0, 1.0] or node.attributes.get_int("transA", 0) != 0:
        return Unfit(node, weight, "Gemm with alpha, beta or transA")
    return Linear(node, weight, transposed ^ (node.attributes.get_int("transB", 0) != 0), bias)


def _match_gather(node: ir.Node) -> Weight | None:
    table = constant_of(node.inputs[0])
    if table is None or not _is_float_matrix(table[0]):
        return None
    weight, transposed = table
    if transposed or _rank(weight) != 2 or node.attributes.get_int("axis", 0) != 0:
        return Unfit(node, weight, "not rows of a matrix")
    if not fed_by_input(node.inputs[1], "input_ids"):
        return Unfit(node, weight, "rows are not chosen by input_ids (a table of positions)")
    return Table(node, weight)


def _rank(value: ir.Value) -> int:
    return 0 if value.const_value is None else len(value.const_value.shape)
