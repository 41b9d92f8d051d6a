"""pydantic's errors in plain words: what was given, what the limit is, what to write instead. No type tags, no URLs."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Union

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from edgestill.profiles.nearest import nearest
from edgestill.profiles.strict_yaml import KeyPath

PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$": "use letters, digits, '_', '.' and '-', at most 64",
    r"^(config|teacher:.+)$": "write config or teacher:NAME",
    r"^\d{1,2}\.\d$": "write it like '8.9'",
}
"""Every pattern of schema.py -> its repair (a test compares the two)."""

_WRONG_SHAPE = {"model_type", "dict_type", "list_type", "tuple_type", "literal_error", "string_type"}
"""Errors that say a value is of another branch of a union altogether."""


def explain(error: ValidationError, model: type[BaseModel], data: Any) -> Iterator[tuple[KeyPath, str]]:
    """(key path, one line of words) for every error; the branches of a union are merged into one line."""
    unions: dict[KeyPath, list[tuple[KeyPath, str, ErrorDetails]]] = {}
    for detail in error.errors(include_url=False):
        path, union, branch = _locate(detail["loc"], data)
        if union is None:
            yield path, _words(detail, model, path)
        else:
            unions.setdefault(union, []).append((path, branch, detail))
    for union, found in unions.items():
        wrong = {branch for path, branch, detail in found if path == union and detail["type"] in _WRONG_SHAPE}
        fitting = [(path, detail) for path, branch, detail in found if branch not in wrong]
        for path, detail in fitting:
            yield path, _words(detail, model, path)
        if not fitting:
            given = found[0][2]["input"]
            yield union, f"{shown(given)} does not fit; write {' or '.join(_shape(d) for _, _, d in found)}"


def shown(value: Any) -> str:
    """A value as the user wrote it, on one line and short."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a section of keys"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def key_words(path: KeyPath) -> str:
    """`teachers[0].name`; keys that are not plain words are quoted, so that a message stays one line."""
    words = ""
    for part in path:
        if isinstance(part, int):
            words += f"[{part}]"
        else:
            plain = part if part and part.isprintable() and " " not in part and len(part) <= 80 else shown(part)
            words += f".{plain}" if words else plain
    return words


def _locate(loc: tuple[int | str, ...], data: Any) -> tuple[KeyPath, KeyPath | None, str]:
    """pydantic's location without its labels: (key path, path of the union it passed through or None, branch label)."""
    path: list[int | str] = []
    union, branch = None, ""
    for position, part in enumerate(loc):
        if part in (data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()):
            data = data[part]
        elif part == "[key]":
            continue
        elif position == len(loc) - 1 and not _is_label(part):
            data = None  # a missing key or item
        else:
            union, branch = tuple(path), str(part)
            continue
        path.append(part)
    return tuple(path), union, branch


def _is_label(part: int | str) -> bool:
    """pydantic labels union branches with types: a class name, or something with a bracket."""
    return isinstance(part, str) and ("[" in part or part[:1].isupper())


def _words(detail: ErrorDetails, model: type[BaseModel], path: KeyPath) -> str:
    kind, given, limits = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "value_error":
        return str(limits["error"])
    if kind == "missing":
        if isinstance(path[-1], int):
            return f"value {path[-1] + 1} of the list is missing; add it"
        return "is missing; add it"
    if kind == "extra_forbidden":
        return _unknown_key(model, path)
    if given is None:
        return "has no value; write one or remove the line"
    if kind in ("int_type", "float_type"):
        return _not_a_number(given, whole=kind == "int_type")
    if kind == "string_type":
        if isinstance(given, (dict, list)):
            return f"{shown(given)} stands where one text is needed; write the text"
        return f"{shown(given)} is not text to YAML; write '{shown(given)}' in quotes"
    if kind == "bool_type":
        return f"{shown(given)} is neither true nor false; write true or false"
    if kind == "string_pattern_mismatch":
        return f"{shown(given)} does not fit; {PATTERNS.get(limits['pattern'], 'pattern ' + limits['pattern'])}"
    if kind == "literal_error":
        return f"{shown(given)} is not allowed; use {limits['expected']}"
    if kind in ("too_short", "too_long"):
        few = kind == "too_short"
        bound = f"at least {limits['min_length']}" if few else f"at most {limits['max_length']}"
        return f"has {limits['actual_length']} items (must have {bound}); {'add' if few else 'remove'} some"
    if kind in _BOUNDS:
        key, phrase, repair = _BOUNDS[kind]
        return f"{shown(given)} is out of range (must be {phrase} {limits[key]:g}); {repair} it"
    if kind in _WRONG_SHAPE:
        return f"{shown(given)} does not fit; write {_shape(detail)}"
    return f"{shown(given)} does not fit ({detail['msg']}); correct it"


_BOUNDS = {
    "greater_than": ("gt", "more than", "raise"),
    "greater_than_equal": ("ge", "at least", "raise"),
    "less_than": ("lt", "less than", "lower"),
    "less_than_equal": ("le", "at most", "lower"),
}


def _shape(detail: ErrorDetails) -> str:
    """What should stand there."""
    if detail["type"] == "literal_error":
        return str(detail["ctx"]["expected"])
    if detail["type"] in ("list_type", "tuple_type"):
        return "a list ([a, b] or lines that start with -)"
    return "a section of keys"


def _not_a_number(given: Any, *, whole: bool) -> str:
    needed = "a whole number" if whole else "a number"
    if isinstance(given, str):
        repair = yaml_number(given, whole=whole)
        return f"{shown(given)} is text to YAML; write {repair or needed}"
    if isinstance(given, float):
        nearby = {math.floor(given), math.ceil(given)}
        return f"{shown(given)} is not {needed}; write {' or '.join(map(str, sorted(nearby)))}"
    return f"{shown(given)} is not {needed}; write it in digits"


def yaml_number(text: str, *, whole: bool) -> str | None:
    """How the number that `text` means is written in YAML: `1e-5` is 1.0e-5, a whole `1e6` is 1000000; None: no number."""
    plain = text.strip().replace("_", "").lower()
    try:
        number = float(plain)
    except ValueError:
        return None
    if not plain.isascii() or abs(number) >= 1e18 or number != number:
        return None
    if number == int(number):
        return str(int(number))
    if whole:
        return None
    mantissa, _, exponent = plain.partition("e")
    if not exponent:
        return repr(number)
    digits = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"{digits}e{exponent if exponent[0] in '+-' else '+' + exponent}"


def _unknown_key(model: type[BaseModel], path: KeyPath) -> str:
    key = str(path[-1])
    known = list(_fields_at(model, path[:-1]))
    hint = nearest(key, known)
    if hint.startswith("known"):
        homes = [home for home, fields in _sections(model) if key in fields]
        if homes:
            return f"unknown key; it belongs in {homes[0]}"
    return f"unknown key; {hint}"


def _sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Iterable[str]]]:
    """(section name, its keys) of the model and of every section below it."""
    yield prefix or "the top level", model.model_fields
    for name, info in model.model_fields.items():
        for inner in _models(info.annotation):
            yield from _sections(inner, f"{prefix}.{name}" if prefix else name)


def _fields_at(model: type[BaseModel], path: KeyPath) -> Iterable[str]:
    """Known keys of the section at `path`."""
    annotation: Any = model
    for part in path:
        if isinstance(part, int):
            lists = [a for a in _branches(annotation) if typing.get_origin(a) in (list, tuple)]
            annotation = typing.get_args(lists[0])[0] if lists else None
        else:
            owners = [m for m in _models(annotation) if part in m.model_fields]
            annotation = owners[0].model_fields[part].annotation if owners else None
    return [name for found in _models(annotation) for name in found.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [a for a in _branches(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]


def _branches(annotation: Any) -> list[Any]:
    """The members of a union (Annotated unwrapped), or the annotation itself."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _branches(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [inner for a in typing.get_args(annotation) for inner in _branches(a)]
    return [annotation]
