"""The sum of a residual and the norm behind it, in one pass over memory.

    s = a + b,  y = s / sqrt(mean(s^2) + epsilon) * weight           SkipSimplifiedLayerNormalization (RMSNorm)
    s = a + b,  y = (s - mean) / sqrt(var + epsilon) * weight + bias   SkipLayerNormalization

Both give y and s. A norm whose input is no sum of two activations stays: onnxruntime fuses its parts when it opens the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgestill.export.nodes import made_by, readers_of, scalar_of
from edgestill.export.quantized_ops import CONTRIB
from edgestill.export.rewrite.outcome import Outcome


@dataclass(frozen=True)
class _Norm:
    """A norm of `x` whose last node is `last`."""

    last: ir.Node
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    epsilon: float


def skip_norm(model: ir.Model) -> Outcome:
    """Fuse every Add with the norm that reads it."""
    nodes = [node for node in model.graph if node.op_type in ("ReduceMean", "LayerNormalization")]
    return Outcome.of("skip norm", ((str(node.name), _rewrite(model.graph, node)) for node in nodes))


def _rewrite(graph: ir.Graph, node: ir.Node) -> str | None:
    """None when done, else why not."""
    norm = _rms_norm(node) if node.op_type == "ReduceMean" else _layer_norm(node)
    return "no norm of one activation" if norm is None else _fuse(graph, norm)


def _rms_norm(mean: ir.Node) -> _Norm | None:
    """The RMSNorm around a mean of squares over the last axis."""
    square = made_by(mean.inputs[0], "Pow")
    axes = mean.inputs[1] if len(mean.inputs) > 1 else None
    if square is None or scalar_of(square.inputs[1]) != 2 or scalar_of(axes) != -1:
        return None
    x, node = square.inputs[0], _only_reader(mean, "Add")
    epsilon = None if node is None else next((e for e in map(scalar_of, node.inputs) if e is not None), None)
    root = None if node is None else _only_reader(node, "Sqrt")
    inverse = None if root is None else _only_reader(root, "Div", "Reciprocal")
    scaled = None if inverse is None else _only_reader(inverse, "Mul")
    last = None if scaled is None else _only_reader(scaled, "Mul")
    if x is None or epsilon is None or last is None or scaled is None or x not in scaled.inputs:
        return None
    if inverse is not None and inverse.op_type == "Div" and scalar_of(inverse.inputs[0]) != 1:
        return None
    weight = next((value for value in last.inputs if value is not None and value.is_initializer()), None)
    return None if weight is None else _Norm(last, x, weight, None, epsilon)


def _layer_norm(node: ir.Node) -> _Norm | None:
    x, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if x is None or weight is None or node.attributes.get_int("axis", -1) not in (-1, 2):
        return None
    return _Norm(node, x, weight, bias, node.attributes.get_float("epsilon", 1e-5))


def _fuse(graph: ir.Graph, norm: _Norm) -> str | None:
    """None when done, else why not."""
    add = made_by(norm.x, "Add")
    if add is None:
        return "its input is no sum"
    if any(value is None or value.is_initializer() or value.shape is None for value in add.inputs):
        return "its input is a sum with a constant, or of unknown shape"
    if len({len(value.shape) for value in add.inputs if value is not None and value.shape is not None}) != 1:
        return "the parts of its sum differ in rank"
    rms = norm.last.op_type == "Mul"
    inputs = [*add.inputs, norm.weight, *([norm.bias] if norm.bias is not None else [])]
    fused = ir.node(
        "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization",
        inputs,
        {"epsilon": norm.epsilon},
        num_outputs=4,
        domain=CONTRIB,
        name=norm.last.name,
    )
    for made, replaced in ((fused.outputs[0], norm.last.outputs[0]), (fused.outputs[3], add.outputs[0])):
        made.shape, made.type = replaced.shape, replaced.type
    for unread in fused.outputs[1:3]:
        unread.name = ""
    graph.insert_after(add, fused)
    ir.convenience.replace_all_uses_with(norm.last.outputs[0], fused.outputs[0])
    ir.convenience.replace_all_uses_with(add.outputs[0], fused.outputs[3])
    return None


def _only_reader(node: ir.Node, *operators: str) -> ir.Node | None:
    readers = readers_of(node.outputs[0])
    return readers[0] if len(readers) == 1 and readers[0].op_type in operators else None
