"""What a real training tells of its teachers, through the manifest of a real bundle, on the page of `edgestill report`."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle
from recipes import write_recipe

from edgestill.compress import distill
from edgestill.compress.inputs import check_inputs
from edgestill.compress.stages import Workspace
from edgestill.profiles.load import load_recipe
from edgestill.runtime.cli import run
from edgestill.runtime.manifest import MANIFEST, manifest_to_json
from edgestill.runtime.manifest_reader import read_manifest
from edgestill.runtime.progress import QuietProgress

REPORT: dict[str, Any] = {"name": "tiny/cpu", "verdict": "pass", "checks": [], "environment": {}, "samples": {}}
CAPTION = "How often each teacher had which"


def trained(folder: Path, **changes: Any) -> distill.Distilled:
    path = write_recipe(folder, train={"tokens": 512}, reference={"tokens": 64}, **changes)
    with Workspace(folder / "out", QuietProgress()).locked() as space:
        loaded = load_recipe(str(path))
        return distill.run(loaded, check_inputs(loaded), space)


def bundle_of(folder: Path, made: distill.Distilled, *, histograms: bool = True) -> Path:
    """A bundle with the facts and the log of this training."""
    log = "".join(json.dumps(row) + "\n" for row in made.training_log)
    files = {"report/report.json": json.dumps(REPORT).encode(), "report/training.jsonl": log.encode()}
    bundle = make_bundle(folder, extra_files=files)
    training = {k: v for k, v in made.facts["training"].items() if histograms or k != "histograms"}
    manifest = dataclasses.replace(read_manifest(bundle), provenance={**made.facts, "training": training})
    (bundle / MANIFEST).write_text(manifest_to_json(manifest), encoding="utf-8")
    return bundle


def page_of(bundle: Path) -> str:
    assert run(["report", str(bundle)]) == 0
    return (bundle / "local" / "report.html").read_text(encoding="utf-8")


def table(page: str) -> list[list[str]]:
    """The cells of the table of teachers."""
    section = page.partition("<h2>Teachers in training</h2>")[2].partition("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", section.partition("<tbody>")[2], re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", row)] for row in rows]


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> distill.Distilled:
    return trained(tmp_path_factory.mktemp("uniform"), fusion={"weights": "uniform"})


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> distill.Distilled:
    return trained(tmp_path_factory.mktemp("single"), teachers=[{"name": "verse", "model": "verse"}])


def test_uniform_weights_have_their_mean_and_no_entropy(uniform: distill.Distilled, tmp_path: Path) -> None:
    page = page_of(bundle_of(tmp_path / "b", uniform))
    assert table(page) == [
        [domain, teacher, "0.500", "–", "248"] for domain in ("verse", "prose") for teacher in ("verse", "prose")
    ]
    assert f"{CAPTION} weights in training" in page
    assert "none were taken" in page
    assert "provenance.training.steps" in page
    assert "histograms" not in page


def test_a_single_teacher_has_weight_one_and_its_entropy(single: distill.Distilled, tmp_path: Path) -> None:
    page = page_of(bundle_of(tmp_path / "b", single))
    assert [row[:3] + row[4:] for row in table(page)] == [
        ["verse", "verse", "1.000", "248"],
        ["prose", "verse", "1.000", "248"],
    ]
    assert all(5 < float(row[3]) < 5.58 for row in table(page))  # a random teacher is nearly uniform: log 263 = 5.57
    assert f"{CAPTION} weights and entropies in training" in page


def test_a_bundle_from_before_has_its_means_and_no_histograms(single: distill.Distilled, tmp_path: Path) -> None:
    page = page_of(bundle_of(tmp_path / "b", single, histograms=False))
    assert [row[2] + row[4] for row in table(page)] == ["1.000–", "1.000–"]
    assert CAPTION not in page


def test_damaged_histograms_are_refused_in_one_line(
    single: distill.Distilled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundle_of(tmp_path / "b", single)
    manifest = read_manifest(bundle)
    manifest.provenance["training"]["histograms"]["weights"]["verse"]["verse"].append(1)
    (bundle / MANIFEST).write_text(manifest_to_json(manifest), encoding="utf-8")
    assert run(["report", str(bundle)]) == 2
    assert "provenance.training.histograms" in capsys.readouterr().err
    assert not (bundle / "local" / "report.html").exists()
