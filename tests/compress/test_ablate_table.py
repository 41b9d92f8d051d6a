"""The table of an ablation as printed, as Markdown, as JSON and as a plot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import write_recipe
from tiny import read_json

from edgestill.compress.ablate_rows import Rows, rows_of
from edgestill.compress.ablate_table import cells, footnotes, header, markdown, print_table, summary, write_tables
from edgestill.profiles.load import load_recipe

DOMAINS = ["verse", "prose"]
LEVELS = {"recipe": 5.0, "cross-entropy only": 5.4, "only verse": 4.0, "uniform fusion": 5.0}


def result(row: str, seed: int, level: float, domains: list[str]) -> dict[str, Any]:
    """40 windows of 10 tokens, two to a block, with a little noise of their own."""
    rng = np.random.default_rng([seed, len(row)])
    nll = 10 * (level + rng.normal(0, 0.1, 40))
    windows = {
        "nll": nll.tolist(),
        "tokens": [10] * 40,
        "domain": [i % len(domains) for i in range(40)],
        "block": [i // 2 for i in range(40)],
        "domains": domains,
    }
    training = {"tokens": 1000, "tokens_per_s": 12345.6, "parameters": 3_000_000}
    found = {"row": row, "seed": seed, "part": "validation", "windows": windows, "training": training}
    return {**found, "perplexity": dict.fromkeys([*domains, "mixed"], 1.0), "environment": {"os": "any"}}


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    found = rows_of(load_recipe(str(write_recipe(tmp_path))), None, tokens=None, only=tuple(LEVELS))
    return Rows(found.rows, ["a note"])


def made(rows: Rows, *, seeds: int = 3, domains: list[str] | None = None) -> dict[str, Any]:
    results = [result(name, seed, level, domains or DOMAINS) for name, level in LEVELS.items() for seed in range(seeds)]
    target = {"perplexity": {**dict.fromkeys(domains or DOMAINS, 50.0), "mixed": 54.3}}
    return summary("study", rows, results[::-1], {"recipe": target}, {"without floor #1": "it broke"})


def test_differences_are_marked_and_missing_rows_are_named(rows: Rows) -> None:
    table = made(rows)
    found = {row["row"]: row["difference"]["mixed"] for row in table["rows"] if row["difference"]}
    assert list(found) == ["cross-entropy only", "only verse", "uniform fusion"]
    assert {name: (round(d["nats"], 1), d["marked"]) for name, d in found.items()} == {
        "cross-entropy only": (0.4, True),
        "only verse": (-1.0, True),
        "uniform fusion": (0.0, False),
    }
    assert [row["seeds"] for row in table["rows"]] == [[0, 1, 2]] * 4
    assert table["judged_tokens"] == 400
    notes = " ".join(footnotes(table))
    assert "without floor #1: it broke" in notes
    assert "a note" in notes


def test_the_printed_table_fits_80_columns_and_cuts_nothing(rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    table = made(rows)
    print_table(table, 80)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    line = next(line for line in text.splitlines() if line.startswith("cross-entropy"))
    assert re.search(r"\d+\.\d ± \d+\.\d .*0\.4\d\d ± 0\.\d{3} \* +12,346$", line)


def test_domains_that_do_not_fit_are_left_to_the_files(rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    table = made(rows, domains=["verse", "a-rather-long-domain", "another-long-domain", "law"])
    print_table(table, 80)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "above first" in text
    assert "verse" not in text.splitlines()[0]
    assert "another-long-domain" not in text
    assert "another-long-domain" in markdown(table)


def test_one_seed_says_what_its_error_leaves_out(rows: Rows) -> None:
    table = made(rows, seeds=1)
    assert table["rows"][0]["perplexity"]["mixed"]["standard_error"] is None
    assert "one seed: how seeds differ is not in it" in " ".join(footnotes(table))


def test_markdown_has_a_cell_for_every_column(rows: Rows) -> None:
    table = made(rows)
    lines = [line for line in markdown(table).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(table["rows"])
    assert {line.count("|") for line in lines} == {len(header(table)) + 1}
    assert all(len(line) == len(header(table)) for line in cells(table))


def test_label_weights_are_said_to_have_read_the_true_tokens(tmp_path: Path) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path, fusion={"weights": "label"})))
    rows = rows_of(recipe, None, tokens=None, only=("recipe", "only verse", "uniform fusion", "cross-entropy only"))
    table = made(rows)
    assert "54.3†" in markdown(table)
    assert "has read the true tokens" in " ".join(footnotes(table))


def test_files_are_whole_and_the_same_every_time(rows: Rows, tmp_path: Path) -> None:
    from PIL import Image

    table = made(rows)
    write_tables(table, tmp_path / "a")
    write_tables(table, tmp_path / "b")
    names = {"ablation.json", "table.md", "ablation.png", "ablation.svg"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert read_json(tmp_path / "a/ablation.json") == table
    with Image.open(tmp_path / "a/ablation.png") as image:
        image.load()
        assert min(image.size) > 200
        assert len(image.convert("RGB").getcolors(1 << 24)) > 8
    svg = (tmp_path / "a/ablation.svg").read_text()
    assert svg.rstrip().endswith("</svg>")


def test_no_result_at_all_is_still_a_table(rows: Rows, tmp_path: Path) -> None:
    table = summary("study", rows, [], {}, {"recipe #0": "it broke"})
    write_tables(table, tmp_path)
    assert table["rows"] == []
    assert "it broke" in (tmp_path / "table.md").read_text()
    assert not (tmp_path / "ablation.png").exists()
