"""The teachers' part in training: weights over training, and how often each teacher had which weight and which entropy.

Lines of several teachers may lie on one another (uniform weights are one spike for all), so each has a dash of its own beside
its colour: what lies below shows through the gaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgestill.runtime.plots import COLOURS, LABEL_CHARACTERS, WIDE, clean, count_axis, new_figure, point
from edgestill.runtime.training_facts import Counts, Histograms, tokens_at

MOST_DOMAINS = 6
"""More panels than these could not be read; the report's table has every domain."""
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.4)))
ROW_HEIGHT = 2.1
"""Inches of one domain's panels."""


def weights_over_training(training: Sequence[Mapping[str, Any]]) -> Any:
    """One panel per domain: the share of each teacher in the fused target against tokens."""
    rows = [row for row in training if row.get("weights")]
    domains = list(dict.fromkeys(d for row in rows for d in row["weights"]))[:MOST_DOMAINS]
    if not domains:
        return None
    teachers = list(dict.fromkeys(t for row in rows for weights in row["weights"].values() for t in weights))
    figure, panels = new_figure((WIDE[0], 2.6), columns=len(domains), sharey=True)
    for axes, domain in zip(panels if len(domains) > 1 else [panels], domains, strict=True):
        for i, teacher in enumerate(teachers):
            points = [
                (tokens_at(row), row["weights"][domain][teacher])
                for row in rows
                if teacher in row["weights"].get(domain, {})
            ]
            x, y = [x for x, _ in points], [y for _, y in points]
            axes.plot(x, y, label=clean(teacher), marker=point(x), **_look(i))
        axes.set_title(clean(domain), fontsize=9)
        axes.set_ylim(0, 1.02)
        count_axis(axes)
    figure.axes[0].set_ylabel("weight")
    figure.axes[0].legend(fontsize=8)
    return figure


def weight_histograms(histograms: Histograms | None) -> Any:
    """One row per domain: shares of its tokens by weight, and by normalised entropy where entropies were taken."""
    if histograms is None:
        return None
    domains = [domain for domain in histograms.weights if histograms.tokens(domain)][:MOST_DOMAINS]
    if not domains:
        return None
    kinds: list[tuple[str, str, Counts]] = [("weights", "weight in the target", histograms.weights)]
    if histograms.entropies:
        kinds.append(("entropies", "entropy / log of the vocabulary", histograms.entropies))
    figure, panels = new_figure(
        (WIDE[0], 0.6 + ROW_HEIGHT * len(domains)), columns=len(kinds), rows=len(domains), sharey="col"
    )
    teachers = list(dict.fromkeys(name for each in histograms.weights.values() for name in each))
    for domain, across in zip(domains, panels, strict=True):
        for (title, label, counts), axes in zip(kinds, across, strict=True):
            _draw(axes, counts.get(domain, {}), teachers, histograms.bins)
            count = f", n = {histograms.tokens(domain):,}" if title == "weights" else ""
            axes.set_title(f"{clean(domain)}: {title}{count}", fontsize=9)
            axes.set_xlabel(label if domain == domains[-1] else "")
            axes.set_ylabel("share of tokens" if title == "weights" else "")
    drawn = panels[0][0].get_legend_handles_labels()
    columns = 3 if max(map(len, drawn[1])) <= LABEL_CHARACTERS * 2 // 3 else 2
    figure.legend(*drawn, fontsize=8, ncols=min(len(teachers), columns), loc="outside upper center")
    return figure


def _draw(axes: Any, counts: Mapping[str, Sequence[int]], teachers: Sequence[str], bins: int) -> None:
    """A step line per teacher over bins of equal width in 0..1."""
    from matplotlib.ticker import FuncFormatter

    edges = [i / bins for i in range(bins + 1)]
    for i, teacher in enumerate(teachers):
        own = counts.get(teacher, ())
        total = sum(own)
        shares = [n / total for n in own] if total else [float("nan")] * bins  # its name stays in the legend
        axes.stairs(shares, edges, label=clean(teacher), **_look(i))
    axes.set_xlim(-0.01, 1.01)  # a spike of weight 1 ends at the edge
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))


def _look(number: int) -> dict[str, Any]:
    """Colour, dash and width of teacher `number`; those drawn later are thinner, so that one below is seen at the sides too."""
    width = max(2.2 - 0.3 * number, 1.2)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "linewidth": width,
    }
