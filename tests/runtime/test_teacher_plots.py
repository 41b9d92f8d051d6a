"""The lines that are drawn are the shares of the tokens; what was not measured is not drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from edgestill.runtime.figures import figures
from edgestill.runtime.plots import loss_curves, style
from edgestill.runtime.teacher_plots import MOST_DOMAINS, weight_histograms, weights_over_training
from edgestill.runtime.training_facts import Histograms

BINS = 4
BARE = {"checks": [], "samples": {}}


@pytest.fixture(autouse=True)
def house_style() -> Iterator[None]:
    with style():
        yield


def drawn(axes: Any) -> list[list[float]]:
    """The steps of each line, in order."""
    return [[round(float(v), 6) for v in patch.get_data().values] for patch in axes.patches]


def panels(figure: Any) -> dict[str, Any]:
    return {axes.get_title(): axes for axes in figure.axes}


def test_every_line_is_the_share_of_the_domains_tokens() -> None:
    weights = {"verse": {"a": (0, 1, 2, 1), "b": (1, 2, 1, 0)}, "prose": {"a": (10, 0, 0, 0), "b": (0, 0, 0, 10)}}
    entropies = {"verse": {"a": (0, 0, 4, 0), "b": (0, 3, 1, 0)}, "prose": {"a": (0, 0, 5, 5), "b": (0, 0, 0, 10)}}
    found = panels(weight_histograms(Histograms(BINS, weights, entropies)))
    assert {title: drawn(axes) for title, axes in found.items()} == {
        "verse: weights, n = 4": [[0, 0.25, 0.5, 0.25], [0.25, 0.5, 0.25, 0]],
        "verse: entropies": [[0, 0, 1, 0], [0, 0.75, 0.25, 0]],
        "prose: weights, n = 10": [[1, 0, 0, 0], [0, 0, 0, 1]],
        "prose: entropies": [[0, 0, 0.5, 0.5], [0, 0, 0, 1]],
    }
    steps = found["verse: weights, n = 4"].patches[0].get_data()
    assert list(steps.edges) == [0, 0.25, 0.5, 0.75, 1]


def test_equal_teachers_are_told_apart_by_dash_and_width() -> None:
    """Uniform weights: one spike, drawn once per teacher at the same place."""
    spike = {"text": dict.fromkeys("abc", (0, 8, 0, 0))}
    (axes,) = weight_histograms(Histograms(BINS, spike, {})).axes
    assert drawn(axes) == [[0, 1, 0, 0]] * 3
    assert len({patch.get_linestyle() for patch in axes.patches}) == 3
    widths = [patch.get_linewidth() for patch in axes.patches]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 3
    assert len({patch.get_edgecolor() for patch in axes.patches}) == 3


def test_a_single_teacher_is_a_spike_at_one_and_names_no_entropies_it_does_not_have() -> None:
    alone = Histograms(BINS, {"text": {"a": (0, 0, 0, 8)}}, {})
    (axes,) = weight_histograms(alone).axes
    assert drawn(axes) == [[0, 0, 0, 1]]
    ((caption, svg),) = figures(BARE, None, alone)
    assert "none were taken" in caption
    assert svg.count("<svg") == 1


def test_domains_without_tokens_and_beyond_the_limit_are_left_out_and_said_so() -> None:
    weights = {f"d{i}": {"a": (i, 0, 0, 0)} for i in range(MOST_DOMAINS + 3)}
    histograms = Histograms(BINS, weights, {})
    titles = list(panels(weight_histograms(histograms)))
    assert titles == [f"d{i}: weights, n = {i}" for i in range(1, MOST_DOMAINS + 1)]
    assert f"{MOST_DOMAINS} of {MOST_DOMAINS + 2} domains" in figures(BARE, None, histograms)[0][0]


def test_nothing_is_drawn_of_nothing() -> None:
    assert weight_histograms(None) is None
    assert weight_histograms(Histograms(BINS, {}, {})) is None
    assert weight_histograms(Histograms(BINS, {"text": {"a": (0, 0, 0, 0)}}, {})) is None
    assert figures(BARE, None) == []


def test_a_teacher_that_was_never_asked_has_a_name_and_no_line() -> None:
    weights = {"text": {"a": (0, 8, 0, 0), "b": (0, 0, 0, 0)}}
    figure = weight_histograms(Histograms(BINS, weights, {}))
    (axes,) = figure.axes
    assert drawn(axes)[0] == [0, 1, 0, 0]
    assert all(v != v for v in drawn(axes)[1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_the_same_histograms_give_the_same_bytes() -> None:
    histograms = Histograms(BINS, {"text": {"a$x$": (1, 8, 0, 0), "_b": (0, 1, 1, 7)}}, {})
    assert figures(BARE, None, histograms) == figures(BARE, None, histograms)


def curves(**extra: float) -> dict[str, list[str]]:
    """Title of each panel of the training curves -> its lines, for rows with these fields beside the usual ones."""
    rows = [{"tokens": t, "loss": 3.0, "output": 1.0, "cross_entropy": 2.0, "grad_norm": 1.0, **extra} for t in (1, 2)]
    figure = loss_curves(rows)
    return {axes.get_title(): [line.get_label() for line in axes.lines] for axes in figure.axes}


def test_the_training_curves_have_a_line_for_every_loss_that_is_there_and_no_other() -> None:
    usual = {"loss, nats per token": ["loss", "output", "cross entropy"]}
    aligned, moved = "losses with their own units", "interpolation, 1: the teachers"
    assert curves() == usual
    assert curves(attention=0.01) == {**usual, aligned: ["attention"]}
    assert curves(interpolation=0.4) == {**usual, moved: ["interpolation"]}
    assert curves(ranking=0.5, features=0.3, attention=0.01, interpolation=0.4) == {
        **usual,
        aligned: ["ranking", "features", "attention"],
        moved: ["interpolation"],
    }


def test_one_log_row_is_a_point_that_is_seen() -> None:
    row = {"tokens": 10, "loss": 3.0, "weights": {"text": {"a": 1.0}}}
    assert {line.get_marker() for line in loss_curves([row]).axes[0].lines} == {"o"}
    assert {line.get_marker() for line in weights_over_training([row]).axes[0].lines} == {"o"}
    assert {line.get_marker() for line in loss_curves([row, row]).axes[0].lines} == {""}
