"""YAML to schema.py's words, every error at once with file and line.

    recipe = load_recipe("quickstart")            # packaged, or a path
    profile = load_profile("devices/kiosk.yaml")

A problem reads `file:line: section.key: what (value, limit); repair`. The file is written as it was given.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from edgestill.profiles.arithmetic import engine_field, precision_problem
from edgestill.profiles.explain import explain, key_words
from edgestill.profiles.locate import Kind, base_of, find, name_of, packaged
from edgestill.profiles.schema import LimitsFile, Profile, Recipe, Words
from edgestill.profiles.strict_yaml import Document, Problem, read_yaml
from edgestill.runtime.errors import BadInput

__all__ = [
    "LoadedProfile",
    "LoadedRecipe",
    "load_limits",
    "load_profile",
    "load_recipe",
    "packaged",
    "read_text",
    "refusal",
]

MAX_BYTES = 1 << 20
"""A recipe or profile is a page of text; more is the wrong file."""

W = TypeVar("W", bound=Words)


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where it came from. path: absolute; base: where its relative paths start; text: as read."""

    recipe: Recipe
    name: str
    path: Path
    base: Path
    text: str

    def resolve(self, relative: str) -> Path:
        """A path of the recipe on this machine: absolute ones stay, `~` is the home folder."""
        return self.base / Path(relative).expanduser()


@dataclass(frozen=True)
class LoadedProfile:
    """A profile and where it came from. path: absolute; text: as read."""

    profile: Profile
    name: str
    path: Path
    text: str


def load_recipe(name_or_path: str) -> LoadedRecipe:
    """The recipe of that packaged name or path.

    Raises:
        BadInput: no such recipe, or one line per problem in it.
    """
    name, path, shown, text = _open(name_or_path, "recipes")
    recipe, _ = _validate(text, shown, Recipe)
    return LoadedRecipe(recipe, name, path, base_of(path), text)


def load_profile(name_or_path: str) -> LoadedProfile:
    """The device profile of that packaged name or path.

    Raises:
        BadInput: no such profile, one line per problem in it, or a precision that its engine or GPU lacks.
    """
    name, path, shown, text = _open(name_or_path, "profiles")
    profile, document = _validate(text, shown, Profile)
    problem = precision_problem(profile)
    if problem is not None:
        where = tuple(engine_field(profile).split("."))
        raise refusal(shown, [Problem(document.line_of(where), where, problem)])
    return LoadedProfile(profile, name, path, text)


def load_limits(path: Path) -> dict[str, float]:
    """The limits in a file of `format: 1` and `limits:`.

    Raises:
        BadInput: no such file, or one line per problem in it.
    """
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file; write one with `format: 1` and `limits:`")
    found, _ = _validate(read_text(path, str(path), "file of limits"), str(path), LimitsFile)
    return dict(found.limits)


def _open(name_or_path: str, kind: Kind) -> tuple[str, Path, str, str]:
    """(name, absolute path, path as shown to the user, text)."""
    path = find(name_or_path, kind)
    shown = f"{name_or_path}.yaml" if path.stem == name_or_path else name_or_path
    return name_of(name_or_path), path, shown, read_text(path, shown, kind[:-1])


def read_text(path: Path, shown: str, what: str) -> str:
    """The text of a file of words, which messages call `shown`; `what` it is, in words.

    Raises:
        BadInput: it cannot be read, is far too long, or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except PermissionError:
        raise BadInput(f"{shown}: cannot be read (no permission); change its mode or its owner") from None
    if len(raw) > MAX_BYTES:
        raise BadInput(f"{shown}: is {len(raw)} bytes (limit {MAX_BYTES}); give the YAML file of a {what}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{shown}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8") from None


def _validate(text: str, shown: str, model: type[W]) -> tuple[W, Document]:
    document = read_yaml(text)
    problems = document.problems
    if not document.broken and not isinstance(document.data, dict):
        problems.append(Problem(document.line_of(()), (), "holds no section of keys; write `key: value` lines"))
    elif not document.broken:
        try:
            # by way of JSON, whose strict rules take a list for a pair and an integer for a float, and nothing else
            words = model.model_validate_json(json.dumps(document.data))
        except ValidationError as error:
            known = {problem.path for problem in problems}
            for path, what in explain(error, model, document.data):
                if not any(path[:n] in known for n in range(len(path) + 1)):
                    problems.append(Problem(document.line_of(path), path, what))
        else:
            if not problems:
                return words, document
    raise refusal(shown, problems)


def refusal(shown: str, problems: list[Problem]) -> BadInput:
    """One line per problem of the file that messages call `shown`, in the order of its lines."""
    lines = []
    for problem in sorted(problems, key=lambda p: p.line):
        where = f" {key_words(problem.path)}:" if problem.path else ""
        lines.append(f"{shown}:{problem.line}:{where} {problem.what}")
    return BadInput("\n".join(lines))
