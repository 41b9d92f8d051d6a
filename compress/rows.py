"""The positions of a batch that count, sequence after sequence: everything the output loss knows of them but the logits.

They are worked out on the host, from labels that have not left it, so that training never waits for a device to say how many
there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Label of a token that does not count, as in transformers."""


@dataclass(frozen=True)
class Rows:
    """n positions of a batch [B, T] whose next token counts.

    positions: int64 [n], b * (T - 1) + t, ascending.
    labels: int64 [n], the next tokens.
    sequence: int64 [n], b.
    domain: int64 [n].
    lengths: rows per sequence, on the host; their sum is n.
    valid: bool [B, T - 1].
    """

    positions: Tensor
    labels: Tensor
    sequence: Tensor
    domain: Tensor
    lengths: tuple[int, ...]
    valid: Tensor

    @classmethod
    def of(cls, labels: Tensor, domain: Tensor) -> Rows:
        """From labels int64 [B, T] (IGNORE where a token does not count) and domain int64 [B]. Counts: not for a training loop."""
        valid = labels[:, 1:] != IGNORE
        positions = valid.flatten().nonzero().squeeze(1)
        sequence = positions // max(valid.shape[1], 1)
        lengths = tuple(int(n) for n in valid.sum(1))
        return cls(positions, labels[:, 1:].flatten()[positions], sequence, domain[sequence], lengths, valid)

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> Rows:
        """Back from the flat words of `to_batch`."""
        return cls(
            batch["positions"],
            batch["labels"],
            batch["sequence"],
            batch["row_domain"],
            tuple(batch["lengths"]),
            batch["valid"],
        )

    def to_batch(self) -> dict[str, Any]:
        """Flat words that a data loader moves to a device; `lengths` stays on the host."""
        return {
            "positions": self.positions,
            "labels": self.labels,
            "sequence": self.sequence,
            "row_domain": self.domain,
            "lengths": list(self.lengths),
            "valid": self.valid,
        }

    def take(self, hidden: Tensor) -> Tensor:
        """[n, d] of hidden states [B, T, d]: those that predict the labels."""
        flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        return flat if self.positions.numel() == flat.shape[0] else flat.index_select(0, self.positions)

    def per_sequence(self, values: Tensor) -> Tensor:
        """Mean over each sequence of values [..., n] -> [..., B]; 0 where a sequence has no row."""
        dense = values.new_zeros(*values.shape[:-1], self.valid.numel()).index_copy_(-1, self.positions, values)
        # a sum over rows in their place: adding by index is not repeatable on a GPU
        shape = (*values.shape[:-1], *self.valid.shape)
        return dense.view(shape).sum(-1) / self.counts(values.dtype)

    def written(self, input_ids: Tensor) -> Rows:
        """The same positions of other windows [B, T]: the labels are theirs."""
        return replace(self, labels=input_ids[:, 1:].reshape(-1).index_select(0, self.positions))

    def counts(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows per sequence [B], at least 1, on the device."""
        return self.valid.sum(1).clamp_min(1).to(dtype)


def consecutive(sequence: Tensor) -> Tensor:
    """int64 [n], ascending with any gaps -> the same sequences as 0, 1, 2, ..."""
    if sequence.numel() == 0:
        return sequence
    return torch.nn.functional.pad((sequence[1:] != sequence[:-1]).long().cumsum(0), (1, 0))


def full_rows(token_ids: Tensor) -> Rows:
    """Every position of token_ids int64 [B, T] counts; one domain."""
    labels = token_ids.clone()
    return Rows.of(labels, torch.zeros(len(token_ids), dtype=torch.int64, device=token_ids.device))


def chunks(lengths: Sequence[int], most: int) -> list[slice]:
    """Ranges of whole sequences with at most `most` rows; a longer sequence is a range of its own."""
    found: list[slice] = []
    start = stop = 0
    for length in lengths:
        if stop > start and stop + length - start > most:
            found.append(slice(start, stop))
            start = stop
        stop += length
    if stop > start:
        found.append(slice(start, stop))
    return found
