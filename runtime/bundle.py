"""A bundle on disk: refused when it is damaged, incomplete, unsafe or too new; otherwise each file checked when first opened.

Shipped files are immutable. `local/` is what this device adds: each item beside its own hash, replaced atomically, and free to
be deleted at any time, so an item that is absent or does not fit its hash reads as absent.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from edgestill.runtime.errors import BundleError, OutputRefused
from edgestill.runtime.files import write_atomically
from edgestill.runtime.manifest import LOCAL, MANIFEST, Manifest
from edgestill.runtime.manifest_reader import COPY_AGAIN, read_manifest, unsafe_name

__all__ = ["Bundle", "open_bundle", "read_local", "read_manifest", "verify_bundle", "write_local"]

_EXTERNAL_DATA = re.compile(rb"\x0a\x08location\x12([\x01-\x7f]|[\x80-\xff][\x01-\x7f])", re.DOTALL)
"""A StringStringEntryProto with key `location`, up to the length of its value: how a tensor names the file it lies in."""


@dataclass
class Bundle:
    """An open bundle. `path` is the only way to a shipped file."""

    folder: Path
    manifest: Manifest
    verify: bool = True
    """False skips hashes, never the digest or the structure."""
    _checked: set[str] = field(default_factory=set, repr=False)

    def __contains__(self, name: str) -> bool:
        """Whether the bundle ships `name`."""
        return name in self.manifest.files

    def path(self, name: str) -> Path:
        """Where `name` lies, after checking its hash the first time (with the files an ONNX graph keeps its values in).

        Raises:
            BundleError: the bundle does not list it, or its content is not what the manifest says.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.folder / name}: is not part of this bundle; build it again with what you need")
        file = self.folder / name
        if name not in self._checked:
            problem = _hash_problem(self.folder, name, self.manifest) if self.verify else None
            if problem is not None:
                raise BundleError(f"{problem}; {COPY_AGAIN}")
            if name.endswith(".onnx"):
                for data in external_files(file):
                    self.path((PurePosixPath(name).parent / data).as_posix())
            self._checked.add(name)
        return file


def open_bundle(path: Path, verify: bool = True) -> Bundle:
    """Open the bundle in folder `path`: digest and structure are checked now, hashes by `Bundle.path`.

    Raises:
        BundleError: everything that is wrong with the structure, in one line.
    """
    folder = Path(path).resolve()
    manifest = read_manifest(folder)
    problems = _structure_problems(folder, manifest)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise BundleError(f"{'; '.join(problems[:5])}{more}; {COPY_AGAIN}")
    return Bundle(folder, manifest, verify)


def verify_bundle(path: Path) -> list[str]:
    """Every problem of the bundle in folder `path`, one line each; empty when it is whole. Reads every shipped file."""
    folder = Path(path).resolve()
    try:
        manifest = read_manifest(folder)
    except BundleError as refusal:
        return [str(refusal)]
    problems = _structure_problems(folder, manifest)
    for name in sorted(manifest.files):
        if _is_plain_file(folder, name) and (folder / name).stat().st_size == manifest.files[name].size:
            problem = _hash_problem(folder, name, manifest)
            if problem is not None:
                problems.append(problem)
            elif name.endswith(".onnx"):
                beside = ((PurePosixPath(name).parent / data).as_posix() for data in external_files(folder / name))
                problems += [
                    f"{folder / name}: keeps values in {d!r}, which is not listed"
                    for d in beside
                    if d not in manifest.files
                ]
    return list(dict.fromkeys(problems))


def external_files(graph: Path) -> list[str]:
    """The files an ONNX graph keeps tensor values in, relative to it, as the graph spells them; sorted.

    Found by the bytes of the field that names them: the runtime has no ONNX parser, and onnxruntime would open whatever
    file is named there without asking for its hash.
    """
    with graph.open("rb") as handle:
        if graph.stat().st_size == 0:
            return []
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = {data[m.end() : m.end() + _varint(m.group(1))] for m in _EXTERNAL_DATA.finditer(data)}
    return sorted(name.decode("utf-8", "replace") for name in found)


def _varint(data: bytes) -> int:
    return data[0] if len(data) == 1 else (data[0] & 0x7F) | data[1] << 7


def write_local(bundle: Bundle, name: str, data: bytes) -> Path:
    """Put `data` under `local/<name>` with its hash beside it, each by rename; returns the path.

    Raises:
        OutputRefused: `name` is not a plain relative path, or the folder can't be written.
    """
    file = _local_path(bundle.folder, name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, data)
        write_atomically(_hash_file(file), hashlib.sha256(data).hexdigest().encode() + b"\n")
    except OSError as error:
        raise OutputRefused(
            f"{file}: can't be written ({error.strerror}); make {bundle.folder / LOCAL} writable"
        ) from error
    return file


def read_local(bundle: Bundle, name: str) -> bytes | None:
    """The content of `local/<name>`, or None when it is absent or does not fit its hash (make it again)."""
    file = _local_path(bundle.folder, name)
    try:
        data, declared = file.read_bytes(), _hash_file(file).read_text("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return data if hashlib.sha256(data).hexdigest() == declared else None


def _local_path(folder: Path, name: str) -> Path:
    why = unsafe_name(name)
    file = folder / LOCAL / name
    if why is None and file.resolve() != file:
        why = "passes through a symlink"
    if why is not None:
        raise OutputRefused(f"{name!r} {why}; items of {LOCAL}/ have plain relative names")
    return file


def _hash_file(file: Path) -> Path:
    return file.with_name(file.name + ".sha256")


def _structure_problems(folder: Path, manifest: Manifest) -> list[str]:
    """What a walk over the folder shows without reading files: links, odd, undeclared and missing files, wrong sizes."""
    problems: list[str] = []
    blocked: set[str] = set()  # reported already: what lies under these is not missing as well
    try:
        found = _walk(folder, "")
    except OSError as error:
        return [f"{error.filename}: can't be read ({error.strerror})"]
    for name, mode in found:
        if stat.S_ISLNK(mode):
            problems.append(f"{folder / name}: is a symlink; a bundle holds real files and folders")
            blocked.add(name)
        elif not stat.S_ISREG(mode):
            problems.append(f"{folder / name}: is neither a file nor a folder")
            blocked.add(name)
        elif name != MANIFEST and name not in manifest.files:
            problems.append(f"{folder / name}: is not listed in {MANIFEST}; only {LOCAL}/ may hold other files")
    for name, entry in manifest.files.items():
        if blocked & {name, *map(str, PurePosixPath(name).parents)}:
            continue
        if not _is_plain_file(folder, name):
            problems.append(f"{folder / name}: is missing")
        elif (size := (folder / name).stat().st_size) != entry.size:
            problems.append(f"{folder / name}: has {size} bytes, the manifest says {entry.size}")
    return problems


def _walk(folder: Path, prefix: str) -> list[tuple[str, int]]:
    """(POSIX name, mode) of everything under `folder` that is not a real folder; `local/` is not entered, links neither."""
    out = []
    for entry in sorted(os.scandir(folder / prefix), key=lambda e: e.name):
        name = f"{prefix}/{entry.name}" if prefix else entry.name
        mode = entry.stat(follow_symlinks=False).st_mode
        if not stat.S_ISDIR(mode):
            out.append((name, mode))
        elif name != LOCAL:
            out += _walk(folder, name)
    return out


def _is_plain_file(folder: Path, name: str) -> bool:
    """Whether `name` is a real file inside `folder` with no symlink on the way."""
    path = folder / name
    return path.is_file() and path.resolve() == path


def _hash_problem(folder: Path, name: str, manifest: Manifest) -> str | None:
    entry = manifest.files[name]
    try:
        with (folder / name).open("rb") as handle:
            actual = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        return f"{folder / name}: can't be read ({error.strerror})"
    if actual != entry.sha256:
        return f"{folder / name}: sha256 is {actual[:12]}..., the manifest says {entry.sha256[:12]}..."
    return None
