"""A teacher's answers on the training windows, stored once (by cache_capture.py) and read by memory map.

    cache.json               written last: teacher hash, precision, corpus hash, V, mode, size (k, or the number of draws N),
                             seed of the draws, calibration, shards with sha256
    shard-00000.safetensors  `windows` int64 [m]; for the T - 1 answers (token 1 to T - 1) of each window:
        both modes           ids uint16 (uint32 when V > 65,536) [m, T-1, width];
                             entropy, entropy_calibrated, label_logp float16 [m, T-1]
        top_k, width k       logp float16 [m, T-1, k], tail_logp float16 [m, T-1]
        sampling,            counts uint8 (uint16 from 256 draws) [m, T-1, width];
          width min(N, V)    unused slots repeat the first id with count 0

Log-probabilities are at temperature 1, computed in float32, rounded to float16 (at most 2**-8 nats off below 16, 4 + 2 bytes a
bucket); `tail_logp` is taken from the complement and is -inf where k = V. Both entropies are exact over the whole vocabulary,
one at temperature 1 and one at the teacher's calibration temperature, and the true token's log-probability is exact too: so
one cache serves every rule of fusion. Teachers are stored apart and fused when they are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgestill.compress.cache_answers import ARRAYS, Mode
from edgestill.compress.cache_shards import map_shard
from edgestill.runtime.errors import BadInput

MANIFEST = "cache.json"
LAYOUT = 2
REPAIR = "delete the folder and build again"


@dataclass(frozen=True)
class CachedRows:
    """Answers for n = B * (T - 1) positions, window-major, on one device.

    ids int64 [n, width]; logp float32 [n, width]; all else float32 [n], nats. top_k: the most likely token first. sampling:
    logp is log(count / N), `tail_logp` is -inf, and unused slots repeat the first slot, id and logp.
    """

    ids: Tensor
    logp: Tensor
    tail_logp: Tensor
    entropy: Tensor
    """At temperature 1."""
    entropy_calibrated: Tensor
    """At the teacher's calibration temperature."""
    label_logp: Tensor


class TeacherCache:
    """Stored answers, memory-mapped. Safe to read from several threads; a shard is hashed when it is first used."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.teacher: str = manifest["teacher"]
        self.vocabulary: int = manifest["vocabulary"]
        self.mode: Mode = manifest["mode"]
        self.size: int = manifest["size"]
        self.sequence_length: int = manifest["sequence_length"]
        self.calibration: float = manifest["calibration"]
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self._shard_windows: int = manifest["shard_windows"]
        self._arrays = [map_shard(folder / shard["file"])[1] for shard in self._shards]
        self.windows: npt.NDArray[np.int64] = np.concatenate([a["windows"] for a in self._arrays])
        self._hashed: set[int] = set()

    def rows(self, window_ids: npt.NDArray[np.int64], device: torch.device | None = None) -> CachedRows:
        """The answers on windows int64 [B], in that order (repeats allowed), on `device` (default: the CPU).

        They travel as they are stored (4 bytes a bucket) and are widened where they arrive.

        Raises:
            BadInput: a window that was not captured, or a shard whose hash is wrong.
        """
        places = self._places(window_ids)
        stored: dict[str, Tensor] = {}
        for name in ARRAYS[self.mode]:
            first = self._arrays[0][name]
            values = np.empty((len(places), *first.shape[1:]), first.dtype)
            for i, (shard, row) in enumerate(places):
                values[i] = self._arrays[shard][name][row]
            stored[name] = torch.from_numpy(values).flatten(0, 1).to(device or "cpu", non_blocking=True)
        wide = {name: values.to(torch.int64 if name == "ids" else torch.float32) for name, values in stored.items()}
        if self.mode == "sampling":
            wide |= self._from_counts(wide.pop("counts"))
        return CachedRows(**wide)

    def _from_counts(self, counts: Tensor) -> dict[str, Tensor]:
        """log(count / N) of counts float32 [n, width], and an empty tail."""
        unused = 1 - counts.clamp(max=1)
        filled = counts + unused * counts[:, :1]  # several times as fast on a CPU as torch.where, and as log of 0
        logp = (filled / self.size).log_()
        return {"logp": logp, "tail_logp": torch.full_like(logp[:, 0], -torch.inf)}

    def _places(self, window_ids: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """(shard, row in it) of each window, in shards whose hash is right."""
        place = np.searchsorted(self.windows, window_ids)
        wrong = self.windows[np.minimum(place, len(self.windows) - 1)] != window_ids
        if wrong.any():
            raise BadInput(
                f"{self.folder}: window {window_ids[wrong][0]} is not among the {len(self.windows)} captured; {REPAIR}"
            )
        places = [divmod(p, self._shard_windows) for p in place.tolist()]
        for shard in {shard for shard, _ in places} - self._hashed:
            self._check(shard)
        return places

    def _check(self, i: int) -> None:
        entry, file = self._shards[i], self.folder / self._shards[i]["file"]
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise BadInput(
                f"{file}: sha256 {digest[:12]}..., {MANIFEST} declares {entry['sha256'][:12]}...; delete the folder"
            )
        self._hashed.add(i)


def open_cache(
    folder: Path, *, teacher_sha256: str, corpus_sha256: str, mode: Mode | None = None, size: int | None = None
) -> TeacherCache:
    """The finished cache in `folder`.

    Args:
        teacher_sha256: `TeacherFacts.weights_sha256` of the teacher whose answers are wanted.
        corpus_sha256: `Corpus.sha256` of the text.
        mode, size: what is expected to be stored; None takes what is there.

    Raises:
        BadInput: unfinished, of another teacher, text, mode or size, or a shard of another length.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder}: no readable {MANIFEST}, the capture is not finished; {REPAIR}") from error
    expected = {
        "layout": LAYOUT,
        "teacher_sha256": teacher_sha256,
        "corpus_sha256": corpus_sha256,
        "mode": mode,
        "size": size,
    }
    for key, value in expected.items():
        if value is not None and manifest.get(key) != value:
            raise BadInput(f"{folder}: {key} is {manifest.get(key)!r}, wanted {value!r}; {REPAIR}")
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        length = file.stat().st_size if file.is_file() else 0
        if length != shard["size"]:
            raise BadInput(f"{file}: {length} bytes where {MANIFEST} declares {shard['size']}; {REPAIR}")
    return TeacherCache(folder, manifest)


def open_caches(folders: Sequence[Path], teachers_sha256: Sequence[str], *, corpus_sha256: str) -> list[TeacherCache]:
    """The finished caches of several teachers, which can be fused: one mode, one vocabulary, one window length.

    Raises:
        BadInput: as `open_cache`, or two caches that do not fit together.
    """
    caches = [
        open_cache(folder, teacher_sha256=sha256, corpus_sha256=corpus_sha256)
        for folder, sha256 in zip(folders, teachers_sha256, strict=True)
    ]
    for cache in caches[1:]:
        for what in ("mode", "vocabulary", "sequence_length"):
            ours, first = getattr(cache, what), getattr(caches[0], what)
            if ours != first:
                raise BadInput(
                    f"{cache.folder}: {what} {ours!r}, but {caches[0].folder.name} has {first!r}; caches are fused only "
                    f"with their like: {REPAIR}"
                )
    return caches
