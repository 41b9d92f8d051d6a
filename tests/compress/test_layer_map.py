"""Layer maps by hand, the order-keeping match against every possible one, and layers that are not there."""

from __future__ import annotations

from itertools import combinations, combinations_with_replacement

import pytest
import torch

from edgestill.compress.layer_map import kept_layers, layer_pairs, most_similar_in_order, require_origin
from edgestill.profiles.schema import FeatureLossSpec
from edgestill.runtime.errors import BadInput


def pairs(layers: object, student: int, teacher: int, **words: object) -> list[tuple[int, int]]:
    origin = words.pop("origin", None)
    return layer_pairs(FeatureLossSpec(layers=layers, **words), student, teacher, origin)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["uniform", "cka", "origin"])
def test_uniform_by_hand(name: str) -> None:
    """cka starts from it; origin falls back to it for teachers that the student was not cut from."""
    assert pairs(name, 3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert pairs(name, 8, 8) == [(1, 1), (3, 3), (5, 5), (7, 7)]
    assert pairs(name, 2, 1) == [(0, 0), (1, 0)]


def test_ends() -> None:
    assert pairs("last", 3, 6) == [(2, 5)]
    assert pairs("first_last", 3, 6) == [(0, 0), (2, 5)]
    assert pairs("first_last", 1, 1) == [(0, 0)]


def test_every_nth_and_the_last() -> None:
    assert pairs("every", 6, 12) == [(1, 3), (3, 7), (5, 11)]
    assert pairs("every", 5, 10) == [(1, 3), (3, 7), (4, 9)]
    assert pairs("every", 3, 6, every=1) == [(0, 1), (1, 3), (2, 5)]
    assert pairs("every", 3, 6, every=9) == [(2, 5)]


def test_origin_is_where_the_layer_came_from() -> None:
    assert pairs("origin", 3, 6, origin=[0, 1, 5]) == [(0, 0), (1, 1), (2, 5)]
    assert pairs("origin", 8, 20, origin=[0, 2, 3, 5, 8, 13, 16, 19]) == [(1, 2), (3, 5), (5, 13), (7, 19)]
    with pytest.raises(ValueError, match="origin names 2 layers, the student has 3"):
        pairs("origin", 3, 6, origin=[0, 1])


def test_origin_of_a_student_from_scratch_is_refused() -> None:
    require_origin(FeatureLossSpec(layers="origin"), known=True)
    require_origin(FeatureLossSpec(layers="uniform"), known=False)
    with pytest.raises(BadInput, match=r"origin needs a student that was cut from a teacher; .* or layers: uniform"):
        require_origin(FeatureLossSpec(layers="origin"), known=False)


def test_explicit_pairs_and_missing_layers() -> None:
    assert pairs([(2, 0), (0, 1), (2, 0)], 3, 2) == [(0, 1), (2, 0)]
    with pytest.raises(
        BadInput, match=r"pair \[0, 2\] does not exist; the student has layers 0 to 2, the teacher 0 to 1"
    ):
        pairs([(0, 2)], 3, 2)
    with pytest.raises(BadInput, match=r"\[\] names no pair"):
        pairs([], 3, 2)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (3, 3), (3, 7), (4, 6), (4, 2), (3, 1)])
def test_match_in_order_is_the_best_of_all(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows * 10 + columns)
    possible = (combinations if columns >= rows else combinations_with_replacement)(range(columns), rows)
    candidates = list(possible)
    for _ in range(20):
        similarity = torch.rand(rows, columns, generator=generator).tolist()
        theirs = max(candidates, key=lambda c: sum(similarity[i][t] for i, t in enumerate(c)))
        assert most_similar_in_order(similarity) == list(theirs)


def test_kept_layers_hold_both_ends() -> None:
    assert kept_layers(8, 3) == [0, 4, 7]
    assert kept_layers(6, 6) == [0, 1, 2, 3, 4, 5]
    assert kept_layers(6, 1) == [0]
    with pytest.raises(BadInput, match="7 is more than the teacher's 6; keep at most 6"):
        kept_layers(6, 7)
