"""Giving memory back that opening a session leaves behind (Linux with glibc; elsewhere nothing is done).

onnxruntime maps the weights' file, packs most of it into buffers of its own, and keeps the mapping: pages that were read once stay
resident beside their packed copies. Where none was written, dropping them loses nothing; what is read again, such as rows of
the embedding, comes back from the page cache. What the parser and the optimizer freed lies in malloc's heap until it is trimmed.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

MADV_DONTNEED = 4
SMAPS = Path("/proc/self/smaps")


def release_after_opening(mapped: Path) -> None:
    """Drop the unwritten pages of `mapped` from this process's mappings of it, and what malloc holds free."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for start, end in unwritten_mappings(mapped):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def unwritten_mappings(file: Path) -> list[tuple[int, int]]:
    """[start, end) addresses at which this process has mapped `file` and changed nothing."""
    if not file.exists() or not SMAPS.exists():
        return []
    name, found, current = str(file.resolve()), [], None
    for line in SMAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, path
        if not fields[0].endswith(":"):
            start, _, end = fields[0].partition("-")
            current = (int(start, 16), int(end, 16)) if len(fields) == 6 and fields[5] == name else None
        elif fields[0] == "Anonymous:" and fields[1] == "0" and current is not None:
            found.append(current)
    return found
