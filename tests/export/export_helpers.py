"""What several export tests share: the type of the `exported` fixture, and a quantizer to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgestill.export.onnx_export import ExportedGraph

F32 = npt.NDArray[np.float32]
Export = Callable[[str], tuple[Path, ExportedGraph]]
"""family -> (checkpoint, its float32 export)."""


def rtn4(weight: F32, block: int, symmetric: bool) -> F32:
    """Round to nearest in blocks of each column, one scalar at a time: float32 throughout, half away from zero."""
    out = np.zeros_like(weight)
    one = np.float32(1)
    for n in range(weight.shape[1]):
        for k in range(0, weight.shape[0], block):
            values = weight[k : k + block, n]
            if symmetric:
                extreme = values[np.abs(values).argmax()]
                scale, zero = extreme / np.float32(-8), 8
            else:
                low, high = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
                scale = (high - low) / np.float32(15)
                zero = int(np.floor(np.float64(-low / scale) + 0.5)) if scale else 8
            inverse = one / scale if scale else np.float32(0)
            codes = np.floor((values * inverse + np.float32(zero)).astype(np.float64) + 0.5).clip(0, 15)
            out[k : k + block, n] = (codes.astype(np.float32) - np.float32(zero)) * scale
    return out


def rtn8(weight: F32) -> F32:
    """One scale per column, max|w| / 127, half to even."""
    out = np.zeros_like(weight)
    for n in range(weight.shape[1]):
        scale = np.abs(weight[:, n]).max() / np.float32(127)
        if scale:
            out[:, n] = np.round(weight[:, n] / scale) * scale
    return out
