"""Keys and values of one decode state, in memory that is taken once.

Optimum's graph concatenates: `present` [B, Hkv, P + n, D] = `past` [B, Hkv, P, D] ++ new [B, Hkv, n, D], so it can't write
where it reads. Two buffers per tensor are used in turn: this step's `present` is the next step's `past`. Each is a flat run of
memory that holds a contiguous [B, Hkv, P, D] for any P up to the maximum, so nothing is copied or allocated by a step.
A graph with a fused attention operator writes in place, and one buffer is both.
"""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector load of x86-64."""
MAPPED_FROM = 1 << 20
"""Bytes from which memory is mapped for itself. Opening a session frees large blocks, after which malloc serves buffers of
megabytes from its heap: zeroed by hand, so resident at once, and kept when the state is gone."""
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""Python maps shared memory unless told otherwise; Windows knows no other."""


def aligned_zeros(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeros, uint8 [n_bytes], whose first byte lies on a multiple of ALIGNMENT.

    From MAPPED_FROM bytes on, pages are taken when first written and given back with the last view.
    """
    if n_bytes >= MAPPED_FROM:
        return np.frombuffer(mmap.mmap(-1, n_bytes, **PRIVATE), np.uint8)
    raw = np.zeros(n_bytes + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + n_bytes]


class KVCache:
    """Buffers for `n_tensors` cache tensors (a key and a value per layer) of [B, Hkv, max_tokens, D].

    `past` and `present` are lists of addresses, one per tensor; they are the same list when `shared`.
    """

    def __init__(
        self, n_tensors: int, shape: tuple[int, int, int, int], dtype: np.dtype[np.generic], *, shared: bool
    ) -> None:
        tensor_bytes = int(np.prod(shape)) * dtype.itemsize
        stride = -(-tensor_bytes // ALIGNMENT) * ALIGNMENT
        copies = 1 if shared else 2
        self._memory = aligned_zeros(copies * n_tensors * stride)
        base = self._memory.ctypes.data
        sets = [[base + (c * n_tensors + i) * stride for i in range(n_tensors)] for c in range(copies)]
        self.past, self.present = sets[0], sets[-1]
        self.shape = shape
        self.shared = shared

    @property
    def nbytes(self) -> int:
        """Reserved bytes; only what tokens have filled is resident."""
        return int(self._memory.nbytes)

    def swap(self) -> None:
        """What was just written becomes the past."""
        self.past, self.present = self.present, self.past
