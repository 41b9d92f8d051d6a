"""Whole builds whose weights lie on a grid: trained on it, put there by GPTQ or HQQ, or in bitsandbytes' types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper
from recipes import write_profile, write_recipe
from safetensors.numpy import load_file

from edgestill.compress.quantize.shipped import FILE
from edgestill.runtime import load
from edgestill.runtime.bundle import read_manifest, verify_bundle
from edgestill.runtime.cli import run

WAYS: dict[str, dict[str, Any]] = {
    "trained": {"weights": "int4"},
    "rounded": {"weights": "int8"},
    "gptq": {"weights": "int4", "method": "gptq", "block_size": 16},
    "hqq": {"weights": "int4", "method": "hqq", "symmetric": False},
    "mixed": {"weights": "int4", "block_size": 16, "graph_mib": 0.1},
    "nf4": {"weights": "nf4"},
}
FROM = {"trained": "trained", "rounded": "nearest", "gptq": "gptq", "hqq": "hqq", "mixed": "nearest", "nf4": "nearest"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One student that was trained on int4 in blocks of 32, in five bundles; and what the build said."""
    folder = tmp_path_factory.mktemp("quantized")
    shape = {"hidden_size": 64, "intermediate_size": 96}
    recipe = write_recipe(
        folder, student={"config": shape}, quantize={"scheme": "int4", "from_step": 2, "ramp_steps": 2}
    )
    command = ["build", str(recipe), "--out", str(folder / "out")]
    for name, precision in WAYS.items():
        words: dict[str, Any] = {"precision": precision, "portable": name in ("trained", "nf4")}
        if name == "trained":
            words["compare_weights"] = ["int8", "int4", "nf4"]
        command += ["--profile", str(write_profile(folder, name, **words))]
    assert run(command) == 0
    return folder / "out", str(recipe)


def quantization(bundle: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / "report" / "report.json").read_text())["quantization"]
    return content


@pytest.mark.parametrize("name", WAYS)
def test_every_way_gives_a_whole_bundle_that_says_where_its_weights_come_from(
    name: str, built: tuple[Path, str]
) -> None:
    bundle = built[0] / name
    assert verify_bundle(bundle) == []
    assert read_manifest(bundle).precision.weights == WAYS[name]["weights"]
    assert quantization(bundle)["weights_from"] == FROM[name]
    assert quantization(bundle)["left_float"] == []
    assert len(load(bundle).generate("in the", max_new_tokens=4).token_ids) == 4


def test_the_bundle_has_the_bytes_that_training_left(built: tuple[Path, str]) -> None:
    (stage,) = (built[0] / "work").glob("train-*")
    trained = load_file(stage / "student" / FILE)
    graph = onnx.load(built[0] / "trained" / "model.onnx").graph
    shipped = [numpy_helper.to_array(i).tobytes() for i in graph.initializer]
    assert len(trained) > 20
    for name, array in trained.items():
        assert any(array.tobytes() in weights for weights in shipped), name  # joined weights lie one after the other
    info = json.loads((stage / "stage.json").read_text())["info"]
    assert 1 < info["quantized_validation_perplexity"] != info["validation_perplexity"] > 1


def test_other_ways_stand_beside_what_ships(built: tuple[Path, str]) -> None:
    bundle = built[0] / "trained"
    weights = json.loads((bundle / "report" / "report.json").read_text())["weights"]
    rows = {row["cell"]: row for row in weights["rows"]}
    int4 = [f"int4, {method}" for method in ("rounded", "HQQ", "GPTQ", "trained")]
    assert list(rows) == ["float32", "int8, rounded", *int4, "nf4, rounded"]
    assert weights["ships"] == "int4, trained"
    assert rows["float32"]["kl_nats"] == 0 < rows["int8, rounded"]["kl_nats"] < rows["int4, rounded"]["kl_nats"]
    assert rows["int4, trained"]["graph_mib"] < rows["int8, rounded"]["graph_mib"] < rows["float32"]["graph_mib"]
    assert all(row["perplexity_standard_error"] > 0 for row in rows.values())
    shipped = (bundle / "model.onnx").stat().st_size / 2**20
    assert rows["int4, trained"]["graph_mib"] == pytest.approx(shipped, abs=1e-3)  # the very graph that ships
    assert "int4, trained (ships)" in (bundle / "report" / "report.html").read_text()
    assert not (built[0] / "gptq" / "report" / "report.json").read_text().count('"weights": {')


def test_a_checkpoint_alone_has_no_text_to_compare_on(
    built: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (stage,) = (built[0] / "work").glob("train-*")
    profile = write_profile(tmp_path, "table", compare_weights=["int4"])
    assert run(["export", str(stage / "student"), "--profile", str(profile), "--out", str(tmp_path / "out")]) == 2
    assert "compare_weights: needs validation text" in capfd.readouterr().err


def test_a_budget_is_spent_on_eight_bits(built: tuple[Path, str]) -> None:
    weights = quantization(built[0] / "mixed")["quantized"]
    assert {node["bits"] for node in weights} == {4, 8}


def test_portable_has_the_same_integers_in_plain_operators(built: tuple[Path, str]) -> None:
    model = onnx.load(built[0] / "trained" / "portable" / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert "DequantizeLinear" in {node.op_type for node in model.graph.node}
    plain = onnx.load(built[0] / "nf4" / "portable" / "model.onnx")  # no plain operator has this type: float32
    assert "DequantizeLinear" not in {node.op_type for node in plain.graph.node}


def test_another_grid_than_the_trained_one_is_said(
    built: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (stage,) = (built[0] / "work").glob("train-*")
    profile = write_profile(tmp_path, "wide", precision={"weights": "int4", "block_size": 16})
    assert run(["export", str(stage / "student"), "--profile", str(profile), "--out", str(tmp_path / "out")]) in (0, 3)
    said = capfd.readouterr().err
    assert "was trained with block_size 32, and the profile wants 16: its weights are quantized anew" in said
    assert "weights: int4, nearest, " in said


def test_gptq_needs_text(built: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (stage,) = (built[0] / "work").glob("train-*")
    profile = write_profile(tmp_path, "gptq", precision={"weights": "int4", "block_size": 16, "method": "gptq"})
    assert run(["export", str(stage / "student"), "--profile", str(profile), "--out", str(tmp_path / "out")]) == 2
    assert "precision.method: gptq needs text that is not judged on" in capfd.readouterr().err
