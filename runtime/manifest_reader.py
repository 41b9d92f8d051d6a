"""manifest.json back into a `Manifest`: every field present, known, of its type, in its range, and the digest right.

A manifest comes from outside, so nothing is converted or guessed: duplicate keys, NaN, numbers as text, unknown fields and
anything nested too deep are refused, each by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
import typing
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from edgestill.runtime.errors import BundleError
from edgestill.runtime.manifest import LOCAL, MANIFEST, SCHEMA_VERSION, Manifest, ModelFacts, canonical_json

MAX_MANIFEST_BYTES = 16 << 20
"""A manifest is a few kilobytes; what is larger is not one."""
COPY_AGAIN = "copy or build the bundle again"
TOKENIZER = "tokenizer.json"


def manifest_from_json(data: bytes, source: str) -> Manifest:
    """Parse the bytes of manifest.json; `source` names it in messages.

    Raises:
        BundleError: not JSON, newer schema, wrong digest, or a field that is missing, unknown, mistyped or out of range.
    """
    body = _load_object(data, source)
    version = body.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{source}: schema_version is {version!r}, not a positive integer; {COPY_AGAIN}")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{source}: schema_version {version} is newer than {SCHEMA_VERSION}, the newest known here; upgrade edgestill"
        )
    declared = body.pop("digest", None)
    try:
        actual = hashlib.sha256(canonical_json(body)).hexdigest()
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source}: {error}; {COPY_AGAIN}") from error
    if declared != actual:
        raise BundleError(f"{source}: digest is {actual[:12]}..., the file says {str(declared)[:12]}...; {COPY_AGAIN}")
    problems: list[str] = []
    manifest = _parse(Manifest, body, "", problems)
    if not problems:
        problems = _impossible_values(manifest)
    if problems:
        raise BundleError(f"{source}: {'; '.join(problems)}; {COPY_AGAIN}")
    return typing.cast(Manifest, manifest)


def unsafe_name(name: str) -> str | None:
    """Why `name` must not be used as a path inside a bundle, or None when it is a plain relative POSIX path."""
    if not name or any(ord(c) < 32 or ord(c) == 127 for c in name):
        return "is empty or holds control characters"
    if "\\" in name:
        return "holds a backslash"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or ":" in name:
        return "is an absolute path or names a drive"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "holds '..', '.' or an empty part"
    return None


def _load_object(data: bytes, source: str) -> dict[str, Any]:
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{source}: {len(data)} bytes, the limit is {MAX_MANIFEST_BYTES}; {COPY_AGAIN}")
    try:
        body = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source}: not valid JSON ({error}); {COPY_AGAIN}") from error
    if not isinstance(body, dict):
        raise BundleError(f"{source}: holds a {type(body).__name__}, not an object; {COPY_AGAIN}")
    return body


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return out


def _no_constants(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _parse(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """`value` as `kind` (a dataclass or a type annotation); problems are collected under the dotted name `where`."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _parse_dataclass(kind, value, where, problems)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if type(value) in arguments:
            return value
        return _parse(arguments[0], value, where, problems)
    if kind is Any:
        return value
    if origin is typing.Literal:
        if value not in arguments:
            problems.append(f"{where} is {value!r}, not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is dict and isinstance(value, dict):
        return {k: _parse(arguments[1], v, f"{where}[{k!r}]", problems) for k, v in value.items()}
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_parse(arguments[0], v, f"{where}[{i}]", problems) for i, v in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if typing.get_origin(kind) is not None or type(value) is not kind:
        problems.append(f"{where} is {_short(value)}, not {_kind_name(kind)}")
    return value


def _parse_dataclass(kind: type, value: Any, where: str, problems: list[str]) -> Any:
    prefix = f"{where}." if where else ""
    if not isinstance(value, dict):
        problems.append(f"{where} is {_short(value)}, not an object")
        return None
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    unknown, missing = sorted(value.keys() - set(names)), [n for n in names if n not in value]
    problems += [f"unknown field {prefix}{n}" for n in unknown] + [f"field {prefix}{n} is missing" for n in missing]
    fields = {n: _parse(hints[n], value[n], f"{prefix}{n}", problems) for n in names if n in value}
    return None if problems else kind(**fields)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _kind_name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)


def _impossible_values(manifest: Manifest) -> list[str]:
    """Ranges and cross-references that types can't express."""
    problems = []
    facts = manifest.model
    for field in dataclasses.fields(ModelFacts):
        value = getattr(facts, field.name)
        least = 0 if field.name == "parameters" else 1
        if type(value) is int and field.name != "bos_token_id" and value < least:
            problems.append(f"model.{field.name} is {value}, must be at least {least}")
    for token in (*facts.eos_token_ids, *([] if facts.bos_token_id is None else [facts.bos_token_id])):
        if not 0 <= token < facts.vocab_size:
            problems.append(f"special token {token} is outside the vocabulary of {facts.vocab_size}")
    for name, entry in manifest.files.items():
        if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
            problems.append(f"sha256 of {name} is {_short(entry.sha256)}, not 64 lowercase hex digits")
        if entry.size < 0:
            problems.append(f"size of {name} is {entry.size}")
    problems += name_problems(list(manifest.files))
    problems += [f"{n} is required and not listed" for n in (manifest.graph.file, TOKENIZER) if n not in manifest.files]
    return problems


def name_problems(names: list[str]) -> list[str]:
    """Unsafe names, names in reserved places, and names that are one on some file systems."""
    import unicodedata

    problems = [f"file name {n!r} {why}" for n in names if (why := unsafe_name(n)) is not None]
    problems += [f"{n} must not be listed" for n in names if n == MANIFEST or n.split("/")[0].casefold() == LOCAL]
    spelled: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name in sorted(names):
        for path in [*PurePosixPath(name).parents][:-1]:
            folder = str(path)
            first = folders.setdefault(unicodedata.normalize("NFC", folder).casefold(), folder)
            if first != folder:
                problems.append(f"folders {first!r} and {folder!r} differ only in case")
        first = spelled.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if first != name:
            problems.append(f"{first!r} and {name!r} differ only in case")
    problems += [f"{spelled[key]!r} is both a file and a folder" for key in sorted(spelled.keys() & folders.keys())]
    return list(dict.fromkeys(problems))


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle in folder `path`.

    Raises:
        BundleError: it is missing, a symlink, or anything `manifest_from_json` refuses.
    """
    file = path / MANIFEST
    if file.is_symlink():
        raise BundleError(f"{file}: is a symlink; a bundle holds real files, {COPY_AGAIN}")
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as missing:
        raise BundleError(
            f"{file}: there is no manifest, so {path} is not a bundle; give the folder of one"
        ) from missing
    except OSError as error:
        raise BundleError(f"{file}: can't be read ({error.strerror}); {COPY_AGAIN}") from error
    return manifest_from_json(data, str(file))
