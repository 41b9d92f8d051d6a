"""The rows of an ablation: the recipe, its baselines and the recipe without each of its parts, or the rows of a file.

    rows:
      default: {}                            # the first row is the one that all others are compared with
      no calibration: {fusion: {calibrate: false}}
      features: {losses: {features: {ratio: 0.2}}, train: {teacher_cache: never}}
      scratch: {student: {init: config, layers: null, config: {...}}}      # null takes a section out

Changes are merged into the recipe section by section; lists and single values replace what is there. Text, tokens and seed
are the same for every row, so they are not a row's to change. Rows that would train the same student are kept once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from edgestill.profiles.explain import explain
from edgestill.profiles.load import LoadedRecipe, read_text, refusal
from edgestill.profiles.nearest import nearest
from edgestill.profiles.schema import Recipe
from edgestill.profiles.strict_yaml import KeyPath, Problem, read_yaml
from edgestill.profiles.words import Words
from edgestill.runtime.errors import BadInput
from edgestill.runtime.manifest import canonical_json

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.+-]{0,39}")
FIXED: tuple[KeyPath, ...] = (("format",), ("data",), ("train", "tokens"), ("train", "seed"))
"""What all rows share: without the same text and tokens a comparison says nothing of the change."""
WEIGHTED = ("entropy", "label", "reinforced")
"""Ways of weighting that read `fusion.floor`."""


@dataclass(frozen=True)
class Row:
    """One line of the table: its name, what it changes, and the whole recipe that results."""

    name: str
    changes: dict[str, Any]
    loaded: LoadedRecipe

    @property
    def file_stem(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[ +]+", "-", self.name).lower()


@dataclass(frozen=True)
class Rows:
    """All rows, the first being the one that others are compared with, and what was left out and why."""

    rows: list[Row]
    notes: list[str]


def _named(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError("is not a row's name; use letters, digits, blanks, '_', '.', '+' and '-', at most 40")
    return name


class RowsFile(Words):
    """The file of `edgestill ablate --rows`."""

    rows: Annotated[dict[Annotated[str, AfterValidator(_named)], dict[str, Any]], Field(min_length=1)]


def rows_of(loaded: LoadedRecipe, file: Path | None, *, tokens: int | None, only: Sequence[str]) -> Rows:
    """The rows of `file`, or those that the recipe itself suggests.

    Args:
        tokens: instead of the recipe's train.tokens, for every row.
        only: names of the rows to keep, the first one always among them; none: all.

    Raises:
        BadInput: a line per problem of the file, or an unknown name in `only`.
    """
    words = read_yaml(loaded.text).data
    if tokens is not None:
        words = merged(words, {"train": {"tokens": tokens}})
    notes: list[str] = []
    if file is None:
        rows = [
            Row(name, changes, _recipe(loaded, merged(words, changes))) for name, changes in _derived(loaded, notes)
        ]
    else:
        rows = _read_rows(loaded, file, words)
    rows = _each_once(rows, notes)
    if unknown := [name for name in only if name not in [row.name for row in rows]]:
        raise BadInput(f"--only {unknown[0]!r}: there is no such row; {nearest(unknown[0], [r.name for r in rows])}")
    kept = [row for row in rows if not only or row.name in only or row is rows[0]]
    return Rows(kept, notes)


def merged(words: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `words` with nested `changes`; None takes a key out."""
    result = dict(words)
    for key, value in changes.items():
        old = result.pop(key, None)
        if isinstance(value, Mapping):
            result[key] = merged(old if isinstance(old, Mapping) else {}, value)
        elif value is not None:
            result[key] = value
    return result


# rows of a file ------------------------------------------------------------------------------------------------------


def _read_rows(loaded: LoadedRecipe, file: Path, words: dict[str, Any]) -> list[Row]:
    shown = str(file)
    if not file.is_file():
        raise BadInput(f"{shown}: there is no such file; write one with `rows:` and a section per row")
    document = read_yaml(read_text(file, shown, "file of rows"))
    problems = list(document.problems)
    names: list[str] = []
    if not document.broken and not isinstance(document.data, dict):
        problems.append(
            Problem(document.line_of(()), (), "holds no section of keys; write `rows:` and a section per row")
        )
    elif not document.broken:
        try:
            names = list(RowsFile.model_validate_json(json.dumps(document.data)).rows)
        except ValidationError as error:
            found = explain(error, RowsFile, document.data)
            problems += [Problem(document.line_of(path), path, what) for path, what in found]
    rows = []
    for name in names:
        changes = document.data["rows"][name]
        found_here = [*_not_a_rows_to_change(name, changes), *_misfits(name, changes, words)]
        problems += [Problem(document.line_of(path), path, what) for path, what in found_here]
        if not problems:
            rows.append(Row(name, changes, _recipe(loaded, merged(words, changes))))
    stems: dict[str, Row] = {}
    for row in rows:
        other = stems.setdefault(row.file_stem, row)
        if other is not row:
            path = ("rows", row.name)
            problems.append(
                Problem(document.line_of(path), path, f"has the file name of row {other.name!r}; rename one")
            )
    if problems:
        raise refusal(shown, problems)
    return rows


def _not_a_rows_to_change(name: str, changes: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    for path in FIXED:
        inner: Any = changes
        for part in path[:-1]:
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and path[-1] in inner:
            yield ("rows", name, *path), "is the same for all rows, or they could not be compared; change the recipe"


def _misfits(name: str, changes: Mapping[str, Any], words: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong with the recipe that this row makes."""
    data = merged(words, changes)
    try:
        Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        for path, what in explain(error, Recipe, data):
            yield ("rows", name, *path), what


def _recipe(loaded: LoadedRecipe, words: Mapping[str, Any]) -> LoadedRecipe:
    return dataclasses.replace(loaded, recipe=Recipe.model_validate_json(json.dumps(words)))


# rows that a recipe suggests -----------------------------------------------------------------------------------------


def _derived(loaded: LoadedRecipe, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and changes: the recipe, its baselines, and the recipe without each of its parts."""
    recipe, words = loaded.recipe, read_yaml(loaded.text).data
    yield "recipe", {}
    none = dict.fromkeys(("features", "attention", "ranking"))
    no_teachers = {"output": {"weight": 0}, "cross_entropy": 1, **none}
    yield "cross-entropy only", {"losses": no_teachers, "train": {"on_policy": None}}
    source = recipe.student.init.removeprefix("teacher:")
    for teacher, written in zip(recipe.teachers, words["teachers"], strict=True):
        name = f"only {teacher.name}"
        if source not in ("config", teacher.name):
            notes.append(
                f"{name}: left out, for the student starts from teacher {source!r}, which a recipe must then list"
            )
            continue
        yield name, {"teachers": [written], "fusion": {"weights": "uniform"}}
    yield "uniform fusion", {"fusion": {"weights": "uniform"}}
    yield from _without_losses(recipe)
    if recipe.quantize is not None:
        yield "in float", {"quantize": None}
    yield from _without_fusion_parts(recipe)


def _without_losses(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    losses, on_policy = recipe.losses, recipe.train.on_policy
    aligned = losses.features is not None or losses.attention is not None
    for part in ("features", "attention", "ranking"):
        if getattr(losses, part) is not None:
            yield f"without {part}", {"losses": {part: None}}
    if losses.features is not None:
        for part in ("stochastic", "prototypes"):
            if getattr(losses.features, part) is not None:
                yield f"without {part}", {"losses": {"features": {part: None}}}
    if on_policy is not None:
        yield "without on-policy", {"train": {"on_policy": None}}
    if losses.cross_entropy > 0 and losses.output.weight > 0:
        yield "without cross-entropy", {"losses": {"cross_entropy": 0}}
    if losses.output.weight > 0 and losses.cross_entropy > 0 and aligned:
        yield "without output", {"losses": {"output": {"weight": 0}, "ranking": None}, "train": {"on_policy": None}}


def _without_fusion_parts(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    fusion = recipe.fusion
    if fusion.weights == "entropy" and fusion.calibrate:
        yield "without calibration", {"fusion": {"calibrate": False}}
    if fusion.weights in WEIGHTED and fusion.floor > 0:
        yield "without floor", {"fusion": {"floor": 0}}
    if fusion.weights in ("entropy", "label") and fusion.granularity != "token":
        yield "without pooling", {"fusion": {"granularity": "token"}}


def _each_once(rows: list[Row], notes: list[str]) -> list[Row]:
    kept: dict[str, Row] = {}
    for row in rows:
        other = kept.setdefault(_essence(row.loaded.recipe), row)
        if other is not row:
            notes.append(f"{row.name}: left out, it is the same as {other.name!r}")
    return list(kept.values())


def _essence(recipe: Recipe) -> str:
    """A hash of what this recipe's student depends on: words that nothing would read are left out."""
    fusion, losses = recipe.fusion, recipe.losses
    words = recipe.model_dump(mode="json", include={"student", "losses", "train", "quantize"})
    teachers = [t.model_dump(mode="json", exclude={"weight", "domains"}) for t in recipe.teachers]
    listens = losses.output.weight > 0 or losses.features is not None or losses.attention is not None
    words["teachers"] = teachers if listens or recipe.student.init != "config" else teachers[:1]
    if not listens:
        words["losses"]["output"] = None
        words["train"] |= dict.fromkeys(("teacher_cache", "cache_top_k", "cache_mode", "cache_samples"))
    elif len(teachers) > 1:
        read = {"weights", "mix"}
        read |= {"floor"} if fusion.weights in WEIGHTED else set()
        read |= {"granularity", "ema_decay"} if fusion.weights in ("entropy", "label") else set()
        read |= {"entropy_temperature"} if fusion.weights == "entropy" else set()
        read |= {"calibrate", "calibration"} if fusion.weights in ("entropy", "reinforced") else set()
        read |= {"label_temperature"} if fusion.weights == "label" else set()
        read |= {"reinforced"} if fusion.weights == "reinforced" else set()
        words["fusion"] = fusion.model_dump(mode="json", include=read)
        words["shares"] = (
            [[t.weight, t.domains] for t in recipe.teachers] if fusion.weights in ("static", "routed") else None
        )
    return hashlib.sha256(canonical_json(words)).hexdigest()
