"""A report for people: the verdict table on a terminal, and report.html, one file that needs nothing else.

Everything in a report may come from a stranger's bundle, so the page is written by a template that escapes every value, and the
figures are images, in which no script runs.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgestill.runtime.beside import COLUMNS, rows_beside
from edgestill.runtime.errors import BadInput
from edgestill.runtime.figures import figures
from edgestill.runtime.manifest import LOCAL, MANIFEST
from edgestill.runtime.metrics import metric
from edgestill.runtime.training_facts import histograms_of, teacher_means, without_histograms

if TYPE_CHECKING:
    from rich.console import Console

FOLDER = "report"
REPORT, TRAINING, PAGE = "report.json", "training.jsonl", "report.html"
RESULT = {True: "pass", False: "FAIL", None: "–"}
BANNER = {
    "pass": "every limit holds on its 95 % bound",
    "fail": "a limit does not hold",
    "incomplete": "nothing failed, but limited rows could not be measured on this machine",
}


def number(value: float | None, digits: int = 4) -> str:
    """`value` with `digits` significant digits and no exponent for everyday sizes; `–` for None."""
    if value is None:
        return "–"
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}g}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if whole:
        return f"{value:.{max(digits - whole, 0)}f}"
    text = f"{value:.{digits}g}"
    return text if "e" not in text else f"{value:.7f}".rstrip("0")


def with_error(value: float | None, error: float | None) -> str:
    """`1.0231 ± 0.0042`: the error has two digits, the value as many decimals as it."""
    if value is None or error is None or error <= 0:
        return number(value)
    spread = number(error, 2)
    decimals = len(spread.partition(".")[2])
    return f"{value:.{decimals}f} ± {spread}" if "e" not in spread else f"{number(value)} ± {spread}"


def limit_text(row: Mapping[str, Any]) -> str:
    """`≤ 1.05`, `≥ 20` or nothing."""
    if row["limit"] is None:
        return ""
    text = number(row["limit"])
    if "." in text and "e" not in text:
        text = text.rstrip("0").rstrip(".")  # a limit is as exact as it was written: no digits are added
    return f"{'≤' if row['direction'] == 'lower' else '≥'} {text}"


def result_text(row: Mapping[str, Any]) -> str:
    """`pass`, `FAIL` or `–`."""
    return RESULT[row["passed"]]


def verdict_line(report: Mapping[str, Any]) -> str:
    """The last line of the table: the verdict and the rows that decided it."""
    limited = [row for row in report["checks"] if row["limit"] is not None]
    failed = [row["name"] for row in limited if row["passed"] is False]
    missing = [row["name"] for row in limited if row["passed"] is None]
    detail = f"{len(limited) - len(failed) - len(missing)} of {len(limited)} limits hold"
    if failed:
        detail += f"; failed: {', '.join(failed)}"
    if missing:
        detail += f"; not measured: {', '.join(missing)}"
    return f"VERDICT: {report['verdict']} ({detail})"


def print_table(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the checks of `report` (report.json, or what `bench_bundle` returns) as a table of at most 80 columns.

    Units are in the names of the rows. Rows without a value say why below the table; the last line is the verdict.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    out = console or Console(highlight=False)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True, max_width=30, overflow="ellipsis")
    for heading in ("value ± SE", "95 % bound", "limit", "n", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    judged = report["verdict"] is not None
    styles = {True: "green", False: "bold red", None: "dim"}
    for row in report["checks"]:
        cells = [
            with_error(row["value"], row["standard_error"]),
            number(row["bound"]),
            limit_text(row),
            str(row["n"] or "–"),
        ]
        result = Text(result_text(row) if judged else "", styles[row["passed"]])
        table.add_row(Text(row["name"]), *(Text(cell) for cell in cells), result)
    out.print(table)
    _print_beside(out, report)
    for reason, names in _reasons(report["checks"]).items():
        out.print(Padding(Text(f"– {', '.join(names)}: {reason}", style="dim"), (0, 0, 0, 0)))
    if judged:
        style = {"pass": "bold green", "fail": "bold red"}.get(report["verdict"], "bold yellow")
        out.print(Text(verdict_line(report), style=style))


def _print_beside(out: Console, report: Mapping[str, Any]) -> None:
    """The teachers' own values beside the artifact's, where there are any."""
    from rich.table import Table
    from rich.text import Text

    rows = rows_beside(report)
    if not rows:
        return
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("\nbeside", no_wrap=True, max_width=20, overflow="ellipsis")
    for heading in (
        "perplexity\nheld-out",
        "first\ntoken ms",
        "between\ntokens ms",
        "decode\ntokens/s",
        "peak RSS\nMiB",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(row.name), *(Text(number(value)) for value in row.values))
    out.print(table)


def _reasons(checks: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Reason -> the rows that have it, in order."""
    out: dict[str, list[str]] = {}
    for row in checks:
        if row["reason"]:
            out.setdefault(row["reason"], []).append(row["name"])
    return out


def render(bundle: Path) -> Path:
    """Write `local/report.html` of `bundle` from its newest check on this device, or else from the build's report.

    Raises:
        BundleError: the bundle is damaged.
        BadInput: it holds no report.
        MissingPart: matplotlib is not installed.
    """
    from edgestill.runtime.bundle import open_bundle, write_local

    opened = open_bundle(bundle)
    report = _newest_check(opened)
    if report is None and f"{FOLDER}/{REPORT}" in opened:
        report = json.loads(opened.path(f"{FOLDER}/{REPORT}").read_text(encoding="utf-8"))
    if report is None:
        raise BadInput(f"{bundle}: holds no report; run `edgestill check {bundle}` first")
    training = None
    if f"{FOLDER}/{TRAINING}" in opened:
        lines = opened.path(f"{FOLDER}/{TRAINING}").read_text(encoding="utf-8").splitlines()
        training = [json.loads(line) for line in lines if line.strip()]
    manifest = json.loads((opened.folder / MANIFEST).read_text(encoding="utf-8"))
    return write_local(opened, PAGE, page(report, manifest, training).encode())


def _newest_check(opened: Any) -> dict[str, Any] | None:
    """The newest `local/check-*.json` that fits its hash; the names sort by time."""
    from edgestill.runtime.bundle import read_local

    for path in sorted((opened.folder / LOCAL).glob("check-*.json"), reverse=True):
        data = read_local(opened, path.name)
        if data is not None:
            found: dict[str, Any] = json.loads(data)
            return found
    return None


def page(report: Mapping[str, Any], manifest: Mapping[str, Any], training: Sequence[Mapping[str, Any]] | None) -> str:
    """The whole page as text.

    Args:
        report: report.json.
        manifest: manifest.json.
        training: rows of training.jsonl, or None.

    Raises:
        BundleError: the manifest's histograms are none.
        MissingPart: matplotlib is not installed.
    """
    from jinja2 import Environment, StrictUndefined

    source = resources.files("edgestill.runtime.templates").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "limit": limit_text, "result": result_text, "flat": flatten}
    environment.globals |= {"with_error": with_error, "about": _about}
    histograms = histograms_of(manifest)
    pictures = [
        {"caption": caption, "data": base64.b64encode(svg.encode()).decode()}
        for caption, svg in figures(report, training, histograms)
    ]
    return environment.from_string(source).render(
        report=report,
        manifest=without_histograms(manifest),
        pictures=pictures,
        banner=BANNER.get(str(report["verdict"]), ""),
        verdict=verdict_line(report),
        reasons=_reasons(report["checks"]),
        quality=report.get("quality") or {},
        paths=report.get("paths") or {},
        workload=(report.get("samples") or {}).get("workload") or {},
        warm_up=(report.get("samples") or {}).get("warm_up") or [],
        beside=rows_beside(report),
        beside_columns=COLUMNS,
        rewrites=rewrites_of(report),
        weights=report.get("weights") or {},
        engine={name: value for name, value in (report.get("engine") or {}).items() if name != "folder"},
        heard=teacher_means(training, histograms),
    )


def rewrites_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each rewrite of the graph did: rule, places, and (reason, places) for those that stayed as they were."""
    rows = []
    for row in report.get("rewrites") or []:
        reasons = Counter(str(text).partition(": ")[2] or str(text) for text in row["left"])
        rows.append({"rule": row["rule"], "done": row["done"], "left": list(reasons.items())})
    return rows


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested dicts and lists as (dotted key, text) rows; nulls and empty containers as `–`."""
    if isinstance(value, Mapping) and value:
        return [row for key, item in value.items() for row in flatten(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        if all(not isinstance(item, Mapping | list | tuple) for item in value):
            return [(prefix, ", ".join(str(item) for item in value))]
        return [row for i, item in enumerate(value) for row in flatten(item, f"{prefix}[{i}]")]
    empty = value is None or value in ("", [], {}, ())
    return [(prefix, "–" if empty else str(value))]


def _about(name: str) -> str:
    what = metric(name)
    return what.about if what is not None else ""
