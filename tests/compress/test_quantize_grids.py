"""Every grid against the library that defines its bytes, bit for bit, and against integers computed by hand."""

from __future__ import annotations

import bitsandbytes  # noqa: F401  (registers its operators)
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgestill.compress.quantize.grids import Grid, Scales, grid_of
from edgestill.export.blockwise import dequantize, quantize_int4

BLOCK = 32
FLOATS = st.floats(-(2.0**99), 2.0**99, width=32)


def awkward() -> Tensor:
    """float32 [12, 96]: random blocks, zeros, both ends equal, whole numbers, halves between codes, huge, tiny and lonely ones."""
    w = torch.randn(12, 96, generator=torch.Generator().manual_seed(0))
    w[1] = 0
    w[2] = torch.arange(96) % 2 * 2 - 1.0
    w[3, :32] = torch.arange(32) - 16.0
    w[4, :32] = (torch.arange(32) - 8) * 0.5
    w[5] *= 1e30
    w[6] *= 1e-30
    w[7] = 0
    w[7, 5] = 3.0
    w[8] = -w[8].abs()
    w[9] = 1e-42
    w[10, :3] = torch.tensor([1.0, -1.0, 0.5])
    return w


def on_thresholds(scheme: str) -> Tensor:
    """float32 [3, 32]: blocks of largest magnitude 1 whose weights lie exactly on each midpoint, just below, and just above."""
    from bitsandbytes.functional import get_4bit_type

    table = get_4bit_type(scheme, device="cpu").sort().values
    middle = (table[:-1] + table[1:]) / 2
    rows = []
    for at in (middle, torch.nextafter(middle, torch.tensor(-2.0)), torch.nextafter(middle, torch.tensor(2.0))):
        rows.append(torch.cat([at, torch.ones(1), -at, -torch.ones(1)]))
    return torch.stack(rows)


def rounded(grid: Grid, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(values on the grid, arrays that ship); both say the same."""
    scales = grid.scales(weight)
    values, arrays = grid.values(weight, scales), grid.encode(weight, scales)
    assert torch.equal(values, grid.decode(arrays, (weight.shape[0], weight.shape[1])))
    return values, arrays


# the authorities


def assert_bitsandbytes_agrees(scheme: str, block_size: int, weight: Tensor) -> None:
    values, arrays = rounded(grid_of(scheme, block_size), weight)  # type: ignore[arg-type]
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weight, block_size, scheme, torch.uint8)
    theirs = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax, block_size, scheme, weight.shape, torch.float32
    )
    assert torch.equal(packed.flatten(), arrays["codes"])
    assert torch.equal(absmax, arrays["scales"])
    assert torch.equal(theirs, values)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_tables_equal_bitsandbytes_on_awkward_blocks(scheme: str) -> None:
    assert_bitsandbytes_agrees(scheme, BLOCK, awkward())
    assert_bitsandbytes_agrees(scheme, BLOCK, on_thresholds(scheme))
    assert_bitsandbytes_agrees(scheme, 64, torch.randn(64, 128, generator=torch.Generator().manual_seed(1)))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["nf4", "fp4"]), st.lists(FLOATS, min_size=BLOCK, max_size=BLOCK))
def test_tables_equal_bitsandbytes_on_any_block(scheme: str, block: list[float]) -> None:
    assert_bitsandbytes_agrees(scheme, BLOCK, torch.tensor([block], dtype=torch.float32))


def assert_onnxruntime_agrees(weight: Tensor, block_size: int, symmetric: bool) -> None:
    values, arrays = rounded(grid_of("int4", block_size, symmetric), weight)
    theirs = quantize_int4(np.ascontiguousarray(weight.T.numpy()), block_size, symmetric)
    np.testing.assert_array_equal(theirs.packed, arrays["codes"].numpy())
    np.testing.assert_array_equal(theirs.scales, arrays["scales"].numpy())
    if theirs.zero_points is not None:
        np.testing.assert_array_equal(theirs.zero_points, arrays["zero_points"].numpy())
    np.testing.assert_array_equal(dequantize(theirs).T, values.numpy())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_int4_equals_onnxruntime_on_awkward_blocks(block_size: int, symmetric: bool) -> None:
    """96 inputs: blocks of 64 and 128 end in padding."""
    assert_onnxruntime_agrees(awkward(), block_size, symmetric)


@settings(deadline=None, max_examples=60)
@given(st.booleans(), st.lists(FLOATS, min_size=BLOCK, max_size=BLOCK))
def test_int4_equals_onnxruntime_on_any_block(symmetric: bool, block: list[float]) -> None:
    assert_onnxruntime_agrees(torch.tensor([block], dtype=torch.float32), BLOCK, symmetric)


def onnx_int8(weight: Tensor, scale: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(codes, values) of ONNX's own reference QuantizeLinear and DequantizeLinear, per row."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s"], ["q"], axis=0, output_dtype=TensorProto.INT8),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "int8",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("w", "s")],
        [
            helper.make_tensor_value_info("q", TensorProto.INT8, None),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    codes, values = ReferenceEvaluator(model).run(None, {"w": weight.numpy(), "s": scale.numpy()})
    return codes, values


def test_int8_equals_onnx() -> None:
    weight = awkward()[[i for i in range(12) if i != 1]]  # a row of zeros has scale 0, by which ONNX divides
    values, arrays = rounded(grid_of("int8", 0), weight)
    codes, theirs = onnx_int8(weight, arrays["scales"])
    np.testing.assert_array_equal(codes, arrays["codes"].numpy())
    np.testing.assert_array_equal(theirs, values.numpy())
    values, arrays = rounded(grid_of("int8", 0), torch.zeros(2, 8))
    assert not values.any() and not arrays["codes"].any()


# by hand


def test_int4_by_hand() -> None:
    block = torch.zeros(1, 16)
    block[0, :6] = torch.tensor(
        [-4.0, 2.0, 0.25, -0.25, 0.75, 4.0]
    )  # scale 0.5: codes 0, 12, 8.5 -> 9, 7.5 -> 8, 9.5 -> 10, 16 -> 15
    values, arrays = rounded(grid_of("int4", 16), block)
    assert arrays["scales"].tolist() == [[0.5]]
    assert arrays["codes"][0, 0, :3].tolist() == [0 | 12 << 4, 9 | 8 << 4, 10 | 15 << 4]
    assert values[0, :6].tolist() == [-4.0, 2.0, 0.5, 0.0, 1.0, 3.5]


def test_int4_with_zero_point_by_hand() -> None:
    block = torch.zeros(1, 16)
    block[0, :3] = torch.tensor([-1.0, 14.0, 6.5])  # scale 1, zero point 1
    values, arrays = rounded(grid_of("int4", 16, symmetric=False), block)
    assert (arrays["scales"].tolist(), arrays["zero_points"].tolist()) == ([[1.0]], [[1 | 8 << 4]])
    assert values[0, :4].tolist() == [-1.0, 14.0, 7.0, 0.0]


def test_int8_by_hand() -> None:
    values, arrays = rounded(grid_of("int8", 0), torch.tensor([[-127.0, 64.5, 63.5, 0.4]]))
    assert arrays["scales"].tolist() == [1.0]
    assert arrays["codes"].tolist() == [[-127, 64, 64, 0]]  # halves go to even
    assert values.tolist() == [[-127.0, 64.0, 64.0, 0.0]]


def test_nf4_by_hand() -> None:
    block = torch.zeros(1, 32)
    block[0, :3] = torch.tensor([2.0, -2.0, 0.16])  # 0.16 / 2 = 0.08 is code 8, the first above zero
    values, arrays = rounded(grid_of("nf4", 32), block)
    assert arrays["scales"].tolist() == [2.0]
    assert arrays["codes"][:2].tolist() == [15 << 4 | 0, 8 << 4 | 7]
    assert values[0, :4].tolist() == pytest.approx([2.0, -2.0, 0.15916, 0.0], abs=1e-5)


# frozen scales


@pytest.mark.parametrize("scheme", ["int4", "int8", "nf4", "fp4"])
def test_frozen_scales_clip_what_lies_beyond(scheme: str) -> None:
    grid, small = grid_of(scheme, BLOCK), torch.randn(4, 64, generator=torch.Generator().manual_seed(2))  # type: ignore[arg-type]
    scales = grid.scales(small)
    values = grid.values(3 * small, scales)
    assert torch.equal(values, grid.decode(grid.encode(3 * small, scales), (4, 64)))
    ends = grid.values(1e6 * torch.sign(small), scales)
    assert (values.abs() <= ends.abs() + 1e-6).all()
    assert torch.equal(grid.values(values, scales), values)  # what lies on the grid stays


def test_a_width_that_blocks_do_not_divide_is_refused_and_the_refusal_is_needed() -> None:
    """bitsandbytes on a CPU with AVX-512: rows of 96 in blocks of 64 get the scales of others. Elsewhere it is right."""
    grid = grid_of("nf4", 64)
    why = grid.unfit(96)
    assert why is not None and "96 inputs are no multiple of the block of 64" in why
    assert grid.unfit(128) is None and grid_of("int4", 64).unfit(96) is None
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(3))
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weight, 64, "nf4", torch.uint8)
    theirs = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, 64, "nf4", weight.shape, torch.float32)
    ours = grid.values(weight.view(12, 64), Scales(absmax.view(12, 1))).view(8, 96)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert (theirs - ours).abs().max() > 1
    else:
        assert torch.equal(theirs, ours)
