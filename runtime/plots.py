"""The house's look for figures, and those of report.html that show perplexities, losses, latencies and memory.

Figures are made without pyplot, so no global state and no window system is touched. Text from outside loses what matplotlib
would interpret (`$...$`) or cannot draw. The same report gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from edgestill.runtime.errors import MissingPart
from edgestill.runtime.training_facts import tokens_at

COLOURS = ("#0b5fa5", "#c8541b", "#3b8132", "#7a4fa3", "#b58900", "#147d86", "#a8326e", "#5c6670")
INK, GRID = "#1c2733", "#d5dbe1"
LABEL_CHARACTERS = 32
WIDE, HALF = (8.6, 3.3), (4.2, 3.0)
"""Inches; the page scales them to its width."""

ALIGNED = "losses with their own units"
CURVES = (
    ("loss, nats per token", ("loss", "output", "cross_entropy")),
    (ALIGNED, ("ranking", "features", "attention")),
    ("interpolation, 1: the teachers", ("interpolation",)),
)
"""Title of a panel and the fields of training.jsonl in it; an alignment loss of 0.01 would be a flat line beside 5 nats."""
LOSSES = tuple(name for _, names in CURVES for name in names)

Series = list[tuple[str, list[float], list[float]]]


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
    figure, axes = new_figure(WIDE)
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
    """Losses against tokens: those in nats; beside them, where the recipe has them, those with a unit of their own, and how far
    an interpolated target has moved to the teachers."""
    parts = [(title, _series(training, names)) for title, names in CURVES]
    shown = [(title, series) for title, series in parts if series]
    if not shown:
        return None
    figure, panels = new_figure(WIDE, columns=len(shown))
    for axes, (title, series) in zip(panels if len(shown) > 1 else [panels], shown, strict=True):
        for name, x, y in series:
            colour = COLOURS[LOSSES.index(name) % len(COLOURS)]
            width = 1.9 if name == "loss" else 1.2
            axes.plot(x, y, label=name.replace("_", " "), color=colour, lw=width, marker=point(x))
        count_axis(axes)
        axes.set_title(title, fontsize=9)
        if len(series) > 1 or title == ALIGNED:
            axes.legend(fontsize=8)
    return figure


def latency_histograms(samples: Mapping[str, Any]) -> Any:
    """First-token and inter-token times side by side."""
    first = list(samples.get("first_token_ms") or [])
    inter = [x for run in samples.get("inter_token_ms") or [] for x in run]
    if not first or not inter:
        return None
    figure, panels = new_figure(WIDE, columns=2)
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
    figure, axes = new_figure((WIDE[0], 2.6))
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


def new_figure(
    size: tuple[float, float], columns: int = 1, rows: int | None = None, sharey: bool | Literal["col"] = False
) -> tuple[Any, Any]:
    """(figure, axes); size in inches. `rows` given: axes by row and column; else one axes, or a row of several."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows or 1, columns, sharey=sharey, squeeze=rows is None)


def point(values: Sequence[float]) -> str:
    """The marker of a line through `values`: one point alone has no line to be seen by."""
    return "o" if len(values) == 1 else ""


def count_axis(axes: Any) -> None:
    """Tokens along x: few ticks with short labels (`500 k`, `1.5 M`), so that panels side by side do not run together."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlabel("tokens")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter())


def _series(training: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Series:
    """(name, tokens, values) of every name that occurs, without nulls."""
    out: Series = []
    for name in names:
        points = [(tokens_at(row), float(row[name])) for row in training if row.get(name) is not None]
        if points:
            out.append((name, [x for x, _ in points], [y for _, y in points]))
    return out
