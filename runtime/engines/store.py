"""Where engines are kept and found: built when missing, once, whoever asks first.

    <bundle>/local/engines/<fingerprint>/      engine, engine.json, build.log
    <home>/engines/<bundle digest>/<fp>/       the same, where the bundle can't be written
    <bundle>/engines/<fp>.engine               shipped: declared in the manifest, hash checked like any file
    <home>/timing/<flavour>-<version>-<card>   measured kernel times, for all bundles: never read from a bundle
    <home>/kernels/<fingerprint>               what TensorRT-RTX compiled on this card, sealed as well

`engine.json` holds the fingerprint, the seal (trust.py) and what the build took. A lock lets the second process wait for the
first; it then finds what that one built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgestill.runtime.bundle import Bundle
from edgestill.runtime.child import Emit
from edgestill.runtime.engines.builder import EngineBuilder
from edgestill.runtime.engines.flavour import Library
from edgestill.runtime.engines.plan import (
    EnginePlan,
    Fingerprint,
    fingerprint_from,
    fingerprint_of,
    plan_of,
    refuse_card,
)
from edgestill.runtime.engines.trust import SEAL_CHARACTERS, home, is_sealed, seal
from edgestill.runtime.errors import BundleError, OutputRefused
from edgestill.runtime.files import write_atomically
from edgestill.runtime.manifest import LOCAL, MANIFEST

ENGINE, RECORD, LOG, KERNELS = "engine", "engine.json", "build.log", "kernels"
SHIPPED = "engines"
"""Folder of a bundle with engines that were built where the bundle was."""


@dataclass(frozen=True)
class StoredEngine:
    """An engine that may be opened."""

    data: bytes
    fingerprint: Fingerprint
    record: dict[str, Any]
    """What the build took: seconds, peak_rss_mib, peak_device_mib, bytes, layers; `folder` where it is kept."""
    built_now: bool


@dataclass(frozen=True)
class Target:
    """The card an engine is for; `ahead`: not the one at hand."""

    compute_capability: str
    driver: str | None
    gpu: str | None = None
    ahead: bool = False


def wanted(bundle: Bundle, version: str, target: Target) -> tuple[EnginePlan, Fingerprint]:
    """The engine that `bundle` needs on `target`, and its fingerprint.

    Raises:
        BundleError: the bundle was not made for an engine.
        BadInput: the card can't run it.
    """
    plan = plan_of(bundle.manifest)
    refuse_card(plan, target.compute_capability, target.gpu)
    return plan, fingerprint_of(plan, version, target.compute_capability, target.driver, target.gpu)


def find_engine(bundle: Bundle, version: str, target: Target) -> StoredEngine | None:
    """The engine for `target`, if one is here that may be opened: built for it, or ahead for cards of its kind."""
    _, fingerprint = wanted(bundle, version, target)
    ahead = dataclasses.replace(fingerprint, driver=None)
    for kind in dict.fromkeys((fingerprint, ahead)):
        for folder in places(bundle, kind):
            found = _read(folder, kind)
            if found is not None:
                return found
    return _shipped(bundle, ahead)


class CompiledKernels:
    """What TensorRT-RTX compiled for one engine on this card, in the home folder, behind its seal."""

    def __init__(self, fingerprint: Fingerprint, driver: str | None) -> None:
        self._name = f"{fingerprint.digest}-{driver}"
        self._path = home() / KERNELS / self._name

    def read(self) -> bytes:
        """What this machine kept; empty when there is nothing, or something else."""
        try:
            content = self._path.read_bytes()
        except OSError:
            return b""
        sealed, data = content[:SEAL_CHARACTERS], content[SEAL_CHARACTERS:]
        try:
            return data if is_sealed(data, self._name, sealed.decode("ascii", "replace")) else b""
        except OutputRefused:  # no key: nothing that this machine sealed
            return b""

    def write(self, data: bytes) -> None:
        """Keep `data`; where the folder can't be written the next process compiles again."""
        with contextlib.suppress(OSError, OutputRefused):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, seal(data, self._name).encode() + data)


def others(bundle: Bundle, fingerprint: Fingerprint) -> list[str]:
    """Why each engine that is here is not the one of `fingerprint`, one line each."""
    lines = []
    for place in (folder.parent for folder in places(bundle, fingerprint)):
        for record in sorted(place.glob(f"*/{RECORD}")):
            try:
                fields = json.loads(record.read_text(encoding="utf-8"))["fingerprint"]
                differences = fingerprint.differences(fingerprint_from(fields))
            except (ValueError, KeyError, TypeError):
                lines.append(f"{record.parent.name}: its record can't be read")
                continue
            lines.append(f"{record.parent.name}: {'; '.join(differences) or 'not sealed by this machine, or damaged'}")
    return lines


def build_engine(bundle: Bundle, library: Library, target: Target, emit: Emit | None = None) -> StoredEngine:
    """The engine for `target`: found, or built here and kept; runs in this process.

    Raises:
        BadInput, BundleError: TensorRT refuses.
        OutputRefused: neither the bundle nor the home folder can be written.
    """
    plan, fingerprint = wanted(bundle, library.version, target)
    folder = _writable(places(bundle, fingerprint))
    from filelock import FileLock

    with FileLock(folder.with_name(f"{folder.name}.lock")):
        found = find_engine(bundle, library.version, target)  # while this process waited
        if found is not None:
            return found
        return _build(bundle, library, target, plan, fingerprint, folder, emit)


def _build(
    bundle: Bundle,
    library: Library,
    target: Target,
    plan: EnginePlan,
    fingerprint: Fingerprint,
    folder: Path,
    emit: Emit | None,
) -> StoredEngine:
    from edgestill.runtime.gpu import open_gpu, watched_memory
    from edgestill.runtime.gpu_watch import GpuWatch
    from edgestill.runtime.workload import peak_resident_mib

    seal(b"", fingerprint.digest)  # a key that can't be kept is refused before the minutes that a build takes
    lines: list[str] = []
    builder = EngineBuilder(
        library, lines.append, None if emit is None else lambda _, done, total: emit(done, total, "steps")
    )
    timing = _timing_file(library, target, plan)
    known = timing.read_bytes() if timing.is_file() else b""
    memory = None if target.ahead else watched_memory(open_gpu())  # ahead nothing runs on a GPU
    watch = GpuWatch(None, memory)
    started = time.perf_counter()
    try:
        built = builder.build(
            bundle.path(plan.graph_file),
            plan,
            bundle.manifest.graph,
            bundle.manifest.model,
            target.compute_capability if target.ahead else None,
            known,
        )
    finally:
        watch.end()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / LOG, ("\n".join(lines) + "\n").encode())
    record = {
        "seconds": round(time.perf_counter() - started, 3),
        "parse_seconds": round(built.parse_seconds, 3),
        "peak_rss_mib": peak_resident_mib(),
        "peak_device_mib": None if memory is None else round(memory.peak_mib, 1),
        "device_memory": None if memory is None else memory.reason or "of the building process",
        "bytes": len(built.data),
        "layers": built.layers,
        "attention_layers": built.attention_layers,
        "built_ahead": target.ahead,
        "gpu": target.gpu,
    }
    content = {
        "fingerprint": dataclasses.asdict(fingerprint),
        "seal": seal(built.data, fingerprint.digest),
        "build": record,
    }
    write_atomically(folder / ENGINE, built.data)
    write_atomically(folder / RECORD, (json.dumps(content, indent=1) + "\n").encode())
    if built.timing_cache:
        timing.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(timing, built.timing_cache)
    return StoredEngine(built.data, fingerprint, {**record, "folder": str(folder)}, built_now=True)


def _timing_file(library: Library, target: Target, plan: EnginePlan) -> Path:
    """Where what was timed on this card is kept for the next engine."""
    card = re.sub("[^a-z0-9]+", "-", (target.gpu or "").lower()).strip("-")
    words = (plan.flavour, library.version, target.compute_capability, card)
    return home() / "timing" / "-".join(filter(None, words))


def places(bundle: Bundle, fingerprint: Fingerprint) -> tuple[Path, Path]:
    """The folders that an engine may be kept in, the preferred one first."""
    manifest = hashlib.sha256((bundle.folder / MANIFEST).read_bytes()).hexdigest()[:16]
    return (
        bundle.folder / LOCAL / "engines" / fingerprint.digest,
        home() / "engines" / manifest / fingerprint.digest,
    )


def _read(folder: Path, fingerprint: Fingerprint) -> StoredEngine | None:
    """The engine in `folder`, or None when it is absent, another one, damaged, or not this machine's."""
    try:
        data = (folder / ENGINE).read_bytes()
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        found, sealed = fingerprint_from(content["fingerprint"]), str(content["seal"])
        record = dict(content["build"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if found != fingerprint or not is_sealed(data, fingerprint.digest, sealed):
        return None
    return StoredEngine(data, fingerprint, {**record, "folder": str(folder)}, built_now=False)


def _shipped(bundle: Bundle, fingerprint: Fingerprint) -> StoredEngine | None:
    """The engine that the manifest declares for this fingerprint."""
    name = f"{SHIPPED}/{fingerprint.digest}.engine"
    if name not in bundle:
        return None
    data = (bundle.folder / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != bundle.manifest.files[name].sha256:  # of the very bytes that are opened
        raise BundleError(
            f"{bundle.folder / name}: is not the engine that the manifest declares; copy the bundle again"
        )
    return StoredEngine(
        data, fingerprint, {"bytes": len(data), "folder": str(bundle.folder / SHIPPED)}, built_now=False
    )


def _writable(folders: tuple[Path, ...]) -> Path:
    """The first of `folders` whose parent can be made and written.

    Raises:
        OutputRefused: none can.
    """
    for folder in folders:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder.parent, os.W_OK | os.X_OK):
            return folder
    raise OutputRefused(
        f"no engine can be kept in {' or '.join(str(f.parent) for f in folders)}; make one of them writable"
    )
