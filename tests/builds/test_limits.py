"""Every limit of the shipped quickstart, tightened alone, fails alone: `edgestill check` exits 1 and names that row."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from recipes import write_profile, write_recipe

from edgestill.profiles.load import load_profile, load_recipe
from edgestill.runtime.bundle import read_manifest
from edgestill.runtime.cli import run
from edgestill.runtime.manifest import manifest_to_json
from edgestill.runtime.metrics import metric

LIMITS = {**load_recipe("quickstart").recipe.limits, **load_profile("cpu-x86").profile.budget}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny build under the names of quickstart's limits, all of them generous."""
    folder = tmp_path_factory.mktemp("limits")
    generous = {name: 1e6 if _lower(name) else 1e-6 for name in LIMITS}
    recipe = write_recipe(
        folder, limits={n: v for n, v in generous.items() if n in load_recipe("quickstart").recipe.limits}
    )
    profile = write_profile(
        folder, budget={n: v for n, v in generous.items() if n in load_profile("cpu-x86").profile.budget}
    )
    assert run(["build", str(recipe), "--profile", str(profile), "--out", str(folder / "out")]) == 0
    return folder / "out" / "device"


def _lower(name: str) -> bool:
    found = metric(name)
    assert found is not None
    return found.direction == "lower"


def test_there_are_limits_on_quality_latency_and_memory() -> None:
    assert {"perplexity_ratio_to_teacher", "quantization_perplexity_ratio"} <= set(LIMITS)
    assert any(name.startswith("first_token_ms") for name in LIMITS)
    assert any(name.startswith("inter_token_ms") for name in LIMITS)
    assert {"peak_rss_mib", "bundle_mib"} <= set(LIMITS)


def test_every_limit_is_within_twice_of_what_a_build_measured() -> None:
    """The report stored with the benchmarks is one build of the quickstart; a looser limit would prove nothing."""
    stored = Path(__file__).parents[2] / "benchmarks" / "results" / "quickstart_report.json"
    measured = {row["name"]: row["value"] for row in json.loads(stored.read_text())["checks"]}
    for name, limit in LIMITS.items():
        worse = limit / measured[name] if _lower(name) else measured[name] / limit
        assert 1 < worse <= 2, (name, limit, measured[name])


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_each_limit_alone_fails_the_check(bundle: Path, tmp_path: Path, name: str) -> None:
    report = json.loads((bundle / "report" / "report.json").read_text())
    measured = next(row["bound"] for row in report["checks"] if row["name"] == name)
    tightened = tmp_path / "bundle"
    shutil.copytree(bundle, tightened)
    manifest = read_manifest(tightened)
    limits = {**manifest.limits, name: measured / 50 if _lower(name) else measured * 50}
    if name in ("perplexity_ratio_to_teacher", "quantization_perplexity_ratio"):
        limits[name] = measured * 0.9
    (tightened / "manifest.json").write_text(manifest_to_json(dataclasses.replace(manifest, limits=limits)))
    found = tmp_path / "report.json"
    assert run(["check", str(tightened), "--json", str(found)]) == 1
    report = json.loads(found.read_text())
    assert report["verdict"] == "fail"
    assert [row["name"] for row in report["checks"] if row["passed"] is False] == [name]
