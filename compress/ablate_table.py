"""The result of an ablation: one dictionary, printed as a table, written as JSON, Markdown and a plot.

Perplexities stand with their standard error over seeds, differences with that over seeds and documents (ablate_statistics.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.compress.ablate_plot import plot
from edgestill.compress.ablate_rows import Row, Rows
from edgestill.compress.ablate_run import MIXED
from edgestill.compress.ablate_statistics import MARK, Difference, Scores, Spread, difference, perplexity
from edgestill.runtime.files import write_atomically

WIDTH, NAME_WIDTH, GAP = 80, 14, 2
"""Columns of a terminal; of a row's name, at least (it wraps); between two columns."""
FORMAT = 1

Table = dict[str, Any]


def summary(
    recipe: str,
    chosen: Rows,
    results: Sequence[Mapping[str, Any]],
    targets: Mapping[str, Mapping[str, Any]],
    failures: Mapping[str, str],
) -> Table:
    """Everything the table says, JSON-able.

    Args:
        results: of every finished row and seed (ablate_run.py), in any order.
        targets: perplexities of the fused target, by row.
        failures: why a row and seed has no result, by its label.
    """
    by_row = {row.name: sorted((r for r in results if r["row"] == row.name), key=_seed) for row in chosen.rows}
    scores = {name: scores_of(found) for name, found in by_row.items() if found}
    first = chosen.rows[0].name
    one = results[0] if results else None
    names = one["windows"]["domains"] if one else []
    judged = {name: i for i, name in enumerate(names) if one and one["perplexity"].get(name) is not None}
    parts = {**{name: [i] for name, i in judged.items()}, MIXED: list(judged.values())}
    return {
        "format": FORMAT,
        "recipe": recipe,
        "part": one["part"] if one else None,
        "judged_tokens": sum(one["windows"]["tokens"]) if one else 0,
        "domains": list(judged),
        "compared_with": first,
        "mark": MARK,
        "rows": [
            _line(row, by_row[row.name], scores, parts, first, targets.get(row.name))
            for row in chosen.rows
            if by_row[row.name]
        ],
        "left_out": chosen.notes,
        "failures": dict(failures),
        "environment": one["environment"] if one else None,
    }


def scores_of(results: Sequence[Mapping[str, Any]]) -> Scores:
    """Results of one row, a seed each, as arrays."""
    windows = results[0]["windows"]
    return Scores(
        seeds=tuple(r["seed"] for r in results),
        nll=np.array([r["windows"]["nll"] for r in results], np.float64),
        tokens=np.array(windows["tokens"], np.int64),
        domain=np.array(windows["domain"], np.int64),
        block=np.array(windows["block"], np.int64),
    )


def _seed(result: Mapping[str, Any]) -> int:
    return int(result["seed"])


def _line(
    row: Row,
    results: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Scores],
    parts: Mapping[str, list[int]],
    first: str,
    target: Mapping[str, Any] | None,
) -> dict[str, Any]:
    own, training = scores[row.name], [r["training"] for r in results]
    speeds = [t["tokens_per_s"] for t in training if t.get("tokens_per_s") is not None]
    apart = {}
    if row.name != first and first in scores:
        apart = {part: difference(own, scores[first], domains) for part, domains in parts.items()}
    return {
        "row": row.name,
        "changes": row.changes,
        "seeds": list(own.seeds),
        "perplexity": {part: _spread(perplexity(own, domains)) for part, domains in parts.items()},
        "target_perplexity": None if target is None else dict(target["perplexity"]),
        "target_reads_labels": row.loaded.recipe.fusion.weights == "label" and len(row.loaded.recipe.teachers) > 1,
        "difference": {part: _difference(found) for part, found in apart.items() if found is not None} or None,
        "train_tokens": training[0].get("tokens"),
        "tokens_per_s": round(sum(speeds) / len(speeds), 1) if speeds else None,
        "parameters": training[0].get("parameters"),
    }


def _spread(found: Spread) -> dict[str, float | None]:
    error = found.standard_error
    return {"value": round(found.value, 4), "standard_error": None if error is None else round(error, 4)}


def _difference(found: Difference) -> dict[str, Any]:
    error = found.standard_error
    return {
        **asdict(found),
        "nats": round(found.nats, 6),
        "standard_error": None if error is None else round(error, 6),
        "marked": found.marked,
    }


# for people ----------------------------------------------------------------------------------------------------------


def header(table: Table) -> list[str]:
    """Titles of the columns."""
    return ["row", *table["domains"], MIXED, "target", "above first", "tokens/s"]


def cells(table: Table) -> list[list[str]]:
    """The words of every line, as many as in `header`."""
    lines = []
    for row in table["rows"]:
        found, target, apart = row["perplexity"], row["target_perplexity"], row["difference"]
        speed = row["tokens_per_s"]
        lines.append(
            [
                row["row"],
                *(f"{found[d]['value']:.1f}" for d in table["domains"]),
                _plus_minus(found[MIXED]["value"], found[MIXED]["standard_error"], "{:.1f}"),
                "" if target is None else f"{target[MIXED]:.1f}" + ("†" if row["target_reads_labels"] else ""),
                "" if apart is None else _apart(apart[MIXED]),
                "" if speed is None else f"{speed:,.0f}",
            ]
        )
    return lines


def _plus_minus(value: float, error: float | None, form: str) -> str:
    return form.format(value) if error is None else f"{form.format(value)} ± {form.format(error)}"


def _apart(found: Mapping[str, Any]) -> str:
    return _plus_minus(found["nats"], found["standard_error"], "{:.3f}") + (" *" if found["marked"] else "")


def footnotes(table: Table) -> list[str]:
    """What the columns mean and what is missing, a line each."""
    part = "held-out" if table["part"] == "held_out" else table["part"]
    seeds = max((len(row["seeds"]) for row in table["rows"]), default=0)
    both = "over seeds and documents" if seeds > 1 else "over documents (one seed: how seeds differ is not in it)"
    notes = [
        f"Perplexity on {table['judged_tokens']:,} {part} tokens, {seeds} seed{'s' if seeds != 1 else ''}, ± its standard error "
        "over seeds; mixed: exp of the mean over domains; target: of the fused teachers themselves, mixed.",
        f"above first: nats per token, negative log-likelihood minus that of {table['compared_with']!r}, mixed, ± standard error "
        f"{both}; * beyond {table['mark']:g} standard errors, below 0 is better.",
    ]
    if any(row["target_reads_labels"] for row in table["rows"]):
        notes.append("†: this target has read the true tokens, so its perplexity is not one of a model.")
    notes += [f"Not judged: {label}: {why}" for label, why in table["failures"].items()]
    return notes + [f"Left out: {note}" for note in table["left_out"]]


def print_table(table: Table, width: int | None = None) -> None:
    """The table on stdout, `width` columns wide (the terminal's, at least 80)."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False)
    console.width = width or max(console.width, WIDTH)
    drawn = RichTable(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    shown = _fitting(table, console.width)
    titles = header(table)
    for i in shown:
        drawn.add_column(Text(titles[i]), justify="left" if i == 0 else "right", no_wrap=i > 0, overflow="fold")
    for line in cells(table):
        drawn.add_row(*(Text(line[i]) for i in shown))
    console.print(drawn)
    for note in footnotes(table):
        console.print(note, style="dim", markup=False)


def _fitting(table: Table, width: int) -> list[int]:
    """Columns that fit beside a name: domains that are too many or too long are left to the files, all of them."""
    columns = list(zip(header(table), *cells(table), strict=True))
    widths = [max(map(len, column)) + GAP for column in columns]
    shown = list(range(len(columns)))
    if sum(widths[1:]) + min(widths[0], NAME_WIDTH + GAP) > width:
        del shown[1 : 1 + len(table["domains"])]
    return shown


def markdown(table: Table) -> str:
    """The table in Markdown, footnotes below it."""
    lines = [header(table), ["---", *["---:"] * (len(header(table)) - 1)], *cells(table)]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return text + "\n\n" + "\n".join(f"- {note}" for note in footnotes(table)) + "\n"


def write_tables(table: Table, folder: Path) -> None:
    """`ablation.json`, `table.md`, `ablation.png` and `ablation.svg` in `folder`, each whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / "ablation.json", text.encode())
    write_atomically(folder / "table.md", markdown(table).encode())
    for suffix, image in plot(table).items():
        write_atomically(folder / f"ablation.{suffix}", image)
