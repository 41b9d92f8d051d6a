"""The processes that train together (torchrun): who this one is, and sums over all of them. Alone, everything is a no-op."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def world() -> tuple[int, int]:
    """(number of processes, rank of this one); (1, 0) alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    return 1, 0


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return world()[1] == 0


@torch.no_grad()
def summed(values: Tensor) -> Tensor:
    """The sum over all processes, on each of them; every process must call it, in the same order. `values` is overwritten."""
    if world()[0] > 1:
        distributed.all_reduce(values)
    return values


def wait_for_all() -> None:
    """Go on when every process is here."""
    if world()[0] > 1:
        distributed.barrier()
