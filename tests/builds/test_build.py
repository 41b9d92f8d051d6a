"""Whole builds on tiny teachers: several profiles and precisions, the halves alone, what is kept, what is incomplete."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
from recipes import write_profile, write_recipe

from edgestill.runtime import load
from edgestill.runtime.bundle import read_manifest, verify_bundle
from edgestill.runtime.cli import run


def report(bundle: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / "report" / "report.json").read_text())
    return content


def rows(bundle: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report(bundle)["checks"]}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One recipe for three precisions in one command."""
    folder = tmp_path_factory.mktemp("build")
    recipe = write_recipe(folder, limits={"quantization_perplexity_ratio": 1.5})
    profiles = [
        write_profile(folder, name, precision={"weights": name}, portable=name == "int8")
        for name in ("float32", "int8", "int4")
    ]
    command = ["build", str(recipe), "--out", str(folder / "out")]
    for profile in profiles:
        command += ["--profile", str(profile)]
    assert run(command) == 0
    return folder / "out"


@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_every_precision_gives_a_whole_bundle_that_runs(built: Path, precision: str) -> None:
    bundle = built / precision
    assert verify_bundle(bundle) == []
    manifest = read_manifest(bundle)
    assert manifest.precision.weights == precision
    assert {t["name"] for t in manifest.teachers} == {"verse", "prose"}
    assert all(t["torch"]["peak_rss_mib"] > 0 for t in manifest.teachers)
    assert load(bundle).generate("in the", max_new_tokens=4).token_ids
    found = rows(bundle)
    assert found["quantization_perplexity_ratio"]["passed"] is True
    assert found["parity_max_abs_logit"]["passed"] is True
    assert found["first_token_ms_p50"]["n"] >= 100


def test_less_precision_is_smaller_and_only_the_float_graph_is_exact(built: Path) -> None:
    sizes = {p: (built / p / "model.onnx").stat().st_size for p in ("float32", "int8", "int4")}
    assert sizes["int4"] < sizes["int8"] < sizes["float32"]
    assert rows(built / "float32")["quantization_perplexity_ratio"]["value"] == pytest.approx(1, abs=1e-5)
    assert rows(built / "int8")["quantization_perplexity_ratio"]["value"] == pytest.approx(1, abs=5e-3)


def test_the_portable_graph_ships_when_the_profile_asks(built: Path) -> None:
    assert (built / "int8" / "portable" / "model.onnx").is_file()
    assert not (built / "int4" / "portable").exists()


def test_the_report_tells_the_training_and_both_parity_gates(built: Path) -> None:
    content = report(built / "int4")
    paths = {row["path"] for row in content["parity"]["float32 graph"]}
    assert {"prefill", "chunked prefill", "single steps", "left padding", "over-long prompt"} <= paths
    assert content["quantization"]["left_float"] == []
    names = [row["name"] for row in content["quality"]["rows"]]
    assert names == ["verse", "prose", "fused teachers", "float student", "artifact"]
    assert (built / "int4" / "report" / "training.jsonl").read_text().count("\n") >= 1
    assert (
        "<svg" in (built / "int4" / "report" / "report.html").read_text()
        or "image/svg" in (built / "int4" / "report" / "report.html").read_text()
    )


def test_no_file_of_a_bundle_names_a_folder_of_the_build_machine(built: Path) -> None:
    here = str(built.parent).encode()
    for file in (built / "int4").rglob("*"):
        assert file.is_dir() or here not in file.read_bytes(), file


def test_any_damage_to_any_file_is_refused_by_name(built: Path, tmp_path: Path) -> None:
    files = sorted(p.relative_to(built / "int4") for p in (built / "int4").rglob("*") if p.is_file())
    assert len(files) >= 10
    copy = tmp_path / "copy"
    for name in files:
        for damage in ("corrupt", "truncate", "remove", "symlink"):
            shutil.copytree(built / "int4", copy)
            file = copy / name
            content = file.read_bytes()
            if damage == "corrupt":
                file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
            elif damage == "truncate":
                file.write_bytes(content[: len(content) // 2])
            else:
                file.unlink()
                if damage == "symlink":
                    file.symlink_to(built / "int4" / name)
            problems = verify_bundle(copy)
            assert any(str(name) in problem for problem in problems), (name, damage, problems)
            assert run(["verify", str(copy)]) == 1
            shutil.rmtree(copy)
    shutil.copytree(built / "int4", copy)
    (copy / "added.txt").write_text("not declared")
    assert any("added.txt" in problem for problem in verify_bundle(copy))


def test_the_same_command_again_keeps_every_bundle(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: (built / p / "manifest.json").read_bytes() for p in ("float32", "int8", "int4")}
    command = ["build", str(built.parent / "recipe.yaml"), "--out", str(built)]
    for name in before:
        command += ["--profile", str(built.parent / f"{name}.yaml")]
    assert run(command) == 0
    assert capsys.readouterr().err.count("done before, unchanged (pass)") == 3
    assert {p: (built / p / "manifest.json").read_bytes() for p in before} == before


def test_a_failed_bundle_is_judged_again_and_nothing_else_is_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, limits={"perplexity": 1.001})
    command = ["build", str(recipe), "--profile", str(write_profile(tmp_path)), "--out", str(tmp_path / "out")]
    assert run(command) == 1
    assert verify_bundle(tmp_path / "out" / "device") == []
    capsys.readouterr()
    assert run(command) == 1
    said = capsys.readouterr().err
    assert "== bundle: device" in said
    assert said.count("done before, unchanged") == 9


def test_a_bundle_for_another_machine_is_incomplete(tmp_path: Path) -> None:
    other = "x86_64" if platform.machine() in ("aarch64", "arm64") else "aarch64"
    recipe = write_recipe(tmp_path, limits={"perplexity": 1e6})
    profile = write_profile(tmp_path, device={"arch": other}, budget={"peak_rss_mib": 4000, "bundle_mib": 50})
    assert run(["build", str(recipe), "--profile", str(profile), "--out", str(tmp_path / "out")]) == 3
    found = rows(tmp_path / "out" / "device")
    assert found["peak_rss_mib"]["value"] is None
    assert "run `edgestill check` on the target" in found["peak_rss_mib"]["reason"]
    assert (found["perplexity"]["passed"], found["bundle_mib"]["passed"]) == (True, True)
    assert report(tmp_path / "out" / "device")["verdict"] == "incomplete"


def test_distill_and_export_are_the_halves(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert run(["distill", str(recipe), "--out", str(tmp_path / "half")]) == 0
    student = tmp_path / "half" / "student"
    limits = tmp_path / "limits.yaml"
    limits.write_text("format: 1\nlimits: {quantization_perplexity_ratio: 1.5}\n")
    command = ["export", str(student), "--profile", str(write_profile(tmp_path)), "--out", str(tmp_path / "out")]
    assert run([*command, "--held-out", str(tmp_path / "verse.txt"), "--limits", str(limits)]) == 0
    found = rows(tmp_path / "out" / "device")
    assert found["quantization_perplexity_ratio"]["passed"] is True
    assert found["kl_nats_per_token"]["reason"] == "no teacher"
    assert read_manifest(tmp_path / "out" / "device").teachers == []


def test_a_graph_that_differs_from_torch_stops_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of the exported file is changed before the gate: a report, no bundle, exit 1."""
    import onnx
    from onnx import numpy_helper

    from edgestill.export import ship

    real = ship.export_onnx

    def faulty(checkpoint: Path, out: Path) -> Any:
        exported = real(checkpoint, out)
        model = onnx.load(exported.path)
        weight = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        changed = numpy_helper.to_array(weight).copy()
        changed.flat[0] += 1.0
        weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
        onnx.save(model, exported.path)
        return exported

    monkeypatch.setattr(ship, "export_onnx", faulty)
    recipe, profile = write_recipe(tmp_path), write_profile(tmp_path)
    assert run(["build", str(recipe), "--profile", str(profile), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out" / "device").exists()
    failed = json.loads((tmp_path / "out" / "device.failed" / "report.json").read_text())
    assert failed["verdict"] == "fail"
    assert failed["checks"][0]["name"].startswith("parity/")
