"""Which nodes are found to hold weights, and the reason for each that cannot be quantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgestill.export.linear_layers import Linear, Table, Unfit, Weight, find_weights
from edgestill.export.quantize import quantize_graph
from edgestill.profiles.schema import PrecisionSpec

W = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)


def _model(nodes: list[onnx.NodeProto], **constants: np.ndarray) -> onnx.ModelProto:  # type: ignore[type-arg]
    """A graph from x float [n, 64], t float [n, 32] and input_ids, position_ids int64 [n] to y."""
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name, width in (("x", 64), ("t", 32))
    ]
    inputs += [helper.make_tensor_value_info(name, TensorProto.INT64, ["n"]) for name in ("input_ids", "position_ids")]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])
    graph = helper.make_graph(nodes, "g", inputs, [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def _find(nodes: list[onnx.NodeProto], **constants: np.ndarray) -> Weight:  # type: ignore[type-arg]
    (weight,) = find_weights(ir.from_proto(_model(nodes, **constants)).graph)
    return weight


def test_matmul_through_identity() -> None:
    nodes = [helper.make_node("Identity", ["w"], ["same"]), helper.make_node("MatMul", ["x", "same"], ["y"])]
    found = _find(nodes, w=W)
    assert isinstance(found, Linear)
    assert (found.weight.name, found.transposed, found.bias) == ("w", False, None)


def test_tied_head_through_transpose() -> None:
    nodes = [helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]), helper.make_node("MatMul", ["t", "wt"], ["y"])]
    found = _find(nodes, w=W)
    assert isinstance(found, Linear)
    assert found.transposed


@pytest.mark.parametrize(("transB", "transposed"), [(0, False), (1, True)])
def test_gemm(transB: int, transposed: bool) -> None:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=transB)
    found = _find([node], w=W.T.copy() if transB else W, b=W[0])
    assert isinstance(found, Linear)
    assert found.transposed is transposed
    assert found.bias is not None
    assert found.bias.name == "b"


def test_embedding_behind_a_reshape_of_the_ids() -> None:
    nodes = [
        helper.make_node("Reshape", ["input_ids", "shape"], ["ids"]),
        helper.make_node("Gather", ["w", "ids"], ["y"]),
    ]
    assert isinstance(_find(nodes, w=W, shape=np.array([-1])), Table)


@pytest.mark.parametrize(
    ("node", "weight", "reason"),
    [
        (helper.make_node("Gather", ["w", "position_ids"], ["y"]), W, "table of positions"),
        (helper.make_node("Gather", ["w", "input_ids"], ["y"], axis=1), W, "not rows of a matrix"),
        (helper.make_node("MatMul", ["w", "t"], ["y"]), W[:, :, None].transpose(2, 0, 1).copy(), "left factor"),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), np.stack([W, W]), "3 dimensions"),
        (helper.make_node("Gemm", ["x", "w"], ["y"], alpha=0.5), W, "alpha"),
        (helper.make_node("Gemm", ["t", "w"], ["y"], transA=1), W[:4], "transA"),
    ],
)
def test_what_cannot_be_quantized_carries_the_reason(node: onnx.NodeProto, weight: np.ndarray, reason: str) -> None:  # type: ignore[type-arg]
    found = _find([node], w=weight)
    assert isinstance(found, Unfit)
    assert reason in found.reason


def test_products_of_activations_and_integer_tables_are_no_weights() -> None:
    nodes = [
        helper.make_node("Transpose", ["t"], ["tt"]),
        helper.make_node("MatMul", ["tt", "x"], ["scores"]),
        helper.make_node("Gather", ["sizes", "input_ids"], ["picked"]),
        helper.make_node("Gather", ["vector", "input_ids"], ["y"]),
    ]
    model = _model(nodes, sizes=np.ones((2, 2), np.int64), vector=W[0])
    assert find_weights(ir.from_proto(model).graph) == []


@pytest.mark.parametrize("transB", [0, 1])
def test_gemm_computes_the_same_after_quantization(transB: int, tmp_path: Path) -> None:
    import onnxruntime

    grid = (np.random.default_rng(1).integers(-8, 8, W.shape) / 16).astype(np.float32)
    grid[0] = -0.5  # every block of a column needs its -8 for the grid to be kept
    grid[32] = -0.5
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="gemm", transB=transB)
    onnx.save(_model([node], w=grid.T.copy() if transB else grid, b=W[0]), tmp_path / "float.onnx")
    report = quantize_graph(tmp_path / "float.onnx", tmp_path / "int4.onnx", PrecisionSpec(accuracy_level=0))
    assert [(n.operator, n.shape, n.sqnr_db) for n in report.quantized] == [("Gemm", (64, 32), None)]
    feeds = {"x": W.T.copy(), "t": W, "input_ids": np.array([0]), "position_ids": np.array([0])}
    results = []
    for name in ("float.onnx", "int4.onnx"):
        session = onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"])
        results.append(session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})[0])
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-5)


def test_rows_of_half_a_byte_stay_float(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    onnx.save(_model([helper.make_node("Gather", ["w", "input_ids"], ["y"])], w=table), tmp_path / "float.onnx")
    report = quantize_graph(tmp_path / "float.onnx", tmp_path / "int4.onnx", PrecisionSpec())
    assert report.quantized == ()
    assert [node.reason for node in report.left_float] == ["a row of 5 x 4 bits is no whole number of bytes"]
