"""The figures of report.html as SVG text: training curves, teacher weights, perplexities, latencies, memory.

Figures are made without pyplot, so no global state and no window system is touched. Text from outside loses what matplotlib
would interpret (`$...$`) or cannot draw. The same report gives the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from edgestill.runtime.errors import MissingPart

COLOURS = ("#0b5fa5", "#c8541b", "#3b8132", "#7a4fa3", "#b58900", "#147d86", "#a8326e", "#5c6670")
INK, GRID = "#1c2733", "#d5dbe1"
LABEL_CHARACTERS = 32
WIDE, HALF = (8.6, 3.3), (4.2, 3.0)
"""Inches; the page scales them to its width."""

Series = list[tuple[str, list[float], list[float]]]


def figures(report: Mapping[str, Any], training: Sequence[Mapping[str, Any]] | None) -> list[tuple[str, str]]:
    """(caption, SVG text) of every figure the data allow.

    Args:
        report: report.json.
        training: rows of training.jsonl, or None.

    Raises:
        MissingPart: matplotlib is not installed.
    """
    makers: list[tuple[str, Callable[[], Any]]] = [
        ("Perplexity on the held-out tokens, beside the teachers (lower is better).", lambda: perplexity_bars(report)),
        ("Losses over training.", lambda: loss_curves(training or [])),
        (
            "Mean weight of each teacher over training, by the domain of the text.",
            lambda: teacher_weights(training or []),
        ),
        ("Latencies; the dashed line is the median.", lambda: latency_histograms(report.get("samples", {}))),
        ("Resident memory of the measuring process.", lambda: memory_over_time(report.get("memory_timeline", {}))),
    ]
    with style():
        made = [(caption, make()) for caption, make in makers]
        return [(caption, _svg(figure)) for caption, figure in made if figure is not None]


@contextmanager
def style() -> Iterator[None]:
    """The house's look for every figure that is made and saved within.

    Raises:
        MissingPart: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as missing:
        raise MissingPart("plots need matplotlib", "run pip install 'edgestill[report]'") from missing

    words = {
        "svg.hashsalt": "edgestill",  # ids of the SVG do not change from run to run
        "svg.fonttype": "path",
        "font.size": 9,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "axes.formatter.use_mathtext": False,
        "text.parse_math": False,
    }
    with mpl.rc_context(words):  # type: ignore[arg-type]  # its stubs list every key
        yield


def perplexity_bars(report: Mapping[str, Any]) -> Any:
    """Grouped bars: a group per domain, a bar per teacher, fused target, float student and artifact."""
    table = report.get("quality") or {}
    rows = [row for row in table.get("rows", []) if any(v is not None for v in row["values"])]
    if not rows:
        return None
    columns = [clean(c) for c in table["columns"]]
    figure, axes = _figure(WIDE)
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        values = [v if v is not None else math.nan for v in row["values"]]
        at = [c + (i - (len(rows) - 1) / 2) * width for c in range(len(columns))]
        hatch = "//" if row["kind"] in ("student", "fused") else None
        colour = INK if row["kind"] == "artifact" else COLOURS[i % len(COLOURS)]
        bars = axes.bar(
            at, values, width * 0.92, label=clean(row["name"]), color=colour, hatch=hatch, edgecolor="white"
        )
        if len(rows) * len(columns) <= 24:
            labels = ["" if math.isnan(v) else f"{v:.3g}" for v in values]
            axes.bar_label(bars, labels, fontsize=6.5, padding=1)
    finite = [v for row in rows for v in row["values"] if v is not None]
    if max(finite) > 8 * min(finite):
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        # the default log labels are mathematical text, which is off: names come from strangers' bundles
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xticks(range(len(columns)), columns)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("perplexity" if axes.get_yscale() == "linear" else "perplexity, logarithmic")
    axes.legend(ncols=min(len(rows), 5), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def loss_curves(training: Sequence[Mapping[str, Any]]) -> Any:
    """Losses against tokens; validation perplexity beside them where it was measured."""
    series = _series(training, ("loss", "output", "cross_entropy", "features", "attention"))
    validation = _series(training, ("validation_perplexity",))
    if not series:
        return None
    if not validation:
        figure, axes = _figure(WIDE)
    else:
        figure, (axes, right) = _figure(WIDE, columns=2)
        _, x, y = validation[0]
        right.plot(x, y, color=INK, marker="o", markersize=3)
        _count_axis(right)
        right.set_title("validation perplexity", fontsize=9)
    for i, (name, x, y) in enumerate(series):
        axes.plot(
            x, y, label=name.replace("_", " "), color=COLOURS[i % len(COLOURS)], lw=1.9 if name == "loss" else 1.2
        )
    _count_axis(axes)
    axes.set_title("loss, nats per token", fontsize=9)
    axes.legend(fontsize=8)
    return figure


def teacher_weights(training: Sequence[Mapping[str, Any]]) -> Any:
    """One panel per domain: the share of each teacher in the fused target against tokens."""
    rows = [row for row in training if row.get("weights")]
    domains = list(dict.fromkeys(d for row in rows for d in row["weights"]))[:6]
    if not domains:
        return None
    teachers = list(dict.fromkeys(t for row in rows for weights in row["weights"].values() for t in weights))
    figure, panels = _figure((WIDE[0], 2.6), columns=len(domains), sharey=True)
    for axes, domain in zip(panels if len(domains) > 1 else [panels], domains, strict=True):
        for i, teacher in enumerate(teachers):
            points = [
                (_tokens(row), row["weights"][domain][teacher])
                for row in rows
                if teacher in row["weights"].get(domain, {})
            ]
            axes.plot(
                [x for x, _ in points], [y for _, y in points], label=clean(teacher), color=COLOURS[i % len(COLOURS)]
            )
        axes.set_title(clean(domain), fontsize=9)
        axes.set_ylim(0, 1)
        _count_axis(axes)
    figure.axes[0].set_ylabel("weight")
    figure.axes[0].legend(fontsize=8)
    return figure


def latency_histograms(samples: Mapping[str, Any]) -> Any:
    """First-token and inter-token times side by side."""
    first = list(samples.get("first_token_ms") or [])
    inter = [x for run in samples.get("inter_token_ms") or [] for x in run]
    if not first or not inter:
        return None
    figure, panels = _figure(WIDE, columns=2)
    for axes, values, title in ((panels[0], first, "first token"), (panels[1], inter, "between tokens")):
        values = sorted(values)
        cut = 2 * values[math.ceil(0.95 * len(values)) - 1]  # a few stalls must not squash the histogram
        shown = [v for v in values if v <= cut]
        axes.hist(shown, bins=min(40, max(8, len(shown) // 8)), color=COLOURS[0], edgecolor="white", linewidth=0.4)
        axes.axvline(values[len(values) // 2], color=COLOURS[1], ls="--", lw=1.2)
        hidden = f", {len(values) - len(shown)} above {cut:.3g} ms" if len(shown) < len(values) else ""
        axes.set_title(f"{title}, n = {len(values)}{hidden}", fontsize=9)
        axes.set_xlabel("ms")
    panels[0].set_ylabel("samples")
    return figure


def memory_over_time(timeline: Mapping[str, Any]) -> Any:
    """Resident MiB against seconds, with the phases marked."""
    points = timeline.get("points") or []
    if len(points) < 2:
        return None
    figure, axes = _figure((WIDE[0], 2.6))
    x, y = [p[0] for p in points], [p[1] for p in points]
    axes.fill_between(x, y, color=COLOURS[0], alpha=0.18, linewidth=0)
    axes.plot(x, y, color=COLOURS[0])
    top = max(y) * 1.35
    for i, (at, name) in enumerate(timeline.get("phases") or []):
        axes.axvline(at, color=INK, ls=":", lw=0.9)
        axes.text(at, top * (0.98 - 0.1 * (i % 2)), f" {clean(name)}", fontsize=7.5, va="top", backgroundcolor="white")
    axes.set_ylim(0, top)
    axes.set_xlim(0, max(x))
    axes.set_xlabel("s")
    axes.set_ylabel("MiB")
    return figure


def clean(text: object) -> str:
    """Text that matplotlib draws as it stands: one line, Latin-1, not hidden from legends by a leading underscore."""
    line = "".join(c if c.isprintable() else "?" for c in str(text)).encode("latin-1", "replace").decode("latin-1")
    line = line if len(line) <= LABEL_CHARACTERS else line[: LABEL_CHARACTERS - 3] + "..."
    return f" {line}" if line.startswith("_") else line


def _figure(size: tuple[float, float], columns: int = 1, sharey: bool = False) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, columns, sharey=sharey)


def _count_axis(axes: Any) -> None:
    """Tokens along x: few ticks with short labels (`500 k`, `1.5 M`), so that panels side by side do not run together."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlabel("tokens")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter())


def _series(training: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Series:
    """(name, tokens, values) of every name that occurs, without nulls."""
    out: Series = []
    for name in names:
        points = [(_tokens(row), float(row[name])) for row in training if row.get(name) is not None]
        if points:
            out.append((name, [x for x, _ in points], [y for _, y in points]))
    return out


def _tokens(row: Mapping[str, Any]) -> float:
    return float(row.get("tokens", row.get("step", 0)))


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
