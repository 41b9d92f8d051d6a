"""Layer maps by hand."""

from __future__ import annotations

import pytest

from edgestill.compress.layer_map import kept_layers, layer_pairs
from edgestill.runtime.errors import BadInput


def test_uniform_maps_the_last_to_the_last_on_at_most_four_pairs() -> None:
    assert layer_pairs("uniform", 3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert layer_pairs("uniform", 8, 8) == [(1, 1), (3, 3), (5, 5), (7, 7)]
    assert layer_pairs("uniform", 2, 1) == [(0, 0), (1, 0)]


def test_the_ends() -> None:
    assert layer_pairs("last", 3, 6) == [(2, 5)]
    assert layer_pairs("first_last", 3, 6) == [(0, 0), (2, 5)]
    assert layer_pairs("first_last", 1, 1) == [(0, 0)]


def test_an_explicit_pair_must_exist() -> None:
    assert layer_pairs([(2, 0), (0, 1)], 3, 2) == [(0, 1), (2, 0)]
    with pytest.raises(BadInput, match=r"\[0, 2\] does not exist; the student has layers 0 to 2, the teacher 0 to 1"):
        layer_pairs([(0, 2)], 3, 2)


def test_kept_layers_hold_both_ends() -> None:
    assert kept_layers(8, 3) == [0, 4, 7]
    assert kept_layers(6, 6) == [0, 1, 2, 3, 4, 5]
    assert kept_layers(6, 1) == [0]
    with pytest.raises(BadInput, match="7 is more than the teacher's 6"):
        kept_layers(6, 7)
