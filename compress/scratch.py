"""[rows, C] tensors that are allocated once and written again for every chunk.

A fresh buffer of tens of megabytes is handed over by the kernel page by page; on a CPU that costs more than the softmax
that fills it (benchmarks/fused_loss.py). It also makes the peak of memory the same for any number of teachers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Buffers by name, for chunks of at most `rows` rows on one device. What is in them is anyone's."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.device = rows, device
        self._held: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """The buffer `name` as a tensor of this shape [rows, columns]; one name is one memory for each width and type."""
        rows, columns = shape
        key = (name, columns, dtype)
        if key not in self._held:
            self._held[key] = torch.empty(max(rows, self.rows), columns, dtype=dtype, device=self.device)
        return self._held[key][:rows]


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None, scratch: Scratch) -> Tensor:
    """hidden [n, d] @ weight [V, d]' + bias, float32 [n, V] (float64 stays), in the buffer "logits".

    Without gradient: whoever calls this writes gradients by hand.
    """
    shape = (hidden.shape[0], weight.shape[0])
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = scratch.take("logits", shape, wide)
    narrow = logits if hidden.dtype == wide else scratch.take("narrow", shape, hidden.dtype)
    torch.mm(hidden, weight.T, out=narrow)
    if narrow is not logits:
        logits.copy_(narrow)
    return logits if bias is None else logits.add_(bias)
