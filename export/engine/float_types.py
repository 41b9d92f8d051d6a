"""A float32 graph in float16 or bfloat16, as strongly typed engines want it: types stand in the graph, and casts where they meet.

Weights, activations and the cache take the narrow type. What sums squares or takes roots stays in float32 (norms: a square above
65,504 is infinite in float16), and so do elementwise operators between such values. Scales of quantized weights become narrow:
their integers stay as they are. Logits come out in float32.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from edgestill.runtime.errors import BadInput

Narrow = Literal["float16", "bfloat16"]
TYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
WIDE_OPERATORS = frozenset(
    ("RMSNormalization", "LayerNormalization", "Pow", "ReduceMean", "ReduceSum", "ReduceL2", "Sqrt", "Exp", "Log")
)
"""Always computed in float32."""
ROTATES = "RotaryEmbedding"
"""In float32 where the narrow type is bfloat16, whose angles would have 8 bits."""
POINTWISE = frozenset(("Add", "Sub", "Mul", "Div", "Reciprocal", "Neg", "Identity"))
"""Computed in float32 where all that they read is."""


def narrow_floats(model: ir.Model, to: Narrow) -> None:
    """Rewrite `model` in place.

    Raises:
        BadInput: a control flow operator, whose body would have to be rewritten as well.
    """
    LiftConstantsToInitializersPass(lift_all_constants=True)(model)
    ShapeInferencePass()(model)
    _Narrowing(model, TYPES[to]).run()


class _Narrowing:
    def __init__(self, model: ir.Model, kind: ir.DataType) -> None:
        self._graph, self._kind = model.graph, kind
        self._wide_operators = WIDE_OPERATORS | ({ROTATES} if kind is ir.DataType.BFLOAT16 else set())
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for value in self._graph.inputs:
            if value.dtype is ir.DataType.FLOAT:
                value.dtype = self._kind
        for node in list(self._graph):
            if any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
                raise BadInput(
                    f"{node.op_type} {node.name!r} has a body of its own, which an engine's graph must not have"
                )
            self._type(node)
        for output in self._graph.outputs:
            if output.name == "logits":
                self._widen_output(output)
        for name in [n for n, value in self._graph.initializers.items() if not value.uses()]:
            del self._graph.initializers[name]

    def _type(self, node: ir.Node) -> None:
        """Decide the type that `node` computes in, and make its inputs so."""
        floats = [i for i, value in enumerate(node.inputs) if value is not None and self._is_float(value)]
        wide = self._is_wide(node, floats)
        wanted = ir.DataType.FLOAT if wide else self._kind
        for i in floats:
            value = node.inputs[i]
            assert value is not None
            if value.dtype is not wanted:
                node.replace_input_with(i, self._as(value, wanted, node))
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", self._kind)
        if node.op_type == "ConstantOfShape" and "value" in node.attributes:
            tensor = node.attributes["value"].as_tensor()
            if tensor.dtype is ir.DataType.FLOAT:
                node.attributes["value"] = ir.AttrTensor("value", self._tensor(tensor, str(tensor.name)))
        for value in node.outputs:
            if value.dtype is ir.DataType.FLOAT:
                value.dtype = wanted

    def _is_wide(self, node: ir.Node, floats: list[int]) -> bool:
        if node.op_type in self._wide_operators:
            return True
        made = [value for i in floats if (value := node.inputs[i]) is not None and not value.is_initializer()]
        return node.op_type in POINTWISE and bool(made) and all(value.dtype is ir.DataType.FLOAT for value in made)

    def _is_float(self, value: ir.Value) -> bool:
        return value.dtype in (ir.DataType.FLOAT, self._kind)

    def _as(self, value: ir.Value, wanted: ir.DataType, reader: ir.Node) -> ir.Value:
        """`value` in the type `wanted`: another initializer, or a cast that all readers share."""
        if (value, wanted) not in self._casts:
            suffix = "wide" if wanted is ir.DataType.FLOAT else "narrow"
            if value.const_value is not None and value.is_initializer():
                self._casts[value, wanted] = self._constant(value, f"{value.name}_{suffix}")
            else:
                cast = ir.node("Cast", [value], {"to": wanted.value}, name=f"{value.name}_{suffix}")
                cast.outputs[0].dtype, cast.outputs[0].shape = wanted, value.shape
                maker = value.producer()
                if maker is None:
                    self._graph.insert_before(reader, cast)
                else:
                    self._graph.insert_after(maker, cast)
                self._casts[value, wanted] = cast.outputs[0]
        return self._casts[value, wanted]

    def _constant(self, value: ir.Value, name: str) -> ir.Value:
        assert value.const_value is not None
        tensor = self._tensor(value.const_value, name)
        made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(made)
        return made

    def _tensor(self, tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
        """`tensor` in the narrow type.

        Raises:
            BadInput: a value that the narrow type can't hold.
        """
        import numpy as np

        array = tensor.numpy()
        with np.errstate(over="ignore"):
            narrow = array.astype(self._kind.numpy())
        if not np.isfinite(narrow.astype(np.float32)).all():
            worst = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
            raise BadInput(f"{name} holds {worst:g}, which {self._kind.numpy()} can't; use precision.weights: bfloat16")
        return ir.Tensor(narrow, dtype=self._kind, name=name)

    def _widen_output(self, output: ir.Value) -> None:
        node = output.producer()
        assert node is not None
        cast = ir.node("Cast", [output], {"to": ir.DataType.FLOAT.value}, name="logits_float32")
        made = cast.outputs[0]
        made.dtype, made.shape = ir.DataType.FLOAT, output.shape
        self._graph.insert_after(node, cast)
        self._graph.outputs[list(self._graph.outputs).index(output)] = made
        output.name, made.name = "logits_narrow", "logits"
