"""`edgestill ablate` on tiny real teachers: kept results, equal tokens, failures that stay alone, judged by hand."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes import write_recipe
from tiny import read_json
from transformers import AutoModelForCausalLM

from edgestill.compress.ablate import ablate
from edgestill.compress.corpus import open_corpus
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import QuietProgress

ROWS = """\
rows:
  default: {}
  cross-entropy only: {losses: {output: {weight: 0}, cross_entropy: 1}}
  features: {losses: {features: {fit_tokens: 256}}, train: {teacher_cache: never}}
  one teacher: {teachers: [{name: prose, model: prose, precision: float32}], fusion: {weights: uniform}}
"""
NAMES = ["default", "cross-entropy only", "features", "one teacher"]


def run(recipe: Path, out: Path, **changes: Any) -> dict[str, Any]:
    words: dict[str, Any] = {"seeds": 2, "tokens": None, "rows": None, "only": [], "jobs": 2, "held_out": False}
    return ablate(str(recipe), out=out, progress=QuietProgress(), **{**words, **changes})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablate")
    exact = [{"name": name, "model": name, "precision": "float32"} for name in ("verse", "prose")]
    write_recipe(folder, teachers=exact, train={"tokens": 512, "teacher_cache": "always"})
    (folder / "rows.yaml").write_text(ROWS)
    return folder


def stages(place: Path) -> dict[str, int]:
    """Every finished stage and when it was written."""
    return {path.name: (path / "stage.json").stat().st_mtime_ns for path in (place / "out/work").iterdir()}


@pytest.fixture(scope="module")
def table(place: Path) -> dict[str, Any]:
    return run(place / "recipe.yaml", place / "out", rows=place / "rows.yaml")


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.glob("*-?.json"))}


def test_every_row_and_seed_has_its_result(place: Path, table: dict[str, Any]) -> None:
    assert [row["row"] for row in table["rows"]] == NAMES
    assert table["failures"] == {}
    assert len(files(place / "out/ablate")) == 8
    stored = read_json(place / "out/ablate/cross-entropy-only-1.json")
    assert (stored["row"], stored["seed"], stored["part"]) == ("cross-entropy only", 1, "validation")
    assert stored["training"]["tokens"] == 512
    assert stored["environment"]["torch_threads"] >= 1
    assert {row["train_tokens"] for row in table["rows"]} == {512}
    assert all(row["tokens_per_s"] > 0 for row in table["rows"])
    written = {path.name for path in (place / "out/ablate").iterdir()} - set(files(place / "out/ablate"))
    assert written == {"targets", "ablation.json", "table.md", "ablation.png", "ablation.svg"}  # no held-out folder


def test_stages_are_shared_by_rows_and_seeds(place: Path, table: dict[str, Any]) -> None:
    kinds = [path.name.rpartition("-")[0] for path in (place / "out/work").iterdir()]
    assert kinds.count("corpus") == 1
    assert kinds.count("train") == 8
    assert kinds.count("cache-prose") == kinds.count("cache-verse") == 2  # one for each seed
    assert kinds.count("align") == 2


def test_judged_as_a_reader_would(place: Path, table: dict[str, Any]) -> None:
    """Perplexity of one student and one target, worked out from logits."""
    stored = read_json(place / "out/ablate/default-0.json")
    (folder,) = (place / "out/work").glob("corpus-*")
    part = open_corpus(folder).validation
    ids = torch.from_numpy(part.token_ids.astype(np.int64))

    def log_p(model: Path) -> torch.Tensor:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        with torch.no_grad():
            return torch.log_softmax(loaded(ids).logits[:, :-1].double(), -1)

    def per_window(log_p: torch.Tensor) -> np.ndarray:
        return -log_p.gather(2, ids[:, 1:, None]).squeeze(2).sum(1).numpy()

    ours = per_window(log_p(place / f"out/work/train-{stored['student_key']}/student"))
    np.testing.assert_allclose(stored["windows"]["nll"], ours, atol=1e-3)
    assert stored["windows"]["tokens"] == [ids.shape[1] - 1] * len(ids)
    means = {name: ours[part.domain == i].mean() / (ids.shape[1] - 1) for i, name in enumerate(("verse", "prose"))}
    assert stored["perplexity"]["verse"] == pytest.approx(math.exp(means["verse"]), rel=1e-5)
    assert stored["perplexity"]["mixed"] == pytest.approx(math.exp((means["verse"] + means["prose"]) / 2), rel=1e-5)

    alone = per_window(log_p(place / "prose"))
    found = next(row for row in table["rows"] if row["row"] == "one teacher")["target_perplexity"]
    assert found["verse"] == pytest.approx(math.exp(alone[part.domain == 0].mean() / (ids.shape[1] - 1)), rel=1e-4)


def test_differences_are_of_the_stored_windows(place: Path, table: dict[str, Any]) -> None:
    assert table["rows"][0]["difference"] is None
    for row, stem in zip(table["rows"][1:], ("cross-entropy-only", "features", "one-teacher"), strict=True):
        pairs = [
            (read_json(place / f"out/ablate/{stem}-{seed}.json"), read_json(place / f"out/ablate/default-{seed}.json"))
            for seed in (0, 1)
        ]
        expected = np.mean(
            [math.log(ours["perplexity"]["mixed"] / first["perplexity"]["mixed"]) for ours, first in pairs]
        )
        found = row["difference"]["mixed"]
        assert found["nats"] == pytest.approx(expected, abs=1e-5)
        assert found["seeds"] == 2
        assert found["standard_error"] > 0
    targets = {row["row"]: row["target_perplexity"] for row in table["rows"]}
    assert targets["cross-entropy only"] is None
    assert targets["features"] == targets["default"] != targets["one teacher"]


def test_a_second_run_trains_and_judges_nothing_and_says_the_same(place: Path, table: dict[str, Any]) -> None:
    before, students = files(place / "out/ablate"), stages(place)
    again = run(place / "recipe.yaml", place / "out", rows=place / "rows.yaml")
    assert again["rows"] == table["rows"]
    assert files(place / "out/ablate") == before
    assert stages(place) == students


def test_held_out_text_is_judged_on_request_by_the_same_students(place: Path, table: dict[str, Any]) -> None:
    students = stages(place)
    damaged = place / "out/ablate/held-out/one-teacher-1.json"
    damaged.parent.mkdir()
    damaged.write_text("{ half of it")
    found = run(place / "recipe.yaml", place / "out", rows=place / "rows.yaml", held_out=True, jobs=1)
    assert stages(place) == students
    assert found["part"] == "held_out"
    assert len(files(place / "out/ablate/held-out")) == 8
    for ours, validation in zip(found["rows"], table["rows"], strict=True):
        assert ours["perplexity"] != validation["perplexity"]
    with pytest.raises(BadInput, match=r"finished students, and 4 are not \(default #2\); run without it first"):
        run(place / "recipe.yaml", place / "out", rows=place / "rows.yaml", held_out=True, seeds=3)


def test_sealed_results_are_those_of_held_out_and_need_no_student(place: Path, tmp_path: Path) -> None:
    """A study goes on from its JSON files alone: neither students nor the teachers' answers travel."""
    sealed = run(place / "recipe.yaml", tmp_path / "out", rows=place / "rows.yaml", seeds=1, seal=True)
    assert sealed["part"] == "validation"
    here = tmp_path / "out/ablate"
    assert len(files(here / "held-out")) == 4
    assert not (here / "held-out/table.md").exists()  # nobody has read them
    for path in [*(tmp_path / "out/work").glob("train-*"), *(tmp_path / "out/work").glob("cache-*")]:
        shutil.rmtree(path)
    before = files(here) | files(here / "held-out")
    assert run(place / "recipe.yaml", tmp_path / "out", rows=place / "rows.yaml", seeds=1)["rows"] == sealed["rows"]
    opened = run(place / "recipe.yaml", tmp_path / "out", rows=place / "rows.yaml", seeds=1, held_out=True)
    assert files(here) | files(here / "held-out") == before
    assert not list((tmp_path / "out/work").glob("train-*"))
    asked = run(place / "recipe.yaml", place / "out", rows=place / "rows.yaml", seeds=1, held_out=True)
    assert [row["perplexity"] for row in asked["rows"]] == [row["perplexity"] for row in opened["rows"]]


def test_one_seed_alone_is_that_of_the_whole(place: Path, table: dict[str, Any], tmp_path: Path) -> None:
    """Machines share a study: each takes a seed, and the JSON files are put together."""
    alone = run(
        place / "recipe.yaml", tmp_path / "out", rows=place / "rows.yaml", seeds=1, first_seed=1, only=["one teacher"]
    )
    assert [row["seeds"] for row in alone["rows"]] == [[1], [1]]
    for name in ("default-1.json", "one-teacher-1.json"):
        ours, theirs = (read_json(root / "out/ablate" / name) for root in (tmp_path, place))
        assert ours["key"] == theirs["key"]
        assert ours["windows"] == theirs["windows"]


def test_a_row_that_fails_does_not_lose_the_others_and_tokens_are_everyones(place: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.yaml"
    diverges = "  diverges: {train: {learning_rate: 1.0e+18, max_grad_norm: 1.0e+18, warmup_fraction: 0}}\n"
    rows.write_text("rows:\n  default: {}\n" + diverges + "  uniform: {fusion: {weights: uniform}}\n")
    found = run(place / "recipe.yaml", tmp_path / "out", rows=rows, seeds=1, jobs=1, tokens=256)
    assert [(row["row"], row["train_tokens"]) for row in found["rows"]] == [("default", 256), ("uniform", 256)]
    assert list(found["failures"]) == ["diverges #0"]
    assert "lower train.learning_rate" in found["failures"]["diverges #0"]
    assert "Not judged: diverges #0" in (tmp_path / "out/ablate/table.md").read_text()


def test_a_row_whose_inputs_are_missing_is_refused_before_any_work(place: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.yaml"
    rows.write_text("rows:\n  default: {}\n  gone: {teachers: [{name: verse, model: no/such}]}\n")
    with pytest.raises(BadInput, match=r"^row 'gone': "):
        run(place / "recipe.yaml", tmp_path / "out", rows=rows)
    assert not (tmp_path / "out").exists()
