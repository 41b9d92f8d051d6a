"""The training windows in the order they are seen, and batches of them with everything the host can say in advance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from edgestill.compress.corpus import Part
from edgestill.compress.rows import IGNORE, Rows

Item = tuple[Tensor, Tensor, int, int]
"""input_ids [T], labels [T], window, domain."""


class OrderedWindows(Dataset[Item]):
    """Item i is the i-th window of the whole run."""

    def __init__(self, part: Part, order: npt.NDArray[np.int64]) -> None:
        self.part, self.order = part, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> Item:
        return self.__getitems__([i])[0]

    def __getitems__(self, items: list[int]) -> list[Item]:
        windows = self.order[items]
        ids = torch.from_numpy(self.part.token_ids[windows].astype(np.int64))
        labels = ids.clone()
        labels[:, 0] = IGNORE
        if self.part.loss_mask is not None:
            labels[torch.from_numpy(self.part.loss_mask[windows] == 0)] = IGNORE
        return [(ids[i], labels[i], int(w), int(self.part.domain[w])) for i, w in enumerate(windows)]


def collate(items: Sequence[Item]) -> dict[str, Any]:
    """The arguments of `DistillModule.forward` but the normaliser; made on the host, where counting costs no waiting."""
    ids, labels, windows, domains = zip(*items, strict=True)
    rows = Rows.of(torch.stack(labels), torch.tensor(domains))
    return {"input_ids": torch.stack(ids), "windows": list(windows), **rows.to_batch()}
