"""Rows that a recipe suggests, rows of a file, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipes import write_recipe

from edgestill.compress.ablate_rows import Rows, merged, rows_of
from edgestill.profiles.load import load_recipe
from edgestill.runtime.errors import BadInput

FULL: dict[str, Any] = {
    "losses": {"features": {"prototypes": {}}, "attention": {}, "ranking": {}},
    "train": {"on_policy": {"fraction": 0.5}},
}


def derived(folder: Path, *, only: tuple[str, ...] = (), tokens: int | None = None, **changes: Any) -> Rows:
    return rows_of(load_recipe(str(write_recipe(folder, **changes))), None, tokens=tokens, only=only)


def from_file(folder: Path, text: str, **changes: Any) -> Rows:
    file = folder / "rows.yaml"
    recipe = write_recipe(folder, **changes)
    file.write_text(text, encoding="utf-8")
    return rows_of(load_recipe(str(recipe)), file, tokens=None, only=())


def names(rows: Rows) -> list[str]:
    return [row.name for row in rows.rows]


BASELINES = ["recipe", "cross-entropy only", "only verse", "only prose", "uniform fusion"]
FUSION = ["without calibration", "without floor", "without pooling"]


def test_a_plain_recipe_has_its_baselines_and_its_parts(tmp_path: Path) -> None:
    rows = derived(tmp_path)
    assert names(rows) == [*BASELINES, "without cross-entropy", *FUSION]
    assert rows.notes == []
    by_name = {row.name: row.loaded.recipe for row in rows.rows}
    baseline = by_name["cross-entropy only"].losses
    assert (baseline.output.weight, baseline.cross_entropy, baseline.features) == (0, 1, None)
    assert [t.name for t in by_name["only prose"].teachers] == ["prose"]
    assert by_name["uniform fusion"].fusion.weights == "uniform"
    assert by_name["without floor"].fusion.floor == 0
    assert by_name["without calibration"].fusion.entropy_temperature == by_name["recipe"].fusion.entropy_temperature


def test_every_part_that_a_recipe_has_is_left_out_once(tmp_path: Path) -> None:
    rows = derived(tmp_path, **FULL)
    parts = ["features", "attention", "ranking", "prototypes", "on-policy", "cross-entropy", "output"]
    assert names(rows) == [*BASELINES, *(f"without {part}" for part in parts), *FUSION]
    recipe = rows.rows[0].loaded.recipe
    for row in rows.rows[5:]:
        assert row.loaded.recipe != recipe
    without = {row.name: row.loaded.recipe for row in rows.rows}
    assert without["without features"].losses.features is None
    assert without["without features"].losses.attention == recipe.losses.attention
    assert without["without prototypes"].losses.features is not None
    assert without["without prototypes"].losses.features.prototypes is None
    assert without["without on-policy"].train.on_policy is None


def test_rows_that_train_the_same_student_are_kept_once_and_named(tmp_path: Path) -> None:
    rows = derived(tmp_path, fusion={"weights": "uniform"}, losses={"cross_entropy": 0.0})
    assert names(rows) == ["recipe", "cross-entropy only", "only verse", "only prose"]
    assert rows.notes == ["uniform fusion: left out, it is the same as 'recipe'"]
    alone = derived(tmp_path / "alone", teachers=[{"name": "verse", "model": "verse"}])
    assert names(alone) == ["recipe", "cross-entropy only", "without cross-entropy"]
    assert "only verse: left out, it is the same as 'recipe'" in alone.notes


def test_a_student_cut_from_a_teacher_keeps_it_in_every_row(tmp_path: Path) -> None:
    rows = derived(tmp_path, student={"init": "teacher:prose", "config": None, "layers": 2})
    assert "only prose" in names(rows)
    assert "only verse" not in names(rows)
    assert rows.notes == [
        "only verse: left out, for the student starts from teacher 'prose', which a recipe must then list"
    ]


def test_tokens_and_only(tmp_path: Path) -> None:
    rows = derived(tmp_path, tokens=640, only=("uniform fusion",))
    assert names(rows) == ["recipe", "uniform fusion"]
    assert {row.loaded.recipe.train.tokens for row in rows.rows} == {640}
    with pytest.raises(BadInput, match=r"--only 'uniform': there is no such row; did you mean 'uniform fusion'"):
        derived(tmp_path, only=("uniform",))


def test_merging_replaces_lists_and_values_and_takes_none_out() -> None:
    words = {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2], "f": 3}
    changes = {"a": {"c": {"g": 4, "d": None}, "h": {"i": None, "j": 5}}, "e": [7], "f": None, "k": None}
    assert merged(words, changes) == {"a": {"b": 1, "c": {"g": 4}, "h": {"j": 5}}, "e": [7]}
    assert words == {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2], "f": 3}


ROWS = """\
rows:
  default: {}
  Token weights 0.1: {fusion: {granularity: token, entropy_temperature: 0.1}}
  cut:
    student: {init: "teacher:prose", layers: 2, config: null}
  same as default: {fusion: {entropy_temperature: 0.1}}
"""


def test_rows_of_a_file(tmp_path: Path) -> None:
    rows = from_file(tmp_path, ROWS)
    assert names(rows) == ["default", "Token weights 0.1", "cut"]
    assert [row.file_stem for row in rows.rows] == ["default", "token-weights-0.1", "cut"]
    assert rows.rows[1].loaded.recipe.fusion.granularity == "token"
    assert rows.rows[2].loaded.recipe.student.init == "teacher:prose"
    assert rows.notes == ["same as default: left out, it is the same as 'default'"]


def test_everything_wrong_in_a_file_is_said_at_once_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        from_file(
            tmp_path,
            "rows:\n"
            "  default: {}\n"
            "  one: {fusion: {granularitty: token}}\n"
            "  two:\n"
            "    train: {tokens: 5, seed: 3}\n"
            "    data: {sequence_length: 16}\n"
            "  three:\n"
            "    losses:\n"
            "      cross_entropy: -1\n"
            "  four: {teachers: null}\n",
        )
    file = tmp_path / "rows.yaml"
    lines = str(caught.value).split("\n")
    assert lines[0] == f"{file}:3: rows.one.fusion.granularitty: unknown key; did you mean 'granularity'?"
    assert {line.split(":")[1] for line in lines} == {"3", "5", "6", "9", "10"}
    assert sum("is the same for all rows" in line for line in lines) == 3
    assert lines[-1] == f"{file}:10: rows.four.teachers: is missing; add it"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("rows: {}\n", ":1: rows: has 0 items"),
        ("row: {}\n", ":1: row: unknown key"),
        ("- a\n", ":1: holds no section of keys"),
        ("rows:\n  a: {}\n  a: {}\n", ":3: rows.a: is written twice"),
        ("rows:\n  a b: {}\n  a+b: {fusion: {floor: 0}}\n", ":3: rows.a+b: has the file name of row 'a b'"),
        ("rows:\n  a: {}\n  ../b: {}\n", ":3: rows.../b: is not a row's name"),
        ("rows:\n  a:\n", ":2: rows.a: has no value"),
        ("rows: [a\n", "not YAML"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(BadInput) as caught:
        from_file(tmp_path, text)
    assert line in str(caught.value)
    assert str(tmp_path / "rows.yaml") in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    loaded = load_recipe(str(write_recipe(tmp_path)))
    with pytest.raises(BadInput, match=r"none\.yaml: there is no such file"):
        rows_of(loaded, tmp_path / "none.yaml", tokens=None, only=())
