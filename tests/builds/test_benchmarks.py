"""The benchmark scripts run as their docstrings say, at sizes where a number means nothing and an answer still must be right."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from recipes import write_recipe
from tiny import read_json, write_text

from edgestill.runtime import cli

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STUDENT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}


def run(script: str, *arguments: str, out: Path) -> dict[str, Any]:
    """The JSON that a script writes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = read_json(out)
    return found


def script(name: str) -> ModuleType:
    """A script as a module, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_fused_loss_measures_the_same_loss_on_every_side(tmp_path: Path) -> None:
    size = {"windows": 2, "tokens": 16, "vocabulary": 512, "student": 32, "teacher": 48}
    arguments = ("--rounds", "2", "--precision", "float32", "--size", json.dumps(size))
    found = run("fused_loss.py", *arguments, out=tmp_path / "fused.json")
    sides = found["float32"]["sides"]
    ours, dense = sides["ours_3"], sides["dense_3"]
    assert ours["loss"] == pytest.approx(dense["loss"], rel=1e-6)
    assert ours["gradient_norm"] == pytest.approx(dense["gradient_norm"], rel=1e-5)
    assert sides["ours_3x1"]["loss"] > sides["ours_1"]["loss"] > 0
    assert all(side["seconds"]["n"] == 2 for side in sides.values())
    bars = {(bar["what"], bar["side"], bar["over"]) for bar in found["float32"]["bars"]}
    assert {("memory", "ours_3", "dense_3"), ("memory", "ours_3", "ours_1"), ("seconds", "ours_3", "ours_3x1")} <= bars
    assert found["environment"]["torch"]


def test_cached_step_trains_both_sides_in_turn(tmp_path: Path) -> None:
    size = {"batch": 2, "tokens": 32, "vocabulary": 512, "top_k": 8, "windows": 20, "steps": 10, "student": STUDENT}
    found = run("cached_step.py", "--rounds", "2", "--size", json.dumps(size), out=tmp_path / "cached.json")
    assert [found["tokens_per_s"][side]["n"] for side in ("cached", "cross_entropy")] == [2, 2]
    assert found["ratio"]["median"] > 0
    assert "output 0.000" not in found["last"]["cached"]  # it did learn from teachers
    assert "output 0.000" in found["last"]["cross_entropy"]


def test_a_step_on_every_grid_is_measured_beside_the_plain_one(tmp_path: Path) -> None:
    size = {"batch": 2, "tokens": 32, "vocabulary": 512, "windows": 20, "steps": 10, "student": STUDENT}
    found = run("quantized_step.py", "--rounds", "2", "--size", json.dumps(size), out=tmp_path / "step.json")
    assert set(found["cost"]) == {"int4", "int8", "nf4", "fp4"}
    assert all(cost["n"] == 2 and cost["median"] > 0 for cost in found["cost"].values())


def test_fused_targets_are_ranked(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    found = run("fusion_settings.py", str(recipe), out=tmp_path / "out" / "targets.json")
    assert {row["weights"] for row in found["rows"]} >= {"uniform", "entropy", "label"}
    assert all(row["perplexity"]["mixed"] > 1 for row in found["rows"])


def test_every_way_to_quantize_stands_in_one_table(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "intermediate_size": 96}
    recipe = write_recipe(tmp_path, student={"config": config}, train={"teacher_cache": "always"})
    schemes = {
        f"{scheme} trained": {"quantize": {"scheme": scheme, "from_step": 4}} for scheme in ("int8", "int4", "nf4")
    }
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump({"rows": {"default": {}, **schemes}}))
    out = tmp_path / "study"
    words = ["ablate", str(recipe), "--rows", str(tmp_path / "rows.yaml"), "--out", str(out), "--seeds", "2"]
    assert cli.run(words) == 0
    found = run(
        "quantization.py", str(out), "--seeds", "2", "--windows", "8", "--threads", "1", out=tmp_path / "t.json"
    )
    rows = {row["cell"]: row for row in found["rows"]}
    assert rows["float"]["kl_nats"] == 0
    assert rows["int8 nearest"]["kl_nats"] < rows["int4 nearest"]["kl_nats"]
    assert rows["int4 gptq"]["kl_nats"] < rows["int4 nearest"]["kl_nats"]
    assert rows["int4 nearest"]["graph_mib"] < rows["int8 nearest"]["graph_mib"] < rows["float"]["graph_mib"]
    assert all(row["standard_error"] >= 0 for row in found["rows"][1:])
    cells = sorted((out / "quantization").glob("validation-*.json"))
    before = [file.stat().st_mtime_ns for file in cells]
    again = run(
        "quantization.py", str(out), "--seeds", "2", "--windows", "8", "--threads", "1", out=tmp_path / "t.json"
    )
    assert [file.stat().st_mtime_ns for file in cells] == before
    speeds = {"decode_tokens_per_s"}
    assert [{k: v for k, v in row.items() if k not in speeds} for row in again["rows"]] == [
        {k: v for k, v in row.items() if k not in speeds} for row in found["rows"]
    ]


def test_train_teachers_makes_two_that_share_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("train_teachers")
    for i, folder in enumerate(("wikitext-2", "books")):
        for j, part in enumerate(("train", "valid", "test")):
            write_text(tmp_path / "texts" / folder / f"{part}.txt", seed=10 * i + j, words=4000 if j == 0 else 600)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    plans = {"wiki": module.Plan("wikitext-2", small), "books": module.Plan("books", small | {"hidden_size": 48})}
    monkeypatch.setattr(module, "PLANS", plans)
    monkeypatch.setattr(module, "WINDOW", 32)
    paths = ["--texts", str(tmp_path / "texts"), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    arguments = ["train_teachers.py", *paths, "--vocabulary", "320", "--learning-rate", "0.01"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--minutes", "0.001", "--teacher", "wiki"])
    module.main()
    timed = read_json(tmp_path / "out" / "wiki" / "training.json")
    assert timed["tokens"] == timed["command_tokens"] == read_json(tmp_path / "work" / "wiki" / "tokens.json")["tokens"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--tokens", "5_120"])
    module.main()  # wiki is there and is kept
    assert read_json(tmp_path / "out" / "wiki" / "training.json") == timed
    books = read_json(tmp_path / "out" / "books" / "training.json")
    assert books["tokens"] == 5120
    assert books["validation_perplexity"] < 320  # better than saying nothing
    made = [(tmp_path / "out" / name / "tokenizer.json").read_bytes() for name in ("wiki", "books")]
    assert made[0] == made[1]


def test_train_teachers_says_which_text_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("train_teachers")
    monkeypatch.setattr(sys, "argv", ["train_teachers.py", "--texts", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"wikitext-2/train\.txt is not there"):
        module.main()
