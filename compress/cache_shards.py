"""Shards of a teacher cache: safetensors files with one JSON entry of metadata, read by memory map.

A shard is whole or absent (written beside, renamed). Its metadata says how it was captured, so a resumed capture keeps a
shard only when it would write the same bytes again.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgestill.runtime.manifest import canonical_json


def shard_path(folder: Path, i: int) -> Path:
    """Where shard number `i` of a cache lies."""
    return folder / f"shard-{i:05d}.safetensors"


def write_shard(path: Path, arrays: dict[str, npt.NDArray[Any]], head: dict[str, Any]) -> None:
    """Write beside, flush to the disk, rename. `head` says how it was captured."""
    from safetensors.numpy import save_file

    temporary = path.with_suffix(".tmp")
    # one entry: the order of several is not fixed, and equal captures must be equal bytes
    save_file(arrays, temporary, metadata={"capture": canonical_json(head).decode()})
    with temporary.open("rb+") as handle:
        os.fsync(handle.fileno())
    temporary.replace(path)


class ShardWriter:
    """Writes one shard in a thread while the next is computed. What goes wrong there is raised by the next call or at the end."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "shard-writer")
        self._writing: Future[None] | None = None

    def write(self, path: Path, arrays: dict[str, npt.NDArray[Any]], head: dict[str, Any]) -> None:
        """Wait for the shard before, then hand over this one: two at most are in memory."""
        self._wait()
        self._writing = self._thread.submit(write_shard, path, arrays, head)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            self._wait()


def map_shard(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Metadata and memory-mapped arrays of a safetensors file (8 bytes of header size, JSON header, raw arrays)."""
    kinds = {"U8": "u1", "U16": "<u2", "U32": "<u4", "I64": "<i8", "F16": "<f2"}
    data = np.memmap(path, np.uint8, mode="r").view(
        np.ndarray
    )  # every slice of a memmap object costs microseconds more
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:begin].tobytes())
    metadata = json.loads(header.pop("__metadata__")["capture"])
    arrays = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        arrays[name] = data[begin + start : begin + stop].view(kinds[entry["dtype"]]).reshape(entry["shape"])
    return metadata, arrays


def holds(path: Path, head: dict[str, Any], windows: npt.NDArray[np.int64]) -> bool:
    """Whether `path` holds these windows captured in just this way. Renaming makes a shard whole or absent."""
    if not path.is_file():
        return False
    metadata, arrays = map_shard(path)
    return metadata == json.loads(canonical_json(head)) and np.array_equal(arrays["windows"], windows)
