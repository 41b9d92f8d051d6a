"""A teacher's answers on the training windows, stored once: k most likely tokens, the mass of the rest, exact entropy.

    cache.json               written last: teacher hash, precision, corpus hash, V, k, calibration, shards with sha256
    shard-00000.safetensors  `windows` int64 [m]; for the T - 1 answers (token 1 to T - 1) of each window:
                             ids uint16 (uint32 when V > 65,536) [m, T-1, k], logp [m, T-1, k], tail_logp, entropy,
                             label_logp float16 [m, T-1]

Log-probabilities are at temperature 1, computed in float32, rounded to float16 (at most 2**-8 nats off below 16, 4 + 2 bytes a
bucket); `tail_logp` is taken from the complement and is -inf where k = V. The entropy is exact over the whole vocabulary at the
teacher's calibration temperature, since that of k buckets is biased. A shard is written beside and renamed, and is the
unit of resume: the same batches are formed again, so a killed capture ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgestill.compress.cache_shards import holds, map_shard, shard_path, write_shard
from edgestill.compress.corpus import Part
from edgestill.compress.teachers import Teacher
from edgestill.runtime.errors import BadInput
from edgestill.runtime.files import write_atomically
from edgestill.runtime.progress import Progress, Task

MANIFEST = "cache.json"
LAYOUT = 1
SHARD_TOKENS = 1 << 17
"""37 MB at k = 64: small enough that a kill costs seconds to minutes of a teacher's work."""
LOGITS_BYTES = 128 << 20
"""Budget of the float32 logits and their temporaries."""
LOWEST = -65504.0
"""The least finite float16: a label of probability 0 must not become an infinite loss."""
ARRAYS = ("ids", "logp", "tail_logp", "entropy", "label_logp")


@dataclass(frozen=True)
class CachedRows:
    """Answers for n = B * (T - 1) positions, window-major, on the CPU.

    ids int64 [n, k] (descending probability); logp float32 [n, k]; tail_logp, entropy, label_logp float32 [n], nats.
    """

    ids: Tensor
    logp: Tensor
    tail_logp: Tensor
    entropy: Tensor
    label_logp: Tensor


def top_answers(logits: Tensor, labels: Tensor, top_k: int, calibration: float = 1.0) -> CachedRows:
    """The k + 1 buckets of each row of logits.

    Args:
        logits: float32 [n, V].
        labels: int64 [n].
        top_k: at most V.
        calibration: temperature of the entropy.
    """
    top, ids = logits.topk(top_k, dim=-1)
    lse = logits.logsumexp(-1)
    label = logits.gather(1, labels.unsqueeze(1)).squeeze(1) - lse
    # 1 - sum of the stored would be noise where the tail is thin
    tail = logits.scatter(1, ids, -torch.inf).logsumexp(-1) - lse
    log_p = torch.log_softmax(logits / calibration, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return CachedRows(ids, top - lse.unsqueeze(1), tail, entropy, label)


def capture(
    teacher: Teacher,
    part: Part,
    windows: npt.NDArray[np.int64],
    out: Path,
    *,
    top_k: int,
    batch_size: int,
    corpus_sha256: str,
    calibration: float = 1.0,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress,
) -> None:
    """Store the teacher's answers on `windows` of `part` in the folder `out`; shards already there are kept.

    Args:
        windows: int64 [m], ascending, without repeats.
        corpus_sha256: identity of the text (`Corpus.sha256`).
        calibration: the teacher's temperature, at which the entropy is taken.

    Raises:
        BadInput: `top_k` exceeds the vocabulary.
    """
    facts = teacher.facts
    if top_k > facts.vocab_size:
        raise BadInput(f"train.cache_top_k: {top_k}, but the vocabulary has {facts.vocab_size} tokens; lower it")
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
        "top_k": top_k,
        "calibration": calibration,
        "batch_size": batch_size,
        "shard_windows": per_shard,
    }
    out.mkdir(parents=True, exist_ok=True)
    pieces = np.split(windows, range(per_shard, len(windows), per_shard))
    with progress.task(f"answers of {facts.name}", len(windows), "windows") as task:
        missing = [i for i, piece in enumerate(pieces) if not holds(shard_path(out, i), head, piece)]
        if missing:
            (out / MANIFEST).unlink(missing_ok=True)
        if len(missing) < len(pieces):
            task.advance(len(windows) - sum(len(pieces[i]) for i in missing), note="resumed")
        for i in missing:
            arrays = _answer_windows(teacher, part, pieces[i], head, task)
            write_shard(shard_path(out, i), {"windows": pieces[i], **arrays}, head)
    _finish(out, {**head, "windows": len(windows)}, len(pieces))


def _finish(out: Path, head: dict[str, Any], n_shards: int) -> None:
    """Hash the shards and write the manifest, which makes the cache whole."""
    shards = []
    for path in (shard_path(out, i) for i in range(n_shards)):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        shards.append({"file": path.name, "size": path.stat().st_size, "sha256": digest})
    write_atomically(out / MANIFEST, (json.dumps({**head, "shards": shards}, indent=1) + "\n").encode())


class TeacherCache:
    """Stored answers, memory-mapped. Safe to read from several threads; a shard is hashed when it is first used."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.teacher: str = manifest["teacher"]
        self.vocabulary: int = manifest["vocabulary"]
        self.top_k: int = manifest["top_k"]
        self.sequence_length: int = manifest["sequence_length"]
        self.calibration: float = manifest["calibration"]
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self._shard_windows: int = manifest["shard_windows"]
        self._arrays = [map_shard(folder / shard["file"])[1] for shard in self._shards]
        self.windows: npt.NDArray[np.int64] = np.concatenate([np.asarray(a["windows"]) for a in self._arrays])
        self._hashed: set[int] = set()

    def rows(self, window_ids: npt.NDArray[np.int64]) -> CachedRows:
        """The answers on windows int64 [B], in that order (repeats allowed).

        Raises:
            BadInput: a window that was not captured, or a shard whose hash is wrong.
        """
        place = np.searchsorted(self.windows, window_ids)
        wrong = self.windows[np.minimum(place, len(self.windows) - 1)] != window_ids
        if wrong.any():
            raise BadInput(
                f"{self.folder}: window {window_ids[wrong][0]} is not among the {len(self.windows)} captured; "
                "delete the folder and build again"
            )
        shard, row = place // self._shard_windows, place % self._shard_windows
        answers = len(window_ids) * (self.sequence_length - 1)
        found: list[Tensor] = []
        for name in ARRAYS:
            kind = np.int64 if name == "ids" else np.float32
            shape = (len(window_ids), self.sequence_length - 1, *([self.top_k] if name in ("ids", "logp") else []))
            values = np.empty(shape, kind)
            for i in np.unique(shard):
                self._check(int(i))
                values[shard == i] = self._arrays[i][name][row[shard == i]]
            found.append(torch.from_numpy(values.reshape(answers, *shape[2:])))
        return CachedRows(*found)

    def _check(self, i: int) -> None:
        if i in self._hashed:
            return
        entry, file = self._shards[i], self.folder / self._shards[i]["file"]
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise BadInput(
                f"{file}: sha256 {digest[:12]}..., {MANIFEST} declares {entry['sha256'][:12]}...; delete the folder"
            )
        self._hashed.add(i)


def open_cache(folder: Path, *, teacher_sha256: str, corpus_sha256: str, top_k: int | None = None) -> TeacherCache:
    """The finished cache in `folder`.

    Args:
        teacher_sha256: `TeacherFacts.weights_sha256` of the teacher whose answers are wanted.
        corpus_sha256: `Corpus.sha256` of the text.
        top_k: buckets expected; None takes what is there.

    Raises:
        BadInput: unfinished, of another teacher, text or k, or a shard of another size.
    """
    repair = "delete the folder and build again"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder}: no readable {MANIFEST}, the capture is not finished; {repair}") from error
    expected = {"layout": LAYOUT, "teacher_sha256": teacher_sha256, "corpus_sha256": corpus_sha256, "top_k": top_k}
    for key, value in expected.items():
        if value is not None and manifest.get(key) != value:
            raise BadInput(f"{folder}: {key} is {manifest.get(key)!r}, wanted {value!r}; {repair}")
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        size = file.stat().st_size if file.is_file() else 0
        if size != shard["size"]:
            raise BadInput(f"{file}: {size} bytes where {MANIFEST} declares {shard['size']}; {repair}")
    return TeacherCache(folder, manifest)


def _answer_windows(
    teacher: Teacher, part: Part, windows: npt.NDArray[np.int64], head: dict[str, Any], task: Task
) -> dict[str, npt.NDArray[Any]]:
    batches = []
    for start in range(0, len(windows), head["batch_size"]):
        batch = windows[start : start + head["batch_size"]]
        batches.append(_answers(teacher, part.token_ids[batch], head["top_k"], head["calibration"]))
        task.advance(len(batch))
    return {name: np.concatenate([b[name] for b in batches]) for name in ARRAYS}


def _answers(
    teacher: Teacher, token_ids: npt.NDArray[Any], top_k: int, calibration: float
) -> dict[str, npt.NDArray[Any]]:
    """The stored arrays of a batch of windows [B, T]."""
    ids = torch.from_numpy(token_ids.astype(np.int64)).to(teacher.head_weight.device)
    hidden = teacher.hidden(ids)[0][:, :-1].flatten(0, 1)
    labels = ids[:, 1:].flatten()
    vocabulary = teacher.facts.vocab_size
    rows = max(1, LOGITS_BYTES // (16 * vocabulary))  # logits, log-probabilities and two temporaries in float32
    parts = [
        top_answers(teacher.logits(h), y, top_k, calibration)
        for h, y in zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True)
    ]
    shape = (token_ids.shape[0], token_ids.shape[1] - 1)
    stored = {}
    for name in ARRAYS:
        values = torch.cat([getattr(p, name) for p in parts])
        if name == "ids":
            array = values.cpu().numpy().astype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
        else:
            lowest = -torch.inf if name == "tail_logp" else LOWEST
            array = values.clamp(min=lowest).to(torch.float16).cpu().numpy()
        stored[name] = array.reshape(*shape, *array.shape[1:])
    return stored
