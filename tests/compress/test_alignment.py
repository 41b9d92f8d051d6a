"""A feature fit is read as it was written, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgestill.compress.alignment import TENSORS, WORDS, Alignment, PairFit
from edgestill.runtime.errors import BadInput


def some(seed: int = 0) -> Alignment:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shared = normal(3, 4)
    low_rank = PairFit(1, 3, (normal(6, 2), normal(2, 4)), shared)
    return Alignment([[PairFit(0, 1, (normal(4, 6).T,)), low_rank], [PairFit(1, 1, (), shared)]])


def same(one: Alignment, other: Alignment) -> bool:
    flat = [[fit for fits in a.fits for fit in fits] for a in (one, other)]
    return one.pairs == other.pairs and all(
        len(a.weights) == len(b.weights)
        and all(torch.equal(v, w) for v, w in zip(a.weights, b.weights, strict=True))
        and (a.prototypes is None) == (b.prototypes is None)
        and (a.prototypes is None or b.prototypes is None or torch.equal(a.prototypes, b.prototypes))
        for a, b in zip(*flat, strict=True)
    )


def test_round_trip_is_exact(tmp_path: Path) -> None:
    some().save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [WORDS, TENSORS]
    loaded = Alignment.load(tmp_path)
    assert loaded.pairs == [[(0, 1), (1, 3)], [(1, 1)]]
    assert same(loaded, some())
    assert not same(loaded, some(1))
    content = [(tmp_path / name).read_bytes() for name in (TENSORS, WORDS)]
    loaded.save(tmp_path)
    assert content == [(tmp_path / name).read_bytes() for name in (TENSORS, WORDS)]


def test_a_fit_that_was_killed_between_its_files_is_refused(tmp_path: Path) -> None:
    some().save(tmp_path)
    words = (tmp_path / WORDS).read_bytes()
    (tmp_path / WORDS).unlink()
    with pytest.raises(BadInput, match=r"holds no whole feature fit .* build again"):
        Alignment.load(tmp_path)
    some(1).save(tmp_path)
    (tmp_path / WORDS).write_bytes(words)  # the new tensors beside the words of before
    with pytest.raises(BadInput, match="do not belong together; remove the folder"):
        Alignment.load(tmp_path)
    (tmp_path / WORDS).write_bytes(words[:-20])
    with pytest.raises(BadInput, match="holds no whole feature fit"):
        Alignment.load(tmp_path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    some().save(tmp_path)
    words = json.loads((tmp_path / WORDS).read_text())
    (tmp_path / WORDS).write_text(json.dumps(words | {"format": 99}))
    with pytest.raises(BadInput, match="format 99, this version reads 2"):
        Alignment.load(tmp_path)
