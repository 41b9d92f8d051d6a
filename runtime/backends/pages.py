"""Giving memory back that a mapped file of weights leaves behind (Linux; elsewhere nothing is done).

onnxruntime maps the weights' file, packs most of it into buffers of its own, and keeps the mapping: pages that were read once
stay resident beside their packed copies. So do those around each row of the embedding that a prompt looks up, for the kernel maps
64 KiB about a page: soon the whole table, which is there once more as the packed head. Where nothing was written, dropping pages
loses nothing; what is read again comes back from the page cache. What the parser and the optimizer freed lies in malloc's heap
until it is trimmed.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

MADV_DONTNEED = 4
MAPS, SMAPS = Path("/proc/self/maps"), Path("/proc/self/smaps")
WORTH_IT = 8 << 20
"""Bytes of mapped weights from which pages are dropped after a prompt's chunk too; what that takes, half a millisecond, is a small
part of a chunk only in a model of some size."""


class MappedWeights:
    """The mappings of one file of weights that a session holds, as they were when it was opened."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._unwritten = set(unwritten_mappings(file)) if sys.platform.startswith("linux") else set()
        self.worth_it = sum(end - start for start, end in self._unwritten) >= WORTH_IT
        """Whether pages are to be dropped while the session is used."""

    def release(self) -> None:
        """Drop the pages from memory. A range is looked up first: what stood there may be another's by now."""
        if not self._unwritten:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        for start, end in self._unwritten & set(_mappings(self._file)):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def trim_heap() -> None:
    """What malloc holds free goes back to the system (glibc)."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _mappings(file: Path) -> list[tuple[int, int]]:
    """[start, end) addresses at which this process maps `file`."""
    name = str(file.resolve())
    lines = MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    found = [line.split(maxsplit=5) for line in lines]  # addresses, permissions, offset, device, inode, path
    return [_range(fields[0]) for fields in found if fields[5:] == [name]]


def _range(addresses: str) -> tuple[int, int]:
    start, _, end = addresses.partition("-")
    return int(start, 16), int(end, 16)


def unwritten_mappings(file: Path) -> list[tuple[int, int]]:
    """[start, end) addresses at which this process has mapped `file` and changed nothing."""
    if not file.exists() or not SMAPS.exists():
        return []
    name, found, current = str(file.resolve()), [], None
    for line in SMAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, path
        if not fields[0].endswith(":"):
            current = _range(fields[0]) if len(fields) == 6 and fields[5] == name else None
        elif fields[0] == "Anonymous:" and fields[1] == "0" and current is not None:
            found.append(current)
    return found
