"""The nearest of 16 values, fast on a CPU: bitsandbytes' nf4 and fp4 tables."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from edgestill.profiles.quantize_words import Scheme


class SortedTable:
    """The 16 values of a scheme in ascending order, and the search for the nearest.

    [-1, 1] is cut into equal cells, each with at most one midpoint in it: two lookups and one comparison find a place, where a
    binary search (bitsandbytes' own on a CPU) takes more than the rest of a training step.
    """

    def __init__(self, scheme: Scheme, device: torch.device) -> None:
        from bitsandbytes.functional import get_4bit_type

        unordered: Tensor = get_4bit_type(scheme, device="cpu")  # type: ignore[no-untyped-call]
        codes = torch.argsort(unordered)
        values = unordered[codes]
        midpoints = (values[:-1] + values[1:]) / 2
        self.codes = codes.to(torch.uint8).to(device)
        """uint8 [16]: the code of each value."""
        self.values = values.to(device)
        """float32 [16]."""
        self._midpoints = midpoints.to(device)
        self._cells = _cells(midpoints) if device.type == "cpu" else None

    def places(self, scaled: Tensor) -> Tensor:
        """int64: how many midpoints lie below each of these numbers, float32 [rows, columns] in [-1, 1]."""
        if self._cells is None:
            return torch.bucketize(scaled, self._midpoints)
        return _places(scaled, *self._cells)


@cache
def table_of(scheme: Scheme, device: torch.device) -> SortedTable:
    """nf4's or fp4's."""
    with torch.device("cpu"):  # whatever the default is where it is asked for first
        return SortedTable(scheme, device)


def _places(scaled: Tensor, below: Tensor, inside: Tensor) -> Tensor:
    cell = scaled.add(1).mul_((len(below) - 1) / 2).to(torch.int64)
    return look_up(below, cell).add_(scaled > look_up(inside, cell))


def look_up(table: Tensor, places: Tensor) -> Tensor:
    """table [n] at int64 places [rows, columns]: several times as fast as indexing on a CPU."""
    return table.expand(len(places), -1).gather(1, places)


def _cells(midpoints: Tensor) -> tuple[Tensor, Tensor]:
    """(int64: midpoints below each cell, float32: the one inside or 2) of the coarsest cells that find every place."""
    for count in (1 << n for n in range(4, 16)):
        edges = torch.arange(count + 1, dtype=torch.float64) * 2 / count - 1
        below = torch.searchsorted(midpoints.double(), edges)
        inside = torch.cat([midpoints, torch.tensor([2.0])])[below]
        critical = torch.cat([midpoints, edges.float()])
        probes = [critical]
        for end in (-2.0, 2.0):
            near = critical
            for _ in range(4):  # rounding of the cell's number errs by less
                near = torch.nextafter(near, torch.tensor(end))
                probes.append(near)
        probe = torch.cat(probes).clamp(-1, 1).unsqueeze(0)
        if torch.equal(_places(probe, below, inside), torch.bucketize(probe, midpoints)):
            return below, inside
    raise ValueError("two values of the scheme lie too near each other")
