"""Where recipes and profiles are: packaged names and paths. Needs no YAML library, so that a device can list them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from edgestill.profiles.nearest import nearest
from edgestill.runtime.errors import BadInput

Kind = Literal["recipes", "profiles"]

HOME = Path(__file__).parent
FOLDERS: dict[Kind, Path] = {"recipes": HOME / "recipes", "profiles": HOME}
SUFFIXES = (".yaml", ".yml")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
RESERVED = ("work", "build.json", "student", "ablate")
"""Names of the folder of a build (ARCHITECTURE.md); a profile's bundle lies beside them under the profile's name."""


def packaged(kind: Kind) -> list[str]:
    """Names of the packaged recipes or device profiles, sorted."""
    return sorted(path.stem for path in FOLDERS[kind].glob("*.yaml"))


def is_path(value: str) -> bool:
    """A value with the suffix .yaml or .yml or with a path separator is a path; anything else is a packaged name."""
    separators = [s for s in ("/", os.sep, os.altsep) if s]
    return value.lower().endswith(SUFFIXES) or any(s in value for s in separators)


def name_of(value: str) -> str:
    """The name of a recipe or profile: the stem of its file.

    Raises:
        BadInput: the stem cannot name a folder of a build.
    """
    if not is_path(value):
        return value
    name = Path(value).stem
    if not NAME.fullmatch(name) or name in RESERVED:
        raise BadInput(
            f"{value}: the file's name {name!r} becomes a folder's name; "
            f"rename it with letters, digits, '_', '.' and '-' (not {' or '.join(RESERVED)})"
        )
    return name


def find(value: str, kind: Kind) -> Path:
    """The file that `value` (a packaged name or a path) means.

    Raises:
        BadInput: no such packaged name or file, or a folder where a file is needed.
    """
    one = kind.removesuffix("s")
    if is_path(value):
        path = Path(value)
        if path.is_dir():
            raise BadInput(f"{value}: is a folder; give the YAML file of the {one}")
        if not path.is_file():
            raise BadInput(f"{value}: no such file; give a {one}'s YAML file or one of {', '.join(packaged(kind))}")
        return path.absolute()
    known = packaged(kind)
    if value not in known:
        hint = nearest(value, known)
        every = "" if hint.startswith("known") else f" known: {', '.join(known)};"
        raise BadInput(f"{value}: unknown {one}; {hint}{every or ';'} for a file give a path, such as ./{value}.yaml")
    return FOLDERS[kind] / f"{value}.yaml"


def base_of(path: Path) -> Path:
    """The folder that relative paths inside a recipe start from.

    A user's recipe: its own folder. A packaged one: the root of the checkout that holds it, else the current folder.
    """
    if path.parent != FOLDERS["recipes"]:
        return path.parent
    root = HOME.parent
    return root if (root / "pyproject.toml").is_file() else Path.cwd()


def description(path: Path) -> str:
    """The first comment line of a packaged file, without its `#`; empty when there is none."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
