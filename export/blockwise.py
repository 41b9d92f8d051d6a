"""Weights in blocks with one scale each: choose codes, pack them as onnxruntime's MatMulNBits reads them, and unpack.

A weight [K, N] (y = x W) is stored per output n: codes of K inputs, `block_size` of them to a scale.

    packed       uint8   [N, n_blocks, block_size * bits / 8]   int4: two to a byte, the lower k in the low nibble
    scales       float32 [N, n_blocks]
    zero_points  uint8   [N, ceil(n_blocks * bits / 8)]         absent when symmetric: then 8 (int4) or 128 (int8)

    value = (code - zero_point) * scale, one float32 product; K is padded with zeros to whole blocks.

int4 codes are onnxruntime's own: the entry of largest magnitude in a block becomes -8 (so [-4, 2] has scale 0.5 and codes
0, 12). int8 has one scale per output, max|w| / 127, rounded half to even (so [-127, 64.5] has scale 1 and codes 1, 192);
the scale is repeated for each block, which is what lets the same kernel multiply it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class BlockWeight:
    """A quantized [K, N] weight. Shapes: see the module's docstring."""

    packed: U8
    scales: F32
    zero_points: U8 | None
    bits: int
    block_size: int
    inputs: int
    """K before padding."""

    @property
    def outputs(self) -> int:
        """N."""
        return len(self.packed)


def quantize_int4(weight: F32, block_size: int, symmetric: bool) -> BlockWeight:
    """Quantize float32 [K, N] to 4 bits with onnxruntime's round-to-nearest quantizer."""
    config_class, quantizer_class = _onnxruntime_quantizer()
    quantizer = quantizer_class(config_class(block_size=block_size, is_symmetric=symmetric, bits=4))
    packed, scales, zero_points = quantizer.qbits_block_quant(np.ascontiguousarray(weight))
    return BlockWeight(packed, scales, None if symmetric else zero_points, 4, block_size, weight.shape[0])


def quantize_int8(weight: F32, block_size: int) -> BlockWeight:
    """Quantize float32 [K, N] to symmetric 8 bits with one scale per output."""
    scale = np.abs(weight).max(axis=0) / np.float32(127)
    divisor = np.where(scale > 0, scale, np.float32(1))
    return int8_blocks(np.clip(np.rint(weight / divisor), -127, 127).astype(np.int8).T, scale, block_size)


def dequantize(weight: BlockWeight) -> F32:
    """The float32 [K, N] that the codes stand for, bit for bit what onnxruntime multiplies (-0 may be +0 there)."""
    codes, zero = codes_of(weight)
    block_of = np.arange(weight.inputs) // weight.block_size
    values: F32 = (codes - zero[:, block_of]).astype(np.float32) * weight.scales[:, block_of]
    return np.ascontiguousarray(values.T)


def codes_of(weight: BlockWeight) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16]]:
    """Codes [N, K] without padding, and the zero point of each block [N, n_blocks]."""
    outputs, n_blocks = weight.scales.shape
    codes = _unpack(weight.packed.reshape(outputs, -1), weight.bits)[:, : weight.inputs]
    if weight.zero_points is None:
        return codes, np.full((outputs, n_blocks), 1 << (weight.bits - 1), np.int16)
    return codes, _unpack(weight.zero_points, weight.bits)[:, :n_blocks]


def int8_blocks(codes: npt.NDArray[np.int8], scales: F32, block_size: int) -> BlockWeight:
    """Symmetric 8-bit codes [N, K] with one scale per output [N] in the layout of the block kernels."""
    outputs, inputs = codes.shape
    n_blocks = -(-inputs // block_size)
    packed = np.full((outputs, n_blocks * block_size), 128, np.uint8)
    packed[:, :inputs] = codes.astype(np.int16) + 128
    repeated = np.repeat(scales[:, None], n_blocks, axis=1)
    return BlockWeight(packed.reshape(outputs, n_blocks, block_size), repeated, None, 8, block_size, inputs)


def sqnr_db(signal: npt.NDArray[np.floating[Any]], approximation: npt.NDArray[np.floating[Any]]) -> float | None:
    """Signal to quantization noise, 10 log10(sum s^2 / sum (s - a)^2) in dB; None when they are equal."""
    exact = signal.astype(np.float64)
    return decibels(float(np.square(exact).sum()), float(np.square(exact - approximation).sum()))


def decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise) of two powers; None without noise."""
    if noise == 0:
        return None
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _unpack(packed: U8, bits: int) -> npt.NDArray[np.int16]:
    """uint8 [rows, bytes] -> codes int16 [rows, bytes * 8 / bits]."""
    if bits == 8:
        return packed.astype(np.int16)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1).astype(np.int16)


def _onnxruntime_quantizer() -> tuple[Any, Any]:
    """(config class, quantizer class). Importing their module gives the root logger a handler, which is taken back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer as module

    root.handlers[:], root.level = handlers, level
    return module.DefaultWeightOnlyQuantConfig, module.DefaultWeightOnlyQuantizer
