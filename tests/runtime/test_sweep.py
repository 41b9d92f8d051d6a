"""The sweep on a real tiny bundle: every cell that fits, none that does not, and what people see of it."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle
from engines import make_engine_bundle

from edgestill.compress import torch_speed
from edgestill.runtime import sweep as sweep_module
from edgestill.runtime.cli import run
from edgestill.runtime.commands_bundle import _torch_rows
from edgestill.runtime.sweep import (
    STEPS,
    WARM_UP,
    Grid,
    _row,
    depth_ms,
    prompt_ms,
    sweep_bundles,
    table_lines,
    torch_rows,
)

ROWS = [
    {"bundle": "a", "kind": "prompt", "batch": 1, "tokens": 16, "ms": 2.0, "ms_lower": 1.9, "ms_upper": 2.1},
    {"bundle": "b", "kind": "prompt", "batch": 1, "tokens": 64, "ms": 4.0, "ms_lower": None, "ms_upper": None},
    {"bundle": "a", "kind": "depth", "batch": 1, "tokens": 16, "ms": 0.5, "ms_lower": 0.4, "ms_upper": 0.6},
]
for row in ROWS:
    row |= {"tokens_per_s": 1000.0, "runs": 9, "turns": 1}


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
        assert (row["precision"], row["turns"]) == ("float32", 1)
    assert found["environment"]["start"]["utc"] <= found["environment"]["end"]["utc"]
    (engine,) = found["engines"].values()
    assert engine["precision"]["weights"] == "float32" and engine["session"]["threads"] == 1
    assert (engine["engine"], engine["max_batch"], engine["gpu"]) == ("onnxruntime-cpu", None, None)
    assert found["environment"]["engine"] == "onnxruntime-cpu"


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


def test_batches_beyond_an_engines_largest_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine for two rows runs five in three turns; the environment names the engine that ran."""
    folder = make_engine_bundle(tmp_path / "bundle")
    rows = [_row("depth", batch, 16, [1.0] * 9) for batch in (1, 2, 5)]
    monkeypatch.setattr(sweep_module, "run_child", lambda *_: {"session": {}, "rows": rows, "gpu": None})
    found = sweep_bundles([folder], Grid(batches=(1, 2, 5)))
    assert [(row["batch"], row["turns"], row["precision"]) for row in found["rows"]] == [
        (1, 1, "float16"),
        (2, 1, "float16"),
        (5, 3, "float16"),
    ]
    assert found["environment"]["engine"] == "tensorrt-rtx"
    lines = table_lines(found)
    marked = [line for line in lines if "1.000*" in line]
    assert len(marked) == 1 and lines[lines.index(marked[0]) - 2] == "between tokens, ms, batch 5"
    assert lines[-1] == "*  a batch beyond the engine's largest, the profile's: it runs in turns"


class OneState:
    """A backend that counts the states which are alive; a second one is what an engine would allocate a cache for."""

    rewinds = False
    prefill_chunk = 64
    facts = SimpleNamespace(vocab_size=7, max_tokens=64)

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most = 0

    def new_state(self, batch: int, tokens: int) -> Any:
        state = State()
        self.alive.add(state)
        self.most = max(self.most, len(self.alive))
        return state

    def step(self, state: Any, ids: Any, keep: int) -> Any:
        return np.zeros((ids.shape[0], keep, 7), np.float32)


class State:
    pass


@pytest.mark.parametrize("measure", [prompt_ms, depth_ms])
def test_a_state_is_gone_before_the_next_is_timed(measure: Any) -> None:
    backend = OneState()
    assert len(measure(backend, 1, 8)) == 9
    assert backend.most == 1 and not backend.alive


def test_rows_of_torch_name_their_precision_and_whether_they_were_compiled() -> None:
    speed = {"prompt_tokens": 16, "first_token_ms_p50": 4.0, "inter_token_ms_p50": 0.5, "runs": 8}
    ways = [{"precision": "float32", "compiled": False}, {"precision": "float16", "compiled": True}]
    rows = torch_rows([speed | way for way in ways], "student")
    assert [row["bundle"] for row in rows[::2]] == ["student (torch float32)", "student (torch float16, CUDA graphs)"]
    assert [(row["kind"], row["precision"], row["tokens_per_s"]) for row in rows[2:]] == [
        ("prompt", "float16", 4000.0),
        ("depth", "float16", 2000.0),
    ]


@pytest.mark.parametrize(
    ("cuda", "ways"), [(False, [("float32", False)]), (True, [("float32", False), ("float16", True)])]
)
def test_on_a_cuda_device_torch_is_compiled_too(
    cuda: bool, ways: list[tuple[str, bool]], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(models: list[tuple[Path, str]], *, compiled: bool, **_: int) -> list[Any]:
        asked.append((models[0][1], compiled))
        return []

    monkeypatch.setattr(torch_speed, "on_cuda", lambda: cuda)
    monkeypatch.setattr(torch_speed, "measure_apart", measured)
    assert _torch_rows(tmp_path, bundle, Grid(prompts=(8,))) == []
    assert asked == ways
