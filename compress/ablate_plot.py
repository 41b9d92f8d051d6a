"""The plot of an ablation: how far each row is from the first, and its perplexity beside that of its fused target."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from edgestill.compress.ablate_run import MIXED
from edgestill.runtime.plots import COLOURS, INK, clean, style

ROW_HEIGHT, MARGIN, WIDTH = 0.3, 1.1, 8.6
"""Inches."""


def plot(table: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG and SVG by suffix; the same table gives the same bytes. No rows: no plot.

    Raises:
        MissingPart: matplotlib is not installed.
    """
    if not table["rows"]:
        return {}
    with style():
        figure = _figure(table)
        return {suffix: _saved(figure, suffix) for suffix in ("png", "svg")}


def _figure(table: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    rows = table["rows"]
    places = range(len(rows))
    figure = Figure(figsize=(WIDTH, MARGIN + ROW_HEIGHT * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.axvline(0, color=INK, lw=1)
    for place, row in zip(places, rows, strict=True):
        apart = (row["difference"] or {}).get(MIXED)
        if apart is None:
            continue
        colour = COLOURS[0] if not apart["marked"] else COLOURS[2] if apart["nats"] < 0 else COLOURS[1]
        error = table["mark"] * (apart["standard_error"] or 0.0)
        left.errorbar(apart["nats"], place, xerr=error, fmt="o", ms=4, capsize=3, color=colour)
    left.set_title(
        f"nats per token above {clean(table['compared_with'])} (± {table['mark']:g} standard errors)", fontsize=8
    )
    students = [row["perplexity"][MIXED] for row in rows]
    errors = [found["standard_error"] or 0.0 for found in students]
    values = [found["value"] for found in students]
    right.errorbar(values, places, xerr=errors, fmt="o", ms=4, capsize=3, color=COLOURS[0], label="student")
    targets = [(row["target_perplexity"], place) for row, place in zip(rows, places, strict=True)]
    known = [(target[MIXED], place) for target, place in targets if target is not None]
    if known:
        x, y = zip(*known, strict=True)
        right.plot(x, y, "D", ms=4, color=COLOURS[4], label="its fused target")
    right.set_title("perplexity, mixed", fontsize=8)
    right.legend(fontsize=7)
    left.set_yticks(list(places), [clean(row["row"]) for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    return figure


def _saved(figure: Any, suffix: str) -> bytes:
    buffer = io.BytesIO()
    nothing = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
    figure.savefig(buffer, format=suffix, dpi=150, metadata=nothing)
    return buffer.getvalue()
