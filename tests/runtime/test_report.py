"""What people see: a table of 80 columns, and one HTML file that needs nothing else and runs nothing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle
from rich.console import Console

from edgestill.runtime.beside import rows_beside
from edgestill.runtime.cli import run
from edgestill.runtime.report import limit_text, page, print_table, with_error

HOSTILE = "<script>alert(1)</script>$\\frac{1}{2}$"
VOID = {"meta", "link", "img", "br", "hr", "input"}


def check(name: str, value: float | None, limit: float | None = None, passed: bool | None = None) -> dict[str, Any]:
    bound = None if value is None else value * 1.05
    row = {"name": name, "value": value, "standard_error": 0.1, "n": 120, "bound": bound, "limit": limit}
    return {**row, "direction": "lower", "unit": "ms", "passed": passed, "reason": None if value else "no such counter"}


def report(name: str = "tiny/cpu") -> dict[str, Any]:
    speed = {"first_token_ms_p50": 5.0, "inter_token_ms_p50": 1.5, "decode_tokens_per_s": 600.0, "peak_rss_mib": 250.0}
    return {
        "name": name,
        "verdict": "fail",
        "checks": [
            check("perplexity", 151.23, 200, True),
            check("perplexity/verse", 1.5e9, 100, False),
            check("quantization_perplexity_ratio", 1.00012345),
            check("inter_token_ms_p95", 0.0123, 5, True),
            check("energy_j_per_token", None),
        ],
        "environment": {"os": "Linux", "packages": {"numpy": "2"}, "note": HOSTILE},
        "samples": {
            "first_token_ms": [1.0, 1.1, 1.2] * 40,
            "inter_token_ms": [[0.1, 0.2]] * 100,
            "workload": {"prompt_tokens": 8, "new_tokens": 4, "batch_size": 1, "threads": 1},
            "warm_up": [],
        },
        "quality": {
            "columns": ["all", HOSTILE],
            "tokens": [100, 100],
            "blocks": 10,
            "rows": [
                {"name": HOSTILE, "kind": "teacher", "values": [900.0, None]},
                {"name": "fused teachers", "kind": "fused", "values": [90.0, 91.0]},
                {"name": "float student", "kind": "student", "values": [150.0, 151.0]},
                {"name": "artifact", "kind": "artifact", "values": [151.2, 152.0]},
            ],
        },
        "teachers": [{"name": HOSTILE, "parameters": 10, "torch": {**speed, "precision": "float32"}}],
        "student_torch": {**speed, "precision": "float32"},
        "paths": {"max_abs_logp_nats": 1e-5, "mean_abs_logp_nats": 1e-6, "different_top1": 0, "n": 100},
        "memory_timeline": {"points": [[0.0, 10.0], [1.0, 20.0]], "phases": [[0.5, "loaded"]]},
    }


TRAINING = [
    {
        "step": s,
        "tokens": s * 10,
        "loss": 5.0 / s,
        "output": 1.0 / s,
        "cross_entropy": 4.0 / s,
        "learning_rate": 0.1,
        "tokens_per_s": 10.0,
        "grad_norm": 1.0,
        "weights": {HOSTILE: {"a": 0.5, HOSTILE: 0.5}},
        "entropies": {HOSTILE: {"a": 2.0, HOSTILE: 3.0}},
    }
    for s in (1, 2, 3)
]


HISTOGRAMS = {
    "bins": 2,
    "weights": {HOSTILE: {"a": [3, 1], HOSTILE: [1, 3]}},
    "entropies": {HOSTILE: {"a": [0, 4], HOSTILE: [2, 2]}},
}


class Nesting(HTMLParser):
    """Fails on a tag that is closed out of turn; collects what would be fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.fetched += [
            v for k, v in attrs if k in ("src", "href", "action", "data") and v and not v.startswith("data:")
        ]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_fetches_nothing_and_runs_nothing() -> None:
    provenance = {"recipe": HOSTILE, "training": {"histograms": HISTOGRAMS}}
    text = page(report(HOSTILE), {"name": HOSTILE, "limits": {}, "provenance": provenance}, TRAINING)
    parser = Nesting()
    parser.feed(text)
    assert parser.open == []
    assert (parser.fetched, parser.scripts) == ([], 0)
    assert HOSTILE not in text
    assert "&lt;script&gt;" in text
    assert text.count("<figure>") == 6


def test_the_page_does_without_what_was_not_measured() -> None:
    bare = {"name": "x", "verdict": "incomplete", "checks": [check("load_ms", None)], "environment": {}, "samples": {}}
    parser = Nesting()
    parser.feed(page(bare, {}, None))
    assert parser.open == []


def test_the_table_fits_eighty_columns_and_ends_with_the_verdict() -> None:
    out = io.StringIO()
    print_table(report(), Console(file=out, width=80, highlight=False))
    lines = out.getvalue().rstrip().splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[-1].startswith("VERDICT: fail")
    assert any(line.startswith("perplexity/verse") and "FAIL" in line for line in lines)
    assert any("energy_j_per_token: no such counter" in line for line in lines)


def test_hostile_names_and_sizes_do_not_widen_the_table() -> None:
    hostile = report()
    names = ["perplexity/" + "[bold]" * 20, "perplexity/" + HOSTILE, "perplexity/" + "\u00e9" * 200]
    hostile["checks"] += [
        check(name, 10.0**power, 1e-300, False) for name, power in zip(names, (300, 9, -300), strict=True)
    ]
    hostile["quality"]["rows"][0] |= {"name": "w" * 300, "values": [1e300, None]}
    out = io.StringIO()
    print_table(hostile, Console(file=out, width=80, highlight=False))
    assert max(len(line) for line in out.getvalue().splitlines()) <= 80
    assert "VERDICT: fail" in out.getvalue()
    assert "[bold]" in out.getvalue()


@pytest.mark.parametrize(
    ("limit", "text"), [(50.0, "≤ 50"), (1.05, "≤ 1.05"), (0.146, "≤ 0.146"), (1550.0, "≤ 1550"), (1e-9, "≤ 1e-09")]
)
def test_a_limit_is_shown_as_it_was_written(limit: float, text: str) -> None:
    assert limit_text({"limit": limit, "direction": "lower"}) == text
    assert limit_text({"limit": limit, "direction": "higher"}) == text.replace("≤", "≥")


def test_a_value_has_as_many_decimals_as_its_error() -> None:
    assert with_error(1.0231456, 0.0042) == "1.0231 ± 0.0042"
    assert with_error(None, None) == "–"
    assert with_error(74.0, None) == "74.00"


def test_the_artifact_stands_last_beside_its_teachers() -> None:
    rows = rows_beside(report())
    assert [row.name for row in rows] == [HOSTILE, "fused teachers", "float student", "artifact"]
    assert rows[0].values == (900.0, 5.0, 1.5, 600.0, 250.0)
    assert rows[1].values == (90.0, None, None, None, None)
    assert rows_beside({"checks": [], "samples": {}}) == []


def test_the_command_writes_the_page_of_the_builds_report(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", extra_files={"report/report.json": json.dumps(report()).encode()})
    assert run(["report", str(bundle)]) == 0
    assert "tiny/cpu" in (bundle / "local" / "report.html").read_text()


def test_without_matplotlib_the_pip_line_is_printed(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", extra_files={"report/report.json": json.dumps(report()).encode()})
    code = (
        "import sys\nsys.modules['matplotlib'] = None\n"
        "from edgestill.runtime.cli import run\nsys.exit(run(['report', sys.argv[1]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'edgestill[report]'" in done.stderr
    assert not (bundle / "local" / "report.html").exists()


@pytest.mark.parametrize("training", [None, TRAINING])
def test_training_is_shown_when_there_is_one(training: list[dict[str, Any]] | None) -> None:
    text = page(report(), {}, training)
    assert ("Losses over training" in text) == (training is not None)


def test_rewrites_say_what_they_did_and_what_stayed() -> None:
    rewrites = [
        {"rule": "attention", "done": 0, "left": ["heads of 20 values are no multiple of 16"]},
        {"rule": "skip norm", "done": 3, "left": ["a/Norm: its input is no sum", "b/Norm: its input is no sum"]},
    ]
    text = page({**report(), "rewrites": rewrites}, {}, None)
    assert "<h2>Graph</h2>" in text
    assert "heads of 20 values are no multiple of 16" in text
    assert "its input is no sum (2)" in text
    assert "<h2>Graph</h2>" not in page(report(), {}, None)
