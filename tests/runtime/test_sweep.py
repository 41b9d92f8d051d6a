"""The sweep on a real tiny bundle: every cell that fits, none that does not, and what people see of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundles import make_bundle

from edgestill.runtime.cli import run
from edgestill.runtime.sweep import STEPS, WARM_UP, Grid, sweep_bundles, table_lines

ROWS = [
    {"bundle": "a", "kind": "prompt", "batch": 1, "tokens": 16, "ms": 2.0, "ms_lower": 1.9, "ms_upper": 2.1},
    {"bundle": "b", "kind": "prompt", "batch": 1, "tokens": 64, "ms": 4.0, "ms_lower": None, "ms_upper": None},
    {"bundle": "a", "kind": "depth", "batch": 1, "tokens": 16, "ms": 0.5, "ms_lower": 0.4, "ms_upper": 0.6},
]
for row in ROWS:
    row |= {"tokens_per_s": 1000.0, "runs": 9}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("sweep") / "bundle", fused=True)


def test_only_what_fits_is_measured(bundle: Path) -> None:
    grid = Grid(batches=(1, 2), prompts=(8, 127, 128), depths=(16, 128 - STEPS - WARM_UP, 111))
    found = sweep_bundles([bundle], grid)
    cells = [(row["kind"], row["batch"], row["tokens"]) for row in found["rows"]]
    assert cells == [
        *(("prompt", batch, tokens) for batch in (1, 2) for tokens in (8, 127)),
        *(("depth", batch, tokens) for batch in (1, 2) for tokens in (16, 110)),
    ]
    for row in found["rows"]:
        assert row["ms_lower"] <= row["ms"] <= row["ms_upper"] and row["runs"] == 9
        rate = row["batch"] * (row["tokens"] if row["kind"] == "prompt" else 1) * 1e3 / row["ms"]
        assert row["tokens_per_s"] == pytest.approx(rate, rel=0.01)
    assert found["environment"]["start"]["utc"] <= found["environment"]["end"]["utc"]
    (engine,) = found["engines"].values()
    assert engine["precision"]["weights"] == "float32" and engine["session"]["threads"] == 1


def test_by_the_command_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sweep", "--prompt-tokens", "16", "--batch", "2"]
    files = ["--json", str(tmp_path / "sweep.json"), "--plot", str(tmp_path / "sweep.png")]
    assert run(["bench", str(bundle), *words, *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("A  tiny-llama") and "first token, ms, batch 2" in lines
    assert all(len(line) <= 80 for line in lines)
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert {row["tokens"] for row in rows if row["kind"] == "prompt"} == {16}
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--plot", "x.png"], "--beside, --torch and --plot go with --sweep"),
        (["--sweep", "--plot", "x.pdf"], "x.pdf: give a .png or .svg in a folder that exists"),
        (["--sweep", "--beside", "nowhere"], "nowhere: no such folder"),
        (["--sweep", "--prompt-tokens", "4096"], ""),
    ],
)
def test_bad_words(words: list[str], complaint: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["bench", str(bundle), *words])
    if complaint:
        assert code == 2 and complaint in capsys.readouterr().err
    else:
        assert code == 0, "a prompt that does not fit is left out, shorter ones are measured"


def test_the_same_bundle_twice_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(bundle), "--sweep", "--beside", str(bundle)]) == 2
    assert "two bundles are called tiny-llama" in capsys.readouterr().err


def test_cells_that_were_not_measured_are_dashes() -> None:
    lines = table_lines({"rows": ROWS})
    assert lines[:2] == ["A  a", "B  b"]
    (line,) = (line for line in lines if line.strip().startswith("64"))
    assert line.split() == ["64", "–", "–", "4.000", "1,000"]
