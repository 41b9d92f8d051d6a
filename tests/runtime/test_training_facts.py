"""What a bundle keeps of training is read strictly, and means are those of the tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from edgestill.runtime.errors import BundleError
from edgestill.runtime.training_facts import TeacherMeans, histograms_of, teacher_means, without_histograms

KEPT: dict[str, Any] = {
    "bins": 4,
    "weights": {"verse": {"a": [0, 1, 2, 3], "b": [6, 0, 0, 0]}, "prose": {"a": [0, 0, 0, 0], "b": [0, 0, 0, 0]}},
    "entropies": {"verse": {"a": [0, 0, 6, 0], "b": [6, 0, 0, 0]}, "prose": {"a": [0, 0, 0, 0], "b": [0, 0, 0, 0]}},
}


def manifest(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "provenance": {"seed": 3, "training": {"steps": 2, "histograms": {**KEPT, **changes}}}}


def row(tokens: int, weight: float, entropy: float, domain: str = "verse") -> dict[str, Any]:
    return {
        "step": tokens // 10,
        "tokens": tokens,
        "weights": {domain: {"a": weight, "b": 1 - weight}},
        "entropies": {domain: {"a": entropy, "b": 0.0}},
    }


def test_counts_come_back_with_their_tokens() -> None:
    found = histograms_of(manifest())
    assert found is not None
    assert found.weights["verse"]["a"] == (0, 1, 2, 3)
    assert found.entropies["verse"]["a"] == (0, 0, 6, 0)
    assert (found.tokens("verse"), found.tokens("prose"), found.tokens("elsewhere")) == (6, 0, 0)


def test_entropies_that_nobody_took_are_absent() -> None:
    nothing = {"verse": {"a": [6, 0, 0, 0], "b": [6, 0, 0, 0]}}
    found = histograms_of(manifest(entropies=nothing))
    assert found is not None
    assert found.entropies == {}


@pytest.mark.parametrize(
    "older", [{}, {"provenance": {}}, {"provenance": {"training": {"steps": 2}}}, {"provenance": {"training": None}}]
)
def test_an_older_bundle_has_none(older: dict[str, Any]) -> None:
    assert histograms_of(older) is None
    assert without_histograms(older) == older


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bins": 5}, "not 5 counts"),
        ({"bins": 0}, "bins is 0"),
        ({"bins": True}, "bins is True"),
        ({"bins": 10**9}, "bins is 1000000000"),
        ({"weights": None}, "weights is None"),
        ({"weights": {"verse": [1, 2]}}, "weights is"),
        ({"weights": {"verse": {"a": [0, 1, 2, -3]}}}, "'a' on 'verse'"),
        ({"weights": {"verse": {"a": [0, 1, 2, 0.5]}}}, "'a' on 'verse'"),
        ({"entropies": {"verse": {"a": [0, 1, 2, True]}}}, "'a' on 'verse'"),
        ({"entropies": {"verse": {"a": [0, 1, 2, 10**30]}}}, "'a' on 'verse'"),
    ],
)
def test_what_is_no_histogram_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(BundleError, match=named) as refused:
        histograms_of(manifest(**changes))
    assert "provenance.training.histograms" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_histograms_that_are_a_list_are_refused() -> None:
    with pytest.raises(BundleError, match="bins is None"):
        histograms_of({"provenance": {"training": {"histograms": [1]}}})


def test_the_table_of_provenance_does_without_the_counts() -> None:
    whole = manifest()
    before = copy.deepcopy(whole)
    assert without_histograms(whole) == {"name": "x", "provenance": {"seed": 3, "training": {"steps": 2}}}
    assert whole == before


def test_a_longer_interval_counts_for_more() -> None:
    (a, b) = teacher_means([row(100, 1.0, 2.0), row(400, 0.2, 4.0)], histograms_of(manifest()))
    assert a == TeacherMeans("verse", "a", pytest.approx(0.4), pytest.approx(3.5), 6)
    assert b == TeacherMeans("verse", "b", pytest.approx(0.6), 0.0, 6)


def test_an_interval_without_a_domain_does_not_count_for_it() -> None:
    rows = [row(100, 1.0, 2.0), row(200, 0.5, 2.0, domain="prose"), row(300, 0.5, 2.0)]
    found = {(mean.domain, mean.teacher): mean.weight for mean in teacher_means(rows)}
    assert found == {("verse", "a"): 0.75, ("verse", "b"): 0.25, ("prose", "a"): 0.5, ("prose", "b"): 0.5}


def test_means_of_a_student_without_teachers_and_of_untaken_entropies() -> None:
    assert teacher_means(None) == []
    assert teacher_means([{"step": 1, "tokens": 10, "loss": 3.0}]) == []
    assert [mean.entropy for mean in teacher_means([row(100, 0.5, 0.0)])] == [None, None]
    assert [mean.tokens for mean in teacher_means([row(100, 0.5, 0.0)])] == [None, None]
