"""The figures of report.html, in their order, as SVG text. One that the data do not allow is left out."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgestill.runtime.plots import latency_histograms, loss_curves, memory_over_time, perplexity_bars, style
from edgestill.runtime.teacher_plots import MOST_DOMAINS, weight_histograms, weights_over_training
from edgestill.runtime.training_facts import Histograms


def figures(
    report: Mapping[str, Any], training: Sequence[Mapping[str, Any]] | None, histograms: Histograms | None = None
) -> list[tuple[str, str]]:
    """(caption, SVG text) of every figure the data allow.

    Args:
        report: report.json.
        training: rows of training.jsonl, or None.
        histograms: of the teachers' weights and entropies, or None.

    Raises:
        MissingPart: matplotlib is not installed.
    """
    rows = training or []
    makers: list[tuple[str, Callable[[], Any]]] = [
        ("Perplexity on the held-out tokens, beside the teachers (lower is better).", lambda: perplexity_bars(report)),
        ("Losses over training.", lambda: loss_curves(rows)),
        (
            "Mean weight of each teacher over training, by the domain of the text.",
            lambda: weights_over_training(rows),
        ),
        (_histogram_caption(histograms), lambda: weight_histograms(histograms)),
        ("Latencies; the dashed line is the median.", lambda: latency_histograms(report.get("samples", {}))),
        ("Resident memory of the measuring process.", lambda: memory_over_time(report.get("memory_timeline", {}))),
    ]
    with style():
        made = [(caption, make()) for caption, make in makers]
        return [(caption, _svg(figure)) for caption, figure in made if figure is not None]


def _histogram_caption(histograms: Histograms | None) -> str:
    """Says what is drawn, and of what is not drawn that it is not."""
    if histograms is None:
        return ""
    what = "weights and entropies" if histograms.entropies else "weights"
    caption = f"How often each teacher had which {what} in training, as shares of the tokens of a domain."
    if not histograms.entropies:
        caption += " The weights did not depend on entropies, so none were taken."
    if (domains := sum(histograms.tokens(domain) > 0 for domain in histograms.weights)) > MOST_DOMAINS:
        caption += f" {MOST_DOMAINS} of {domains} domains."
    return caption


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
