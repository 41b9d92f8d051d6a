"""Writing a bundle: complete beside its place, then renamed into it.

    <name>.tmp-<pid>     being written by that process; removed when it fails, or by the next writer when it died
    <name>.old-<pid>     the bundle that was there before, moved aside for the moment of the rename

A bundle comes in two steps, since its own report is measured on it: `stage_bundle` (everything but report/, already a bundle
that verifies), then `finish_bundle`. Files are copied, never linked: what ships must not change with the work folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgestill.runtime.bundle import open_bundle
from edgestill.runtime.errors import BadInput, OutputRefused
from edgestill.runtime.files import write_atomically
from edgestill.runtime.manifest import LOCAL, MANIFEST, FileEntry, Manifest, manifest_to_json
from edgestill.runtime.manifest_reader import name_problems, read_manifest

Content = Path | bytes


def stage_bundle(target: Path, manifest: Manifest, contents: Mapping[str, Content]) -> Path:
    """Write the bundle beside `target` and return that folder: complete and verifiable, not yet in its place.

    Args:
        target: where the bundle will be; absent, empty, or an older bundle.
        manifest: what it says of files is replaced by what is written here.
        contents: POSIX name inside the bundle -> the bytes, or the file to copy (a link is followed).

    Raises:
        OutputRefused: `target` holds something that is no bundle.
        BadInput: a name that must not be in a bundle.
        OSError: the disk is full, read-only, ...; nothing is left behind.
    """
    _require_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(target)
    staged = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        staged.mkdir()
        _add_files(staged, dataclasses.replace(manifest, files={}), contents)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return staged


def finish_bundle(staged: Path, report_files: Mapping[str, Content], target: Path) -> None:
    """Add `report_files` (bundle names: report/...) to the staged bundle and rename it to `target`.

    A bundle that was at `target` is removed once the new one is there; its local/ is kept when both manifests have the same
    digest, since it was measured on the same bytes.

    Raises:
        OutputRefused, BadInput, OSError: as `stage_bundle`; the staged folder is removed, what was at `target` stays.
    """
    try:
        _require_replaceable(target)
        _add_files(staged, read_manifest(staged), report_files)
        aside = _move_aside(target)
        try:
            staged.rename(target)
        except BaseException:
            if aside is not None:
                aside.rename(target)
            raise
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _sync(target.parent)
    if aside is not None:
        _retire(aside, target)


def tokenizer_files(checkpoint: Path) -> dict[str, Content]:
    """What a bundle needs of the checkpoint's tokenizer: bundle name -> file or bytes.

    tokenizer.json; tokenizer_config.json (onnxruntime-genai asks for it) and generation_config.json where they exist; and
    chat_template.jinja, which older checkpoints keep inside tokenizer_config.json.

    Raises:
        BadInput: there is no tokenizer.json.
    """
    if not (checkpoint / "tokenizer.json").is_file():
        raise BadInput(
            f"{checkpoint} has no tokenizer.json; save it with a fast tokenizer (AutoTokenizer, save_pretrained)"
        )
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    files: dict[str, Content] = {name: checkpoint / name for name in names if (checkpoint / name).is_file()}
    if (checkpoint / "chat_template.jinja").is_file():
        files["chat_template.jinja"] = checkpoint / "chat_template.jinja"
    elif (template := _template_in(checkpoint / "tokenizer_config.json")) is not None:
        files["chat_template.jinja"] = template.encode()
    return files


def _template_in(tokenizer_config: Path) -> str | None:
    """The chat template inside tokenizer_config.json: text, or a list of named ones of which `default` is meant."""
    if not tokenizer_config.is_file():
        return None
    try:
        fields: dict[str, Any] = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    except ValueError as broken:
        raise BadInput(f"{tokenizer_config} is not JSON ({broken}); restore it") from broken
    template = fields.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


# ------------------------------------------------------------------------------------------------------- the folder


def _add_files(staged: Path, manifest: Manifest, contents: Mapping[str, Content]) -> None:
    """Copy `contents` into `staged` and write the manifest of old and new files; everything is on disk afterwards."""
    problems = name_problems([*manifest.files, *contents])
    problems += [f"{name!r} is there already" for name in contents if name in manifest.files]
    if problems:
        raise BadInput(f"{'; '.join(problems)}; give each file of a bundle a plain name of its own")
    files = dict(manifest.files)
    for name, content in contents.items():
        path = staged / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            shutil.copyfile(content, path)
        _sync(path)
        with path.open("rb") as handle:
            files[name] = FileEntry(hashlib.file_digest(handle, "sha256").hexdigest(), path.stat().st_size)
    write_atomically(staged / MANIFEST, manifest_to_json(dataclasses.replace(manifest, files=files)).encode())
    for folder in {(staged / name).parent for name in contents} | {staged}:
        _sync(folder)
    open_bundle(staged, verify=False)


def _require_replaceable(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputRefused(f"{target} is no folder; remove it or choose another place for the bundle")
    if target.is_dir() and not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise OutputRefused(f"{target} holds files and is no bundle; empty it or choose another place for the bundle")


def _move_aside(target: Path) -> Path | None:
    """Rename what is at `target`; returns where it went, or None when there was nothing."""
    if not target.exists():
        return None
    aside = target.with_name(f"{target.name}.old-{os.getpid()}")
    target.rename(aside)
    return aside


def _retire(aside: Path, target: Path) -> None:
    """Remove the replaced bundle; its local/ moves to `target` if both have the same digest."""
    if (aside / LOCAL).is_dir() and not (target / LOCAL).exists() and _digest(aside) == _digest(target):
        (aside / LOCAL).rename(target / LOCAL)
    shutil.rmtree(aside, ignore_errors=True)


def _clear_leftovers(target: Path) -> None:
    """What dead writers left: half-written folders go; a bundle that was aside when its writer died comes back."""
    for path in sorted(target.parent.glob(f"{target.name}.*-*")):
        kind, _, pid = path.name.removeprefix(f"{target.name}.").partition("-")
        if kind not in ("tmp", "old") or not pid.isdigit() or (int(pid) != os.getpid() and _alive(int(pid))):
            continue
        if kind == "tmp":
            shutil.rmtree(path, ignore_errors=True)
        elif target.exists():
            _retire(path, target)
        else:
            path.rename(target)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _digest(bundle: Path) -> str | None:
    """The digest that the manifest in `bundle` states."""
    try:
        fields = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    digest = fields.get("digest") if isinstance(fields, dict) else None
    return digest if isinstance(digest, str) else None


def _sync(path: Path) -> None:
    """Make the file, or the names in the folder, survive a power cut."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
