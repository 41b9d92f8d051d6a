"""Small edits of a graph: constants in and out, a node exchanged for others."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgestill.runtime.errors import BadInput


def constant_array(value: ir.Value | None) -> npt.NDArray[Any]:
    """The array of the initializer `value`."""
    if value is None or value.const_value is None:
        raise ValueError(f"{value!r} is no initializer")
    return value.const_value.numpy()


def scalar_of(value: ir.Value | None) -> float | None:
    """The number that the constant `value` holds; None for anything else."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size != 1 else float(tensor.numpy().item())


def add_constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """A new initializer of `graph`."""
    tensor = ir.Tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def shared_constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """The initializer `name` of `graph`, added when it is not there yet."""
    return graph.initializers[name] if name in graph.initializers else add_constant(graph, name, array)


def input_of(node: ir.Node, index: int) -> ir.Value:
    """Input `index` of `node`.

    Raises:
        BadInput: the node lacks it.
    """
    value = node.inputs[index]
    if value is None:
        raise BadInput(f"node {node.name!r} ({node.op_type}) lacks input {index}; export the checkpoint again")
    return value


def made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node that makes `value`, if it is one of `operators`."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in operators else None


def readers_of(value: ir.Value) -> list[ir.Node]:
    """The nodes that read `value`, one entry per reading."""
    return [use.node for use in value.uses()]


def substitute(node: ir.Node, *new: ir.Node) -> None:
    """Put `new` where `node` is; the last one's result takes the place, the name and the type of `node`'s."""
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise BadInput(f"node {node.name!r} lies in no graph; export the checkpoint again")
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, new[-1].outputs)
