"""Ask a teacher once for its answers on the training windows, and store them (format: teacher_cache.py).

A shard is the unit of resume and of sharing: with torch.distributed initialised, process r of W answers the shards i with
i % W == r, into a folder that all of them see; the first one writes cache.json when all are done. The same batches are formed
whoever answers, so a killed capture, and one by several processes, ends in the same bytes. A thread writes a shard while the
next one is answered.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgestill.compress.cache_answers import ARRAYS, Mode, packed, sampled_answers, top_answers, uniforms
from edgestill.compress.cache_shards import ShardWriter, holds, shard_path
from edgestill.compress.corpus import Part
from edgestill.compress.processes import is_first, wait_for_all, world
from edgestill.compress.teacher_cache import LAYOUT, MANIFEST
from edgestill.compress.teachers import Teacher
from edgestill.runtime.errors import BadInput
from edgestill.runtime.files import write_atomically
from edgestill.runtime.progress import Progress, Task

SHARD_TOKENS = 1 << 17
"""37 MB at k = 64: small enough that a kill costs seconds to minutes of a teacher's work."""
LOGITS_BYTES = 128 << 20
"""Budget of the float32 logits and their temporaries."""
BYTES_PER_LOGIT = 24
"""Logits, their exponentials and two temporaries in float32; draws need a float64 sum instead of the latter."""
CPU_BYTES = 2 << 20
"""Logits that a CPU summarises at a time: beyond its own caches the same work takes up to four times as long."""


def capture(
    teacher: Teacher,
    part: Part,
    windows: npt.NDArray[np.int64],
    out: Path,
    *,
    mode: Mode = "top_k",
    size: int,
    seed: int = 0,
    batch_size: int,
    corpus_sha256: str,
    calibration: float = 1.0,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress,
) -> None:
    """Store the teacher's answers on `windows` of `part` in the folder `out`; shards already there are kept.

    Args:
        windows: int64 [m], ascending, without repeats.
        size: k of top_k, draws of sampling.
        seed: of the draws; not read by top_k.
        corpus_sha256: identity of the text (`Corpus.sha256`).
        calibration: the teacher's temperature, at which `entropy_calibrated` is taken.

    Raises:
        BadInput: k exceeds the vocabulary.
    """
    facts = teacher.facts
    if mode == "top_k" and size > facts.vocab_size:
        raise BadInput(f"train.cache_top_k: {size}, but the vocabulary has {facts.vocab_size} tokens; lower it")
    length = int(part.token_ids.shape[1])
    per_shard = max(1, shard_tokens // length)
    head: dict[str, Any] = {
        "layout": LAYOUT,
        "teacher": facts.name,
        "teacher_sha256": facts.weights_sha256,
        "revision": facts.revision,
        "precision": facts.precision,
        "corpus_sha256": corpus_sha256,
        "vocabulary": facts.vocab_size,
        "sequence_length": length,
        "mode": mode,
        "size": size,
        "seed": seed if mode == "sampling" else None,
        "calibration": calibration,
        "batch_size": batch_size,
        "shard_windows": per_shard,
    }
    out.mkdir(parents=True, exist_ok=True)
    pieces = np.split(windows, range(per_shard, len(windows), per_shard))
    _write_own(teacher, part, pieces, out, head, progress)
    wait_for_all()
    if is_first():
        _finish(out, {**head, "windows": len(windows)}, len(pieces))
    wait_for_all()


def _write_own(
    teacher: Teacher,
    part: Part,
    pieces: list[npt.NDArray[np.int64]],
    out: Path,
    head: dict[str, Any],
    progress: Progress,
) -> None:
    """The shards of this process that are not there yet."""
    ranks, rank = world()
    own = {i: piece for i, piece in enumerate(pieces) if i % ranks == rank}
    total = sum(map(len, own.values()))
    with progress.task(f"answers of {head['teacher']}", total, "windows") as task, ShardWriter() as writer:
        missing = {i: piece for i, piece in own.items() if not holds(shard_path(out, i), head, piece)}
        if missing:
            (out / MANIFEST).unlink(missing_ok=True)
        if len(missing) < len(own):
            task.advance(total - sum(map(len, missing.values())), note="resumed")
        for i, piece in missing.items():
            arrays = _answer_windows(teacher, part, piece, head, task)
            writer.write(shard_path(out, i), {"windows": piece, **arrays}, head)


def _finish(out: Path, head: dict[str, Any], n_shards: int) -> None:
    """Hash the shards and write the manifest, which makes the cache whole."""
    shards = []
    for path in (shard_path(out, i) for i in range(n_shards)):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        shards.append({"file": path.name, "size": path.stat().st_size, "sha256": digest})
    write_atomically(out / MANIFEST, (json.dumps({**head, "shards": shards}, indent=1) + "\n").encode())


def _answer_windows(
    teacher: Teacher, part: Part, windows: npt.NDArray[np.int64], head: dict[str, Any], task: Task
) -> dict[str, npt.NDArray[Any]]:
    """The stored arrays of one shard."""
    batches = []
    for start in range(0, len(windows), head["batch_size"]):
        batch = windows[start : start + head["batch_size"]]
        batches.append(_answers(teacher, part, batch, head))
        task.advance(len(batch))
    return {name: np.concatenate([b[name] for b in batches]) for name in ARRAYS[head["mode"]]}


def _answers(
    teacher: Teacher, part: Part, windows: npt.NDArray[np.int64], head: dict[str, Any]
) -> dict[str, npt.NDArray[Any]]:
    """The stored arrays of a batch of windows int64 [B]."""
    device, vocabulary = teacher.head_weight.device, teacher.facts.vocab_size
    size, answers = head["size"], head["sequence_length"] - 1
    ids = torch.from_numpy(part.token_ids[windows].astype(np.int64)).to(device)
    hidden = teacher.hidden(ids)[0][:, :-1].flatten(0, 1)
    labels = ids[:, 1:].flatten()
    sampling = head["mode"] == "sampling"
    uniform = torch.from_numpy(uniforms(head["seed"], windows, answers, size)).to(device) if sampling else None
    step = max(1, LOGITS_BYTES // (BYTES_PER_LOGIT * vocabulary))
    few = step if device.type != "cpu" else max(1, CPU_BYTES // (4 * vocabulary))
    chunks = []
    for start in range(0, len(labels), step):
        # the head is multiplied with many rows at a time, its product is summarised with few
        for i, logits in enumerate(torch.split(teacher.logits(hidden[start : start + step]), few)):
            rows = slice(start + i * few, start + i * few + len(logits))
            if uniform is None:
                found = top_answers(logits, labels[rows], size, head["calibration"])
            else:
                found = sampled_answers(logits, labels[rows], uniform[rows], head["calibration"])
            chunks.append(packed(found, vocabulary, size))
    shape = (len(windows), answers)
    joined = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in ARRAYS[head["mode"]]}
    return {name: array.reshape(*shape, *array.shape[1:]) for name, array in joined.items()}
