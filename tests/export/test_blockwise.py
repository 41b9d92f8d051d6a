"""Codes, scales and packing against an independent quantizer, against integers worked by hand, and against the operators."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from export_helpers import F32, rtn4, rtn8
from onnx import TensorProto, helper, numpy_helper

from edgestill.export.blockwise import BlockWeight, decibels, dequantize, quantize_int4, quantize_int8, sqnr_db


def _weight(inputs: int, outputs: int, seed: int = 0) -> F32:
    """Normal values with a zero column, a column of one sign, an outlier, and values of very different size."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((inputs, outputs)).astype(np.float32)
    weight[:, 0] = 0
    weight[:, 1] = np.abs(weight[:, 1])
    weight[3, 2] = 40
    weight[:, 3] *= np.float32(1e-20)
    return weight


def _product(block: BlockWeight, accuracy_level: int = 0) -> F32:
    """MatMulNBits(identity, weight): what onnxruntime takes the weight for, as no sum has two terms."""
    constants = [numpy_helper.from_array(block.packed, "b"), numpy_helper.from_array(block.scales, "s")]
    if block.zero_points is not None:
        constants.append(numpy_helper.from_array(block.zero_points, "z"))
    node = helper.make_node(
        "MatMulNBits",
        ["x", *(c.name for c in constants)],
        ["y"],
        domain="com.microsoft",
        K=block.inputs,
        N=block.outputs,
        bits=block.bits,
        block_size=block.block_size,
        accuracy_level=accuracy_level,
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", block.inputs])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [x], [y], constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: F32 = session.run(None, {"x": np.eye(block.inputs, dtype=np.float32)})[0]
    return result


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "block"), [(64, 32), (64, 16), (128, 128), (48, 32), (100, 64), (7, 16)])
def test_int4_is_round_to_nearest(inputs: int, block: int, symmetric: bool) -> None:
    weight = _weight(inputs, 9)
    ours = dequantize(quantize_int4(weight, block, symmetric))
    assert np.array_equal(ours, rtn4(weight, block, symmetric))


@pytest.mark.parametrize(("inputs", "block"), [(64, 32), (48, 32), (100, 16), (100, 256)])
def test_int8_is_round_to_nearest_with_one_scale_per_output(inputs: int, block: int) -> None:
    weight = _weight(inputs, 9)
    quantized = quantize_int8(weight, block)
    assert np.array_equal(dequantize(quantized), rtn8(weight))
    assert (quantized.scales == quantized.scales[:, :1]).all()


def test_int4_by_hand() -> None:
    weight = np.zeros((16, 1), np.float32)
    weight[:4, 0] = [-4, 2, 0.25, -0.2]
    block = quantize_int4(weight, 16, symmetric=True)
    assert block.scales.tolist() == [[0.5]]
    # -4 / 0.5 + 8 = 0, 2 / 0.5 + 8 = 12, 0.5 + 8 rounds away from zero to 9, -0.4 + 8 to 8; the lower k in the low nibble
    assert block.packed.ravel()[:3].tolist() == [0 | 12 << 4, 9 | 8 << 4, 8 | 8 << 4]
    assert dequantize(block).ravel()[:4].tolist() == [-4, 2, 0.5, 0]


def test_int8_by_hand() -> None:
    weight = np.zeros((16, 2), np.float32)
    weight[:4, 0] = [-127, 64.5, 65.5, 1.4]
    block = quantize_int8(weight, 16)
    assert block.scales.tolist() == [[1], [0]]
    assert block.packed[0].ravel()[:5].tolist() == [1, 192, 194, 129, 128]  # 64.5 and 65.5 go to the even neighbour
    assert (block.packed[1] == 128).all()
    assert dequantize(block)[:, 1].tolist() == [0] * 16


@pytest.mark.parametrize(
    "block",
    [
        quantize_int4(_weight(64, 10), 32, symmetric=True),
        quantize_int4(_weight(64, 10), 32, symmetric=False),
        quantize_int4(_weight(48, 10), 32, symmetric=True),
        quantize_int8(_weight(64, 10), 32),
        quantize_int8(_weight(100, 10), 64),
    ],
    ids=["int4", "int4 asymmetric", "int4 padded", "int8", "int8 padded"],
)
def test_onnxruntime_multiplies_exactly_the_dequantized_weight(block: BlockWeight) -> None:
    assert np.array_equal(_product(block), dequantize(block))


def test_a_weight_on_the_grid_stays_as_it_is() -> None:
    once = dequantize(quantize_int4(_weight(64, 9), 32, symmetric=True))
    assert np.array_equal(dequantize(quantize_int4(once, 32, symmetric=True)), once)


def test_sqnr() -> None:
    signal = np.array([3.0, 4.0])
    assert sqnr_db(signal, signal) is None
    assert sqnr_db(signal, np.array([3.3, 4.4])) == pytest.approx(20)
    assert decibels(0.0, 1.0) == -np.inf


def test_the_quantizer_leaves_the_root_logger_alone() -> None:
    script = (
        "import logging, numpy as np; from edgestill.export.blockwise import quantize_int4\n"
        "quantize_int4(np.ones((32, 2), np.float32), 32, True)\n"
        "assert (logging.getLogger().handlers, logging.getLogger().level) == ([], logging.WARNING)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
