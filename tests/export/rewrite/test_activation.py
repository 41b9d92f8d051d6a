"""Activations are recognised by what they compute, in any spelling, and nothing else is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgestill.export.rewrite.activation import activation

X = np.linspace(-6, 6, 64, dtype=np.float32)[None]


class Writer:
    """Writes a graph y = f(x) node by node."""

    def __init__(self) -> None:
        self.x = ir.Value(name="x", shape=ir.Shape([1, 64]), type=ir.TensorType(ir.DataType.FLOAT))
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def __call__(self, operator: str, *inputs: ir.Value | float) -> ir.Value:
        values = [value if isinstance(value, ir.Value) else self.constant(value) for value in inputs]
        self.nodes.append(ir.node(operator, values, name=f"{operator}_{len(self.nodes)}"))
        return self.nodes[-1].outputs[0]

    def constant(self, number: float | np.ndarray) -> ir.Value:
        name = f"c{len(self.constants)}"
        self.constants.append(ir.Value(name=name, const_value=ir.Tensor(np.asarray(number, np.float32), name=name)))
        return self.constants[-1]

    def model(self, y: ir.Value) -> ir.Model:
        y.name, y.shape, y.type = "y", ir.Shape([1, 64]), ir.TensorType(ir.DataType.FLOAT)
        opsets = {"": 18, "com.microsoft": 1}
        graph = ir.Graph([self.x], [y], nodes=self.nodes, initializers=self.constants, opset_imports=opsets, name="g")
        return ir.Model(graph, ir_version=9)


def silu(w: Writer, x: ir.Value) -> ir.Value:
    return w("Mul", x, w("Sigmoid", x))


def quick_gelu(w: Writer, x: ir.Value) -> ir.Value:
    return w("Mul", w("Sigmoid", w("Mul", x, 1.702)), x)


def gelu_by_erf(w: Writer, x: ir.Value) -> ir.Value:
    return w("Mul", w("Mul", x, w("Add", w("Erf", w("Div", x, math.sqrt(2))), 1.0)), 0.5)


def gelu_by_erf_halved_first(w: Writer, x: ir.Value) -> ir.Value:
    return w("Mul", w("Mul", x, 0.5), w("Add", 1.0, w("Erf", w("Mul", x, math.sqrt(0.5)))))


def gelu_tanh_with_pow(w: Writer, x: ir.Value) -> ir.Value:
    inner = w("Mul", w("Add", x, w("Mul", w("Pow", x, 3.0), 0.044715)), math.sqrt(2 / math.pi))
    return w("Mul", w("Mul", x, 0.5), w("Add", w("Tanh", inner), 1.0))


def gelu_tanh_with_products(w: Writer, x: ir.Value) -> ir.Value:
    inner = w("Mul", w("Mul", x, 0.79788456), w("Add", 1.0, w("Mul", w("Mul", x, 0.044715), x)))
    return w("Mul", w("Mul", x, 0.5), w("Add", 1.0, w("Tanh", inner)))


def run(model: ir.Model, folder: Path) -> np.ndarray:
    import onnxruntime

    ir.save(model, folder / "g.onnx")
    session = onnxruntime.InferenceSession(folder / "g.onnx", providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X})[0])


@pytest.mark.parametrize(
    ("spelling", "operator"),
    [
        (silu, "QuickGelu"),
        (quick_gelu, "QuickGelu"),
        (gelu_by_erf, "Gelu"),
        (gelu_by_erf_halved_first, "Gelu"),
        (gelu_tanh_with_pow, "FastGelu"),
        (gelu_tanh_with_products, "FastGelu"),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_every_spelling_becomes_its_operator(spelling: object, operator: str, biased: bool, tmp_path: Path) -> None:
    """`biased`: x is a sum itself, with a vector, as behind a linear layer with a bias."""
    writer = Writer()
    x = writer("Add", writer.x, writer.constant(np.ones(64))) if biased else writer.x
    model = writer.model(spelling(writer, x))  # type: ignore[operator]
    before = run(model, tmp_path)
    outcome = activation(model)
    assert (outcome.done, outcome.left) == (1, ())
    assert operator in [node.op_type for node in model.graph]
    np.testing.assert_allclose(run(model, tmp_path), before, rtol=0, atol=2e-6)


def test_what_only_looks_like_one_stays(tmp_path: Path) -> None:
    writer = Writer()
    shrunk = writer("Mul", writer.x, writer("Sigmoid", writer("Mul", writer.x, 1.5)))
    capped = writer("Mul", writer("Tanh", writer("Div", shrunk, 30.0)), 30.0)
    model = writer.model(capped)
    before = run(model, tmp_path)
    outcome = activation(model)
    assert outcome.done == 0
    assert len(outcome.left) == 2
    np.testing.assert_array_equal(run(model, tmp_path), before)
