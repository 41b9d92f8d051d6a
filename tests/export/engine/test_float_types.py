"""Narrow floats: which nodes compute in which type, read from the graph, and numbers by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgestill.export.engine.float_types import narrow_floats
from edgestill.runtime.errors import BadInput

F32, I64 = TensorProto.FLOAT, TensorProto.INT64


def model(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], inputs: dict[str, tuple[int, list[int]]]
) -> ir.Model:
    values = [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in inputs.items()]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    output = helper.make_tensor_value_info("logits", F32, ["a", "b"])
    graph = helper.make_graph(nodes, "g", values, [output], initializers)
    return ir.serde.deserialize_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    )


def types(found: ir.Model) -> dict[str, str]:
    """Name of each node -> the type of its first output; the model must be valid ONNX of those types."""
    onnx.checker.check_model(ir.serde.serialize_model(found), full_check=True)
    return {str(node.name): node.outputs[0].dtype.name for node in found.graph if node.outputs[0].dtype is not None}


@pytest.mark.parametrize(("kind", "name"), [("float16", "FLOAT16"), ("bfloat16", "BFLOAT16")])
def test_a_norm_written_out_squares_in_float32(kind: str, name: str) -> None:
    """x / sqrt(mean(x^2) + eps) * w: from the square to the root in float32, the two products narrow."""
    found = model(
        [
            helper.make_node("Pow", ["x", "two"], ["square"], name="square"),
            helper.make_node("ReduceMean", ["square", "axis"], ["mean"], name="mean"),
            helper.make_node("Add", ["mean", "epsilon"], ["shifted"], name="shifted"),
            helper.make_node("Sqrt", ["shifted"], ["root"], name="root"),
            helper.make_node("Div", ["one", "root"], ["inverse"], name="inverse"),
            helper.make_node("Mul", ["x", "inverse"], ["normed"], name="normed"),
            helper.make_node("Mul", ["normed", "weight"], ["logits"], name="weighted"),
        ],
        {
            "two": np.array(2, np.float32),
            "axis": np.array([-1]),
            "epsilon": np.array(1e-6, np.float32),
            "one": np.array(1, np.float32),
            "weight": np.ones(4, np.float32),
        },
        {"x": (F32, [2, 4])},
    )
    narrow_floats(found, kind)  # type: ignore[arg-type]
    seen = types(found)
    assert {n: seen[n] for n in ("square", "mean", "shifted", "root", "inverse")} == dict.fromkeys(
        ("square", "mean", "shifted", "root", "inverse"), "FLOAT"
    )
    assert seen["normed"] == seen["weighted"] == name
    assert [v.dtype.name for v in found.graph.inputs if v.dtype] == [name]
    logits = found.graph.outputs[0]
    assert (logits.name, logits.dtype) == ("logits", ir.DataType.FLOAT)


def test_a_norm_that_would_overflow_in_float16_does_not() -> None:
    import onnxruntime

    found = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["wide"], name="product"),
            helper.make_node("RMSNormalization", ["wide", "scale"], ["logits"], name="norm", axis=-1),
        ],
        {"w": (1000 * np.eye(4)).astype(np.float32), "scale": np.ones(4, np.float32)},
        {"x": (F32, [1, 4])},
    )
    narrow_floats(found, "float16")
    assert types(found) | {} == {**types(found), "product": "FLOAT16", "norm": "FLOAT"}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    data = ir.serde.serialize_model(found).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": np.array([[1, -1, 1, 1]], np.float16)})[0]  # squares of 1000 are beyond 65,504
    np.testing.assert_allclose(got, [[1, -1, 1, 1]], atol=1e-3)


def test_integers_stay_and_scales_narrow() -> None:
    codes = np.arange(-8, 8, dtype=np.int8).reshape(8, 2)
    found = model(
        [
            helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], name="weight", axis=1),
            helper.make_node("MatMul", ["x", "weight"], ["logits"], name="product"),
        ],
        {"codes": codes, "scales": np.array([0.5, 0.25], np.float32)},
        {"x": (F32, [1, 8])},
    )
    narrow_floats(found, "float16")
    assert types(found)["weight"] == types(found)["product"] == "FLOAT16"
    constants = {
        name: value.const_value.numpy() for name, value in found.graph.initializers.items() if value.const_value
    }
    np.testing.assert_array_equal(constants["codes"], codes)
    assert constants["scales_narrow"].dtype == np.float16 and "scales" not in constants


def test_rotation_is_float32_only_where_bfloat16_would_spoil_the_angles() -> None:
    def graph() -> ir.Model:
        return model(
            [
                helper.make_node("RotaryEmbedding", ["x", "cos", "sin", "position_ids"], ["turned"], name="turned"),
                helper.make_node("Reshape", ["turned", "flat"], ["logits"], name="flat"),
            ],
            {
                "cos": np.ones((4, 2), np.float32),
                "sin": np.zeros((4, 2), np.float32),
                "flat": np.array([1, 12]),
            },
            {"x": (F32, [1, 1, 3, 4]), "position_ids": (I64, [1, 3])},
        )

    for kind, turned in (("float16", "FLOAT16"), ("bfloat16", "FLOAT")):
        found = graph()
        narrow_floats(found, kind)  # type: ignore[arg-type]
        assert types(found)["turned"] == turned


def test_a_weight_that_the_type_cannot_hold_is_named() -> None:
    def graph() -> ir.Model:
        return model(
            [helper.make_node("MatMul", ["x", "w"], ["logits"], name="product")],
            {"w": np.array([[1e6, 1.0]], np.float32)},
            {"x": (F32, [1, 1])},
        )

    with pytest.raises(BadInput, match=r"w_narrow holds 1e\+06, which float16 can't; use precision.weights: bfloat16"):
        narrow_floats(graph(), "float16")
    wide = graph()
    narrow_floats(wide, "bfloat16")
    held = next(v.const_value for n, v in wide.graph.initializers.items() if n == "w_narrow")
    assert held is not None and held.numpy().dtype == ml_dtypes.bfloat16
