"""Weights in fp8 (E4M3) with one scale per output channel, dequantized before a 16-bit product.

Activations stay in 16 bits: half the bytes of float16 ship, and an engine that keeps them reads half as many; it does not multiply
in 8 bits (runtime/engines/capabilities.py says what each TensorRT promises).

    w' = code * scale,  scale = max |w| / 448,  code = the nearest of the 253 finite E4M3 values (ties to even)

E4M3 is OCP's 8-bit float with 3 bits of mantissa, 448 the largest value (https://arxiv.org/abs/2209.05433, table 1); ONNX calls
it FLOAT8E4M3FN.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgestill.export.nodes import add_constant

F32 = npt.NDArray[np.float32]
LARGEST = 448.0
E4M3 = ml_dtypes.float8_e4m3fn


@dataclass(frozen=True)
class Fp8Weight:
    """Codes [K, N] and scales float32 [N] of y = x W."""

    codes: npt.NDArray[np.generic]
    scales: F32

    @property
    def inputs(self) -> int:
        """K."""
        return int(self.codes.shape[0])

    @property
    def outputs(self) -> int:
        """N."""
        return int(self.codes.shape[1])

    def values(self) -> F32:
        """float32 [K, N] that ships."""
        found: F32 = self.codes.astype(np.float32) * self.scales
        return found


def quantize_fp8(weight: F32) -> Fp8Weight:
    """float32 [K, N] rounded to nearest. A channel of zeros has scale 0."""
    scales = (np.abs(weight).max(axis=0) / np.float32(LARGEST)).astype(np.float32)
    safe = np.where(scales > 0, scales, np.float32(1))
    # E4M3 has no infinity: what rounding of the quotient leaves above 448 would become NaN
    codes = np.clip(weight / safe, -LARGEST, LARGEST).astype(E4M3)
    return Fp8Weight(codes, scales)


def fp8_constants(graph: ir.Graph, prefix: str, weight: Fp8Weight) -> list[ir.Value]:
    """Initializers of codes and scales."""
    codes = ir.Tensor(np.ascontiguousarray(weight.codes), dtype=ir.DataType.FLOAT8E4M3FN, name=f"{prefix}_codes")
    value = ir.Value(name=codes.name, shape=codes.shape, type=ir.TensorType(codes.dtype), const_value=codes)
    graph.register_initializer(value)
    return [value, add_constant(graph, f"{prefix}_scales", weight.scales)]


def fp8_product(x: ir.Value, constants: list[ir.Value], name: str) -> tuple[ir.Node, ...]:
    """DequantizeLinear and the product that reads it."""
    weight = ir.node("DequantizeLinear", constants, {"axis": 1}, name=f"{name}_weight")
    return weight, ir.node("MatMul", [x, weight.outputs[0]], name=name)
