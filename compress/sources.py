"""Where text comes from: plain text, JSON lines, Parquet or a Hub data set, as one stream of documents.

Plain text is read whole (its blank lines mean something), rows go through `datasets` in streaming mode, so that nothing
is copied into the user's cache folder. Only UTF-8 is read; `\\r\\n` becomes `\\n`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from edgestill.profiles.schema import SourceSpec
from edgestill.profiles.words import Name
from edgestill.runtime.errors import BadInput

TEXT_SUFFIXES = (".txt", ".text", ".md")
ROW_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Suffix -> builder of `datasets`. A single file with any other suffix is plain text."""
_NAME: TypeAdapter[str] = TypeAdapter(Name)


@dataclass(frozen=True)
class Document:
    """Plain text that belongs together. `complete`: it ends here, and an end-of-document token follows it."""

    text: str
    complete: bool = True
    domain: str | None = None
    """As its row says under `domain_column`; None: the domain of its source."""


@dataclass(frozen=True)
class Exchange:
    """A prompt (chat messages with `role` and `content`) and the response that is to be learnt."""

    prompt: tuple[dict[str, str], ...]
    response: str
    where: str
    """File and row, for error messages."""
    domain: str | None = None
    """As in `Document`."""


def source_name(source: SourceSpec) -> str:
    """What the recipe calls this source: its path, or `hub@revision` with the subset and the split."""
    if source.path is not None:
        return source.path
    subset = f"/{source.subset}" if source.subset else ""
    return f"{source.hub}{subset}:{source.split}@{source.revision}"


def source_files(source: SourceSpec, resolve: Callable[[str], Path]) -> list[Path]:
    """The files of a local source, sorted; none for a Hub data set.

    Raises:
        BadInput: a missing file or folder, a folder without text, or plain text where columns are named.
    """
    if source.path is None:
        return []
    files = _files(resolve(source.path), source.path)
    for word in ("prompt_column", "domain_column"):
        plain = [file for file in files if file.suffix.lower() not in ROW_SUFFIXES]
        if plain and getattr(source, word) is not None:
            raise BadInput(f"{plain[0]}: {word} needs rows, this is plain text; use .jsonl or .parquet")
    return files


def source_hash(source: SourceSpec, resolve: Callable[[str], Path]) -> str:
    """sha256 over the names and bytes of a local source's files; of a Hub data set its full name with the revision.

    Raises:
        BadInput: a missing file or folder.
    """
    if source.path is None:
        return source_name(source)
    root, digest = resolve(source.path), hashlib.sha256()
    for file in _files(root, source.path):
        with file.open("rb") as handle:
            name = file.relative_to(root).as_posix() if file != root else file.name
            digest.update(f"{name}:{hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def read_source(source: SourceSpec, resolve: Callable[[str], Path], cache: Path) -> Iterator[Document | Exchange]:
    """The documents or exchanges of `source`, in order. Documents of nothing but white space are left out.

    Args:
        resolve: a path as written in the recipe -> a path on this machine.
        cache: a folder for what `datasets` must write; the caller deletes it.

    Raises:
        BadInput: a missing file or column, text that is not UTF-8, rows that cannot be parsed, a domain that is no name, an
            unreachable Hub.
    """
    if source.path is None:
        arguments: dict[str, Any] = {
            "path": source.hub,
            "name": source.subset,
            "revision": source.revision,
            "split": source.split,
        }
        yield from _items(source, _rows(source_name(source), cache, arguments), source_name(source))
        return
    for file in source_files(source, resolve):
        builder = ROW_SUFFIXES.get(file.suffix.lower())
        if builder is None:
            yield from _documents(file, source.separator)
        else:
            if builder == "json":
                read_utf8(file)
            arguments = {"path": builder, "data_files": [str(file)], "split": "train"}
            yield from _items(source, _rows(str(file), cache, arguments), str(file))


def read_utf8(path: Path) -> str:
    """The whole text of `path`.

    Raises:
        BadInput: it cannot be read, or is not UTF-8 (names the first wrong byte).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; check the path and its permissions") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8, the only encoding read; "
            "convert it, for instance with iconv -t UTF-8"
        ) from error
    return text.replace("\r\n", "\n")


def _files(path: Path, written: str) -> list[Path]:
    """`path` itself, or in a folder every text, JSON and Parquet file below it, sorted."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadInput(f"data source {written!r}: there is no {path}; correct `path`")
    known = (*TEXT_SUFFIXES, *ROW_SUFFIXES)
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in known)
    if not found:
        raise BadInput(f"data source {written!r}: the folder {path} holds no {' '.join(known)}; add one or name a file")
    return found


def _documents(file: Path, separator: str | None) -> Iterator[Document]:
    text = read_utf8(file)
    pieces = [text]
    if separator is not None:
        pieces = []
        lines: list[str] = []
        for line in text.split("\n"):
            if line.rstrip() == separator.rstrip():
                pieces.append("\n".join(lines))
                lines = []
            else:
                lines.append(line)
        pieces.append("\n".join(lines))
    for piece in pieces:
        if piece.strip():
            yield Document(piece if separator is None else piece.strip("\n"))


@contextmanager
def _quiet() -> Iterator[None]:
    """`datasets` logs an error before it raises it; ours is the one line the user should see."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _rows(where: str, cache: Path, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import datasets

    # ArrowInvalid is a ValueError; StopIteration is how `datasets` says that a JSON file has no line at all.
    known = (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError)
    with _quiet():
        try:
            yield from datasets.load_dataset(**arguments, streaming=True, cache_dir=str(cache))
        except known as error:
            reason = " ".join(str(error).split())[:200] or "no rows"
            raise BadInput(f"{where}: cannot be read as rows ({reason}); correct the file or the name") from error


def _items(source: SourceSpec, rows: Iterator[dict[str, Any]], where: str) -> Iterator[Document | Exchange]:
    for number, row in enumerate(rows, start=1):
        at = f"{where}, row {number}"
        domain = None if source.domain_column is None else _domain(row, source.domain_column, at)
        if source.prompt_column is not None and source.response_column is not None:
            prompt = _messages(_column(row, source.prompt_column, at), source.prompt_column, at)
            response = _text(_column(row, source.response_column, at), source.response_column, at)
            yield Exchange(prompt, response, at, domain)
        else:
            text = _text(_column(row, source.text_column, at), source.text_column, at)
            if text.strip():
                yield Document(text, domain=domain)


def _column(row: dict[str, Any], column: str, at: str) -> Any:
    if column not in row:
        raise BadInput(f"{at}: no column {column!r}, there are {', '.join(map(repr, row))}; correct the column's name")
    return row[column]


def _text(value: Any, column: str, at: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{at}: column {column!r} holds {type(value).__name__}, not text; correct the row or the column")
    return value.replace("\r\n", "\n")


def _domain(row: dict[str, Any], column: str, at: str) -> str:
    value = _column(row, column, at)
    try:
        return _NAME.validate_python(value, strict=True)
    except ValidationError as error:
        raise BadInput(
            f"{at}: column {column!r} holds {repr(value)[:80]}, which names no domain (up to 64 letters, digits, _ . and -, a "
            "letter or digit first); correct the row or the column"
        ) from error


def _messages(value: Any, column: str, at: str) -> tuple[dict[str, str], ...]:
    """A prompt is text (one user message) or a list of chat messages."""
    if not isinstance(value, list):
        return ({"role": "user", "content": _text(value, column, at)},)
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise BadInput(f"{at}: column {column!r} holds a message without role and content as text; correct the row")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)
