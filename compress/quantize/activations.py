"""Inputs of a linear layer as MatMulNBits at accuracy_level 4 multiplies them.

Per token and block of `block_size` inputs: s = max |x| / 127, q = round(x / s), x' = q s (onnxruntime/core/mlas/lib, the SQNBIT
kernels' QuantizeARow). The gradient goes straight through: max |x| never clips.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def quantized_inputs(x: Tensor, block_size: int) -> Tensor:
    """x [..., K] with every block of its last dimension on 255 levels, in x's precision; a last block may be short."""
    rounded: Tensor = _Rounded.apply(x, block_size)  # type: ignore[no-untyped-call]
    return rounded


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block_size: int) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            width = x.shape[-1]
            wide = torch.nn.functional.pad(x.float(), (0, -width % block_size))
            wide = wide.view(*x.shape[:-1], -1, block_size)
            scale = wide.abs().amax(-1, keepdim=True) / 127
            wide = (wide / torch.where(scale > 0, scale, 1)).round_().mul_(scale)
            rounded: Tensor = wide.flatten(-2)[..., :width].to(x.dtype)
            return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None
