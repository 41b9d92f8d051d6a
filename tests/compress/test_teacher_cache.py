"""Stored answers against a dense float64 computation, resume after a kill, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_model

from edgestill.compress.corpus import Part
from edgestill.compress.teacher_cache import CachedRows, capture, open_cache, top_answers
from edgestill.compress.teachers import Teacher, load_teacher, resolve_teachers
from edgestill.profiles.schema import TeacherSpec
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import QuietProgress

N, T, REAL = 23, 16, 263
CORPUS = "c" * 64


def teacher_at(path: Path) -> Teacher:
    spec = TeacherSpec(name="t", model=str(path), precision="float32")
    return load_teacher(resolve_teachers([spec], Path, device=torch.device("cpu"))[0], torch.device("cpu"))


def some_part() -> Part:
    tokens = np.random.default_rng(0).integers(0, REAL, (N, T)).astype(np.uint16)
    return Part(tokens, None, np.zeros(N, np.int16), np.arange(N, dtype=np.int32), np.zeros(N, np.int16))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return teacher_at(write_model(tmp_path_factory.mktemp("teacher") / "t", width=32))


def store(teacher: Teacher, out: Path, windows: Any = None, progress: Any = None, **words: Any) -> Path:
    chosen = np.arange(N, dtype=np.int64) if windows is None else np.array(windows, np.int64)
    words = {"top_k": 8, "batch_size": 2, "corpus_sha256": CORPUS, "shard_tokens": 4 * T} | words
    capture(teacher, some_part(), chosen, out, progress=progress or QuietProgress(), **words)
    return out


def opened(teacher: Teacher, out: Path) -> Any:
    return open_cache(out, teacher_sha256=teacher.facts.weights_sha256, corpus_sha256=CORPUS)


def dense(teacher: Teacher, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 logits [T - 1, REAL] and labels [T - 1] by the plain model."""
    ids = torch.from_numpy(some_part().token_ids[window].astype(np.int64))
    with torch.no_grad():
        logits = teacher.model(input_ids=ids[None]).logits[0, :-1, :REAL]
    return logits.double(), ids[1:]


def test_answers_against_a_dense_computation(teacher: Teacher, tmp_path: Path) -> None:
    store(teacher, tmp_path / "c", windows=[0, 3, 4, 7, 8, 9, 22], calibration=1.7)
    cache = opened(teacher, tmp_path / "c")
    asked = [22, 3, 9, 3]
    rows = cache.rows(np.array(asked))
    assert rows.ids.shape == rows.logp.shape == (4 * (T - 1), 8)
    assert (rows.ids.dtype, rows.logp.dtype, rows.entropy.dtype) == (torch.int64, torch.float32, torch.float32)
    for i, window in enumerate(asked):
        logits, labels = dense(teacher, window)
        log_p = logits.log_softmax(-1)
        here = slice(i * (T - 1), (i + 1) * (T - 1))
        half = {"atol": 2**-8, "rtol": 2**-10}  # float16 below 16
        top = log_p.topk(8)
        assert torch.equal(rows.ids[here], top.indices)
        torch.testing.assert_close(rows.logp[here].double(), top.values, **half)
        torch.testing.assert_close(rows.tail_logp[here].double(), torch.log1p(-top.values.exp().sum(-1)), **half)
        torch.testing.assert_close(rows.label_logp[here].double(), log_p[torch.arange(T - 1), labels], **half)
        soft = (logits / 1.7).log_softmax(-1)
        torch.testing.assert_close(rows.entropy[here].double(), -(soft.exp() * soft).sum(-1), **half)


def test_answers_by_hand() -> None:
    p = torch.tensor([[0.5, 0.125, 0.25, 0.125]])
    ours = top_answers(p.log() + 7.0, torch.tensor([3]), 2)
    assert ours.ids.tolist() == [[0, 2]]
    expected = CachedRows(ours.ids, *(torch.tensor(v) for v in ([[-1.0, -2.0]], [-2.0], [1.75], [-3.0])))
    for field in ("logp", "tail_logp", "entropy", "label_logp"):
        torch.testing.assert_close(getattr(ours, field) / np.log(2), getattr(expected, field))
    assert top_answers(p.log(), torch.tensor([0]), 4).tail_logp.tolist() == [-torch.inf]


def test_thin_tails_and_impossible_labels_survive_float16(tmp_path: Path, teacher: Teacher) -> None:
    sharp = load_teacher(teacher.facts, torch.device("cpu"))
    sharp.head_weight = sharp.head_weight * 1e6
    rows = opened(sharp, store(sharp, tmp_path / "sharp", windows=[0])).rows(np.array([0]))
    assert rows.label_logp.min() == -65504.0
    assert torch.isfinite(rows.logp).all()
    assert torch.isfinite(rows.entropy).all()
    assert rows.logp[:, 0].max() == 0.0
    whole = opened(teacher, store(teacher, tmp_path / "all", windows=[0], top_k=REAL)).rows(np.array([0]))
    assert torch.isinf(whole.tail_logp).all()


def test_wide_vocabularies_keep_their_ids(tmp_path: Path, teacher: Teacher) -> None:
    wide = load_teacher(teacher.facts, torch.device("cpu"))
    padding = torch.zeros(70_000 - REAL, wide.head_weight.shape[1])
    wide.head_weight = torch.cat([padding, wide.head_weight])  # the likely tokens come last
    wide.facts = dataclasses.replace(wide.facts, vocab_size=70_000)
    rows = opened(wide, store(wide, tmp_path / "c", windows=[5], top_k=3)).rows(np.array([5]))
    logits, _ = dense(teacher, 5)
    likely = logits.max(-1).values > 0  # a padded token has logit 0
    assert torch.equal(rows.ids[likely, 0], logits[likely].argmax(-1) + 70_000 - REAL)
    assert likely.any()


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {here!r}]
from pathlib import Path
from edgestill.runtime.progress import Progress, QuietProgress
from test_teacher_cache import store, teacher_at

class Fuse:
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def advance(self, amount=1, note=""):
        Fuse.left -= 1
        if Fuse.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

class Short(QuietProgress):
    def task(self, label, total, unit=""): return Fuse()

Fuse.left = int(sys.argv[2])
store(teacher_at(Path(sys.argv[1])), Path(sys.argv[3]), progress=Short())
"""


def test_a_killed_capture_goes_on_to_the_same_bytes(teacher: Teacher, tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = KILLED.format(tests=str(here.parent), here=str(here))
    out = tmp_path / "killed"
    command = [sys.executable, "-c", script, str(teacher.facts.path), "6", str(out)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(p.name for p in out.iterdir()) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    with pytest.raises(BadInput, match="the capture is not finished"):
        opened(teacher, out)
    (out / "shard-00002.tmp").write_bytes(b"half a shard")
    kept = (out / "shard-00001.safetensors").stat().st_ino
    advanced: list[float] = []

    class Watched(QuietProgress):
        def task(self, label: str, total: float, unit: str = "") -> Any:
            task = super().task(label, total, unit)
            plain = task.advance
            task.advance = lambda amount=1, note="": (advanced.append(amount), plain(amount, note))  # type: ignore[method-assign,assignment]
            return task

    store(teacher, out, progress=Watched())
    assert advanced[0] == 8  # windows of the shards that were there
    assert sum(advanced) == N
    assert (out / "shard-00001.safetensors").stat().st_ino == kept
    whole = store(teacher, tmp_path / "whole")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_a_shard_captured_otherwise_is_captured_again(teacher: Teacher, tmp_path: Path) -> None:
    out = store(teacher, tmp_path / "c", windows=range(8))
    store(teacher, out, windows=range(12))
    assert opened(teacher, out).windows.tolist() == list(range(12))
    store(teacher, out, windows=range(12), calibration=2.0)
    fresh = store(teacher, tmp_path / "fresh", windows=range(12), calibration=2.0)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in fresh.iterdir()}


def test_other_teachers_texts_and_damage_are_refused(teacher: Teacher, tmp_path: Path) -> None:
    out = store(teacher, tmp_path / "c")
    mine = teacher.facts.weights_sha256
    for words, message in (
        ({"teacher_sha256": "0" * 64, "corpus_sha256": CORPUS}, "teacher_sha256 is '.*', wanted '0000"),
        ({"teacher_sha256": mine, "corpus_sha256": "d"}, "corpus_sha256 is 'cccc.*', wanted 'd'"),
        ({"teacher_sha256": mine, "corpus_sha256": CORPUS, "top_k": 9}, "top_k is 8, wanted 9"),
    ):
        with pytest.raises(BadInput, match=message):
            open_cache(out, **words)  # type: ignore[arg-type]
    assert open_cache(out, teacher_sha256=mine, corpus_sha256=CORPUS, top_k=8).top_k == 8
    with pytest.raises(BadInput, match="window 23 is not among the 23 captured"):
        opened(teacher, out).rows(np.array([0, 23]))
    shard = out / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    cache = opened(teacher, out)
    cache.rows(np.array([0]))
    with pytest.raises(BadInput, match=r"shard-00001.safetensors: sha256"):
        cache.rows(np.array([0, 5]))
    shard.write_bytes(whole[:-1])
    with pytest.raises(BadInput, match=rf"{len(whole) - 1} bytes where cache.json declares {len(whole)}"):
        opened(teacher, out)
    with pytest.raises(BadInput, match="cache_top_k: 264, but the vocabulary has 263"):
        store(teacher, tmp_path / "wide", top_k=264)


def test_size_is_what_the_page_says(teacher: Teacher, tmp_path: Path) -> None:
    out = store(teacher, tmp_path / "c", top_k=64, shard_tokens=1 << 17)
    manifest = json.loads((out / "cache.json").read_text())
    assert manifest["shards"][0]["size"] < N * (T - 1) * (64 * 4 + 6) + N * 8 + 1500  # the header
