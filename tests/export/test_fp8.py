"""E4M3 weights: integers by hand, the nearest value on a grid, and no NaN at the edge."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.export.fp8 import quantize_fp8

GRID = np.unique(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64))
GRID = GRID[np.isfinite(GRID)]


def test_by_hand() -> None:
    weight = np.array([[448.0, 0.0], [-1.0, 0.0], [17.0, 0.0]], np.float32)  # E4M3 has 16 and 18, and ties go to even
    found = quantize_fp8(weight)
    np.testing.assert_array_equal(found.scales, np.array([1.0, 0.0], np.float32))
    np.testing.assert_array_equal(found.values(), [[448.0, 0.0], [-1.0, 0.0], [16.0, 0.0]])
    assert (found.inputs, found.outputs) == (3, 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1.0, 3e4]))
def test_every_weight_goes_to_the_nearest_value(seed: int, size: float) -> None:
    weight = (np.random.default_rng(seed).standard_normal((16, 3)) * size).astype(np.float32)
    found = quantize_fp8(weight)
    codes = found.codes.astype(np.float64)
    assert np.isfinite(codes).all() and (np.abs(codes).max(axis=0) == 448).all()
    wanted = weight.astype(np.float64) / found.scales
    nearest = np.abs(wanted[..., None] - GRID).min(axis=-1)
    assert (np.abs(wanted - codes) <= nearest * (1 + 1e-6) + 1e-5).all()
