"""Grids of weights, one per scheme: scales of a weight, its nearest values on the grid, and the bytes that say them.

A weight is [N, K] (y = x W', as torch stores it); blocks are `block_size` consecutive inputs k of one output.

    scheme     value                         scale of a block                    nearest code
    int4       (code - 8) s                  largest by magnitude / -8           floor(w / s + 8 + 1/2), half away from zero
    int4 asym  (code - z) s                  (max - min) / 15, both with 0       the same with z = round(-min / s)
    int8       code s, one s per output      max |w| / 127                       round half to even of w / s
    nf4, fp4   table[code] s                 max |w|                             number of midpoints below w (1 / s)

One library defines the bytes of each, and tests hold these formulas to it bit for bit: onnxruntime's MatMulNBits quantizer
(onnxruntime/core/mlas/lib/q4_dq.cpp) for int4, ONNX's QuantizeLinear for int8, bitsandbytes on a CPU for nf4 and fp4
(bitsandbytes/backends/default/ops.py). They are written again in torch because training needs them on any device, with scales that
may be frozen, and without the binary search that makes bitsandbytes' own rounding slower than the rest of a step.

Arrays that ship (`encode`):

    int4       codes uint8 [N, blocks, block_size / 2], the lower k in the low nibble; scales float32 [N, blocks];
               zero_points uint8 [N, ceil(blocks / 2)] when asymmetric
    int8       codes int8 [N, K]; scales float32 [N]
    nf4, fp4   codes uint8 [N K / 2], the lower k in the high nibble; scales float32 [N K / block_size]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from edgestill.compress.quantize.table_search import look_up, table_of
from edgestill.profiles.quantize_words import Scheme

SMALLEST_ABSMAX = 1e-38
"""bitsandbytes divides by no less."""
CPU_PIECE = 1 << 18
"""Weights at a time, so that the passes over them stay in a core's cache."""


@dataclass(frozen=True)
class Scales:
    """What the codes of a weight [N, K] refer to: float32 [N, blocks] (int8: [N, 1]); zero points likewise, whole numbers."""

    scale: Tensor
    zero_point: Tensor | None = None


class Grid(ABC):
    """One scheme with its block size."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    @abstractmethod
    def scales(self, weight: Tensor) -> Scales:
        """Of float32 [N, K]."""

    def values(self, weight: Tensor, scales: Scales) -> Tensor:
        """The nearest values on the grid, float32 [N, K]: bit for bit what the shipped codes stand for (but for -0)."""
        if weight.device.type != "cpu":
            return self._values(weight, scales)
        found, rows = torch.empty_like(weight), max(1, CPU_PIECE // max(weight.shape[1], 1))
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            zero = None if scales.zero_point is None else scales.zero_point[part]
            found[part] = self._values(weight[part], Scales(scales.scale[part], zero))
        return found

    @abstractmethod
    def _values(self, weight: Tensor, scales: Scales) -> Tensor:
        """The same for some rows."""

    @abstractmethod
    def encode(self, weight: Tensor, scales: Scales) -> dict[str, Tensor]:
        """The arrays that ship, on the CPU."""

    @abstractmethod
    def decode(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """float32 [N, K] that these arrays stand for."""

    def unfit(self, inputs: int) -> str | None:
        """Why a layer of so many inputs cannot lie on this grid; None when it can."""
        return None


def grid_of(scheme: Scheme, block_size: int, symmetric: bool = True) -> Grid:
    """The grid that a recipe or a profile names."""
    if scheme == "int8":
        return Int8()
    if scheme == "int4":
        return Int4(block_size, symmetric)
    return FourBitTable(scheme, block_size)


class Int4(Grid):
    """MatMulNBits, 4 bits."""

    def __init__(self, block_size: int, symmetric: bool) -> None:
        super().__init__(block_size)
        self.symmetric = symmetric

    def _blocks(self, weight: Tensor) -> Tensor:
        """[N, blocks, block_size], padded with zeros."""
        short = -weight.shape[1] % self.block_size
        if short:
            weight = torch.nn.functional.pad(weight, (0, short))
        return weight.view(weight.shape[0], -1, self.block_size)

    def scales(self, weight: Tensor) -> Scales:
        blocks = self._blocks(weight)
        low, high = torch.aminmax(blocks, dim=-1)
        if self.symmetric:
            return Scales(torch.where(high > -low, high, low) / -8)
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = (high - low) / 15
        zero = torch.where(scale != 0, -low / scale, low)
        return Scales(scale, _half_away(zero).clamp_(0, 15))

    def _codes(self, weight: Tensor, scales: Scales) -> Tensor:
        """float32 [N, blocks, block_size], whole numbers 0 to 15."""
        scale = scales.scale.unsqueeze(-1)
        inverse = torch.where(scale != 0, 1 / scale, scale)
        moved = self._blocks(weight) * inverse
        moved += 8 if scales.zero_point is None else scales.zero_point.unsqueeze(-1)
        return _half_away(moved).clamp_(0, 15)

    def _values(self, weight: Tensor, scales: Scales) -> Tensor:
        codes = self._codes(weight, scales)
        codes -= 8 if scales.zero_point is None else scales.zero_point.unsqueeze(-1)
        codes *= scales.scale.unsqueeze(-1)
        return codes.view(len(weight), -1)[:, : weight.shape[1]]

    def encode(self, weight: Tensor, scales: Scales) -> dict[str, Tensor]:
        codes = self._codes(weight, scales).to(torch.uint8)
        packed = (codes[..., ::2] | codes[..., 1::2] << 4).cpu()
        packed.view(len(packed), -1)[:, -(-weight.shape[1] // 2) :] = (
            0  # as onnxruntime leaves what pads the last block
        )
        arrays = {"codes": packed, "scales": scales.scale.cpu()}
        if scales.zero_point is not None:
            zero = scales.zero_point.to(torch.uint8)
            # onnxruntime leaves 8 in the nibble that no block uses
            zero = torch.nn.functional.pad(zero, (0, zero.shape[1] % 2), value=8)
            arrays["zero_points"] = (zero[:, ::2] | zero[:, 1::2] << 4).cpu()
        return arrays

    def decode(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        codes = _nibbles(arrays["codes"]).float()
        if "zero_points" in arrays:
            codes -= _nibbles(arrays["zero_points"])[:, : codes.shape[1]].unsqueeze(-1)
        else:
            codes -= 8
        codes *= arrays["scales"].unsqueeze(-1)
        return codes.view(shape[0], -1)[:, : shape[1]]


class Int8(Grid):
    """QuantizeLinear, one scale per output, no zero point, codes -127 to 127."""

    def __init__(self) -> None:
        super().__init__(0)

    def scales(self, weight: Tensor) -> Scales:
        return Scales(weight.abs().amax(1, keepdim=True) / 127)

    def _codes(self, weight: Tensor, scales: Scales) -> Tensor:
        scale = scales.scale
        return (weight / torch.where(scale > 0, scale, 1)).round_().clamp_(-127, 127)

    def _values(self, weight: Tensor, scales: Scales) -> Tensor:
        return self._codes(weight, scales).mul_(scales.scale)

    def encode(self, weight: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {"codes": self._codes(weight, scales).to(torch.int8).cpu(), "scales": scales.scale.squeeze(1).cpu()}

    def decode(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return arrays["codes"].float() * arrays["scales"].unsqueeze(1)


class FourBitTable(Grid):
    """bitsandbytes' nf4 and fp4."""

    def __init__(self, scheme: Scheme, block_size: int) -> None:
        super().__init__(block_size)
        self.scheme = scheme
        table_of(scheme, torch.device("cpu"))  # made now: no training step has to look at its numbers

    def unfit(self, inputs: int) -> str | None:
        if inputs % self.block_size:
            return (
                f"{inputs} inputs are no multiple of the block of {self.block_size}, where blocks cross rows and bitsandbytes' "
                "AVX-512 code reads the wrong scales; use a block_size that divides them, or int4"
            )
        return None

    def scales(self, weight: Tensor) -> Scales:
        blocks = weight.view(len(weight), -1, self.block_size)
        return Scales(blocks.abs().amax(-1))

    def _places(self, weight: Tensor, scales: Scales) -> Tensor:
        """int64 [N, K]: places of the nearest values in the sorted table."""
        inverse = 1.0 / scales.scale.clamp_min(SMALLEST_ABSMAX)
        scaled = (weight.view(len(weight), -1, self.block_size) * inverse.unsqueeze(-1)).clamp_(-1, 1).view_as(weight)
        return table_of(self.scheme, weight.device).places(scaled)

    def _values(self, weight: Tensor, scales: Scales) -> Tensor:
        values = look_up(table_of(self.scheme, weight.device).values, self._places(weight, scales))
        return values.view(*scales.scale.shape, -1).mul_(scales.scale.unsqueeze(-1)).view_as(weight)

    def encode(self, weight: Tensor, scales: Scales) -> dict[str, Tensor]:
        codes = look_up(table_of(self.scheme, weight.device).codes, self._places(weight, scales)).flatten()
        return {"codes": (codes[::2] << 4 | codes[1::2]).cpu(), "scales": scales.scale.flatten().cpu()}

    def decode(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        import bitsandbytes  # noqa: F401  (registers the operators)

        values: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            arrays["codes"].unsqueeze(1), arrays["scales"], self.block_size, self.scheme, shape, torch.float32
        )
        return values


def _half_away(x: Tensor) -> Tensor:
    """C's roundf of x >= 0 (anything below -1/2 ends below 0), in place where it may be."""
    down = torch.floor(x)
    return down.add_(x.sub_(down) >= 0.5)


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> [..., 2 n], the low nibble first."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
