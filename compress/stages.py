"""The folder of a build: stages that run once, resume, and never leave half a result under a final name.

A stage writes into `work/<name>-<key>.partial/` and is renamed to `work/<name>-<key>/` when it is done; `stage.json` inside
lists its inputs and the sha256 of every file. The key hashes the words it depends on, its inputs' keys and its code's
revision, so a finished stage is reused exactly when nothing it depends on has changed. What a killed stage left in `.partial`
is handed to the next run, which goes on from there.

Of several processes (processes.py) the first holds the lock and runs the stages; the others wait and read. A stage that is run
`together` is run by all of them and published by the first. The folder is one that all of them see.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgestill.compress.processes import from_first, is_first
from edgestill.runtime.errors import EdgestillError, OutputRefused
from edgestill.runtime.files import write_atomically
from edgestill.runtime.manifest import canonical_json
from edgestill.runtime.progress import Progress

MARK = "build.json"
LOCK = ".lock"
STAGE = "stage.json"
NO_SPACE_LEFT = 4 << 20
"""Less free space than this (bytes) explains a failed write of a library that hides the error number."""
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
STATED_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
WRITE_FAILED = ("file write failed", "unexpected pos", "requested and")
"""Words of torch.save (the first two) and of numpy's save when the system took fewer bytes than it was given."""


@dataclass(frozen=True)
class Stage:
    """A finished stage: where its files are, its key, what it reported, whether it was reused, and its seconds."""

    name: str
    folder: Path
    key: str
    info: dict[str, Any]
    reused: bool
    seconds: float


class Workspace:
    """One build folder. Use within `locked()`."""

    def __init__(
        self, root: Path, progress: Progress, *, force: bool = False, brief: bool = False, asking: bool = False
    ) -> None:
        self.root = root
        self.progress = progress
        self.force = force
        self.brief = brief
        """Stages that were done before are not worth a line each."""
        self.asking = asking
        """Only say what stages are called and whether they are there: none is run, hashed or read."""
        self.done: list[Stage] = []

    @contextmanager
    def locked(self) -> Iterator[Workspace]:
        """Claim the folder for this process, or for all that work together.

        Raises:
            OutputRefused: it is not empty and not a build of ours, another process holds it, or it cannot be written.
        """
        if not is_first():
            from_first(lambda: None)
            yield self
            return
        self._claim()
        descriptor = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                raise OutputRefused(
                    f"{self.root}: another build is running in this folder (process {holder}); wait for it or give another --out"
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            from_first(lambda: None)
            yield self
        finally:
            os.close(descriptor)  # the kernel frees the lock, also when the process is killed

    def _claim(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise OutputRefused(f"{self.root}: is a file, not a folder; give another --out")
        if self.root.is_dir() and not (self.root / MARK).is_file() and any(self.root.iterdir()):
            raise OutputRefused(f"{self.root}: is not empty and not a build (no {MARK}); give another --out")
        try:
            (self.root / "work").mkdir(parents=True, exist_ok=True)
            if not (self.root / MARK).is_file():
                write_atomically(self.root / MARK, b'{"format": 1, "tool": "edgestill"}\n')
            os.close(os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o644))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise OutputRefused(
                    f"{self.root}: cannot be written ({os.strerror(error.errno)}); give another --out"
                ) from error
            raise

    def stage(
        self,
        name: str,
        title: str,
        inputs: Mapping[str, Any],
        run: Callable[[Path], Mapping[str, Any] | None],
        *,
        together: bool = False,
    ) -> Stage:
        """Run a stage, or hand back what it made before.

        Args:
            inputs: everything the result depends on, JSON-able: words, hashes, keys of other stages, a code revision.
            run: writes into the folder it is given (which may hold what an interrupted run left) and returns facts
                about the result, JSON-able.
            together: every process runs it, and the facts are those of the first; else the first process alone.
        """
        key = stage_key(name, inputs)
        final = self.root / "work" / f"{name}-{key}"
        if self.asking:
            return Stage(name, final, key, {}, final.is_dir(), 0.0)
        partial = final.with_name(final.name + ".partial")
        info = from_first(lambda: self._done_before(final, partial))
        if info is not None:
            if not self.brief:
                self.progress.say(f"{title}: done before, unchanged")
            return self._keep(Stage(name, final, key, info, True, 0.0))
        self.progress.stage(title)
        started = time.perf_counter()

        def publish(facts: Mapping[str, Any] | None) -> dict[str, Any]:
            info = dict(facts or {})
            record = {"inputs": dict(inputs), "info": info, "files": _hashes(partial)}
            write_atomically(partial / STAGE, json.dumps(record, indent=1, sort_keys=True).encode())
            partial.rename(final)
            return info

        with explained_write_errors(self.root):
            if together:
                facts = run(partial)
                info = from_first(lambda: publish(facts))
            else:
                info = from_first(lambda: publish(run(partial)))
        return self._keep(Stage(name, final, key, info, False, time.perf_counter() - started))

    def _done_before(self, final: Path, partial: Path) -> dict[str, Any] | None:
        """The info of the stage in `final`; None, and `partial` is there to be filled, when it has to be run."""
        if self.force:
            shutil.rmtree(final, ignore_errors=True)
            shutil.rmtree(partial, ignore_errors=True)
        info = self._finished(final)
        if info is None:
            partial.mkdir(parents=True, exist_ok=True)
        return info

    def _keep(self, stage: Stage) -> Stage:
        self.done.append(stage)
        return stage

    def _finished(self, folder: Path) -> dict[str, Any] | None:
        """The info of a finished stage whose files are all as they were written; a damaged one is removed."""
        if not folder.is_dir():
            return None
        try:
            record = json.loads((folder / STAGE).read_text(encoding="utf-8"))
            files, info = record["files"], record["info"]
        except (OSError, ValueError, KeyError):
            files, info = None, {}
        if files != _hashes(folder):
            self.progress.say(f"{folder.name}: changed since it was written; it is made again")
            shutil.rmtree(folder)
            return None
        return dict(info)


def stage_key(name: str, inputs: Mapping[str, Any]) -> str:
    """12 hex digits that change with anything the stage depends on."""
    return hashlib.sha256(canonical_json({"name": name, **inputs})).hexdigest()[:12]


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a stage but its record, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != STAGE:
            with path.open("rb") as handle:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(handle, "sha256").hexdigest()
    return found


@contextmanager
def explained_write_errors(root: Path) -> Iterator[None]:
    """Give a write that failed below `root` its error number back, where a library has hidden it.

    numpy reports a full disk as an OSError without a number, shutil as a list, torch.save and safetensors as errors of their
    own.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, EdgestillError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        number = _hidden_error_number(str(error), shutil.disk_usage(root).free)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(root)) from error


def _hidden_error_number(text: str, free: int) -> int | None:
    """The error number behind the words of a library, or None when they are not about writing."""
    if found := STATED_NUMBER.search(text):
        number = int(found[1] or found[2])
        return number if number in WRITE_ERRORS else None
    if free < NO_SPACE_LEFT:
        return errno.ENOSPC
    if not any(words in text for words in WRITE_FAILED):
        return None
    limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return errno.EFBIG if limited else errno.ENOSPC
