"""nf4 and fp4 of bitsandbytes, which define the bytes, beside onnxruntime's own quantizer: where they differ, and nowhere else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from onnxruntime.capi._pybind_state import quantize_matmul_bnb4
from torch import Tensor

from edgestill.export.tables import QUANT_TYPES, TableScheme, TableWeight, quantize_table

BLOCK = 64
DIFFERENT: dict[TableScheme, dict[int, tuple[int, ...]]] = {
    "nf4": {0: (0,), 8: (1,), 12: (0,), 14: (0,)},
    "fp4": {
        1: tuple(range(1, 6)),
        2: (0,),
        5: (0,),
        6: tuple(range(-14, 1)),
        8: tuple(range(1, 15)),
        10: (0,),
        11: (0,),
        13: tuple(range(-5, 1)),
        14: (0,),
    },
}
"""Midpoint (counted from the lowest) -> distances from it, in float32 steps, at which the two choose neighbouring values:
onnxruntime writes its thresholds with fewer digits, and takes some of them for the other side."""
REACH = 20


def theirs(weight: Tensor, scheme: TableScheme) -> TableWeight:
    """onnxruntime's quantizer on float32 [N, K]."""
    rows, columns = weight.shape
    packed = np.zeros((weight.numel() + 1) // 2, np.uint8)
    scales = np.zeros(weight.numel() // BLOCK, np.float32)
    quantize_matmul_bnb4(packed, weight.numpy(), scales, BLOCK, QUANT_TYPES[scheme], rows, columns)
    return TableWeight(packed, scales, scheme, BLOCK, columns, rows)


def ours(weight: Tensor, scheme: TableScheme) -> TableWeight:
    return quantize_table(np.ascontiguousarray(weight.numpy().T), scheme, BLOCK)


def around_midpoints(scheme: TableScheme) -> Tensor:
    """float32 [15, 64]: each row the neighbours of one midpoint, and a 1 that makes the scale 1."""
    from bitsandbytes.functional import get_4bit_type

    table = get_4bit_type(scheme, device="cpu").sort().values
    rows = torch.zeros(15, BLOCK)
    rows[:, -1] = 1
    for i, middle in enumerate((table[:-1] + table[1:]) / 2):
        for column, steps in enumerate(range(-REACH, REACH + 1)):
            x = middle.clone()
            for _ in range(abs(steps)):
                x = torch.nextafter(x, torch.tensor(9.0 if steps > 0 else -9.0))
            rows[i, column] = x
    return rows


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_they_differ_by_one_value_at_the_named_places_only(scheme: TableScheme) -> None:
    weight = around_midpoints(scheme)
    one, other = ours(weight, scheme).values(), theirs(weight, scheme).values()
    differ: npt.NDArray[np.bool_] = one != other
    found = {
        int(i): tuple(int(k) - REACH for k in np.flatnonzero(differ[:, i])) for i in range(15) if differ[:, i].any()
    }
    assert found == DIFFERENT[scheme]


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_elsewhere_they_agree(scheme: TableScheme) -> None:
    """Values; of bytes, fp4's two zeros are swapped. Zero blocks and blocks of one huge or tiny entry among them."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weight[3], weight[4], weight[5] = 0, 0, 0
    weight[4, 7], weight[5, 9] = 1e30, 1e-30
    one, other = ours(weight, scheme), theirs(weight, scheme)
    np.testing.assert_array_equal(one.values(), other.values())
    np.testing.assert_array_equal(one.scales, other.scales)
    if scheme == "nf4":
        np.testing.assert_array_equal(one.packed, other.packed)


def test_denormal_blocks_are_bitsandbytes_own() -> None:
    """It divides by no less than 1e-38; onnxruntime divides by the block's own scale."""
    weight = torch.full((1, BLOCK), 1e-42)
    weight[0, ::2] = -1e-42
    assert np.abs(theirs(weight, "nf4").values()).max() > np.abs(ours(weight, "nf4").values()).max()
