"""Stored answers against a dense float64 computation, resume after a kill, errors of the writer, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import SafetensorError
from tiny import write_model

from edgestill.compress.cache_answers import top_answers
from edgestill.compress.cache_capture import capture
from edgestill.compress.corpus import Part
from edgestill.compress.teacher_cache import TeacherCache, open_cache, open_caches
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
    words = {"size": 8, "batch_size": 2, "corpus_sha256": CORPUS, "shard_tokens": 4 * T} | words
    capture(teacher, some_part(), chosen, out, progress=progress or QuietProgress(), **words)
    return out


def opened(teacher: Teacher, out: Path) -> TeacherCache:
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
    kinds = {name: tensor.dtype for name, tensor in vars(rows).items()}
    assert kinds.pop("ids") == torch.int64
    assert set(kinds.values()) == {torch.float32}
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
        for entropy, temperature in ((rows.entropy, 1.0), (rows.entropy_calibrated, 1.7)):
            soft = (logits / temperature).log_softmax(-1)
            torch.testing.assert_close(entropy[here].double(), -(soft.exp() * soft).sum(-1), **half)


def test_answers_by_hand() -> None:
    p = torch.tensor([[0.5, 0.125, 0.25, 0.125]])
    ours = top_answers(p.log() + 7.0, torch.tensor([3]), 2, calibration=0.5)
    assert ours.pop("ids").tolist() == [[0, 2]]
    squares = p[0].square() / p.square().sum()  # softmax at T = 1/2
    expected: dict[str, Any] = {"logp": [[-1.0, -2.0]], "tail_logp": [-2.0], "entropy": [1.75], "label_logp": [-3.0]}
    expected["entropy_calibrated"] = [-(squares * squares.log2()).sum().item()]
    assert set(ours) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(ours[name] / np.log(2), torch.tensor(values))
    assert top_answers(p.log(), torch.tensor([0]), 4)["tail_logp"].tolist() == [-torch.inf]


@given(
    logits=arrays(np.float32, (3, 6), elements=st.floats(-30, 30, width=32)),
    top_k=st.integers(1, 6),
    calibration=st.floats(0.5, 3.0),
)
@settings(max_examples=60, deadline=None)
def test_buckets_are_a_distribution_whatever_the_logits(
    logits: npt.NDArray[np.float32], top_k: int, calibration: float
) -> None:
    found = top_answers(torch.from_numpy(logits), torch.zeros(3, dtype=torch.int64), top_k, calibration)
    whole = torch.from_numpy(logits).double().log_softmax(-1)
    torch.testing.assert_close(found["logp"].double(), whole.gather(1, found["ids"]), atol=1e-5, rtol=1e-5)
    mass = found["logp"].double().exp().sum(1) + found["tail_logp"].double().exp()
    torch.testing.assert_close(mass, torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)
    for name, temperature in (("entropy", 1.0), ("entropy_calibrated", calibration)):
        exact = (torch.from_numpy(logits).double() / temperature).log_softmax(-1)
        torch.testing.assert_close(found[name].double(), -(exact.exp() * exact).sum(-1), atol=1e-4, rtol=1e-5)
        assert (found[name] >= 0).all()


def test_k_of_the_whole_vocabulary_is_the_distribution_within_float16(teacher: Teacher, tmp_path: Path) -> None:
    rows = opened(teacher, store(teacher, tmp_path / "all", windows=[0, 6], size=REAL)).rows(np.array([6]))
    assert torch.isinf(rows.tail_logp).all()
    exact = dense(teacher, 6)[0].log_softmax(-1)
    ours = torch.empty_like(exact).scatter_(1, rows.ids, rows.logp.double())
    half = exact.abs() * 2.0**-11 + 2.0**-24 + 1e-5  # half an ulp of float16, and float32 before it
    assert ((ours - exact).abs() <= half).all()


def test_thin_tails_and_impossible_labels_survive_float16(tmp_path: Path, teacher: Teacher) -> None:
    sharp = load_teacher(teacher.facts, torch.device("cpu"))
    sharp.head_weight = sharp.head_weight * 1e6
    rows = opened(sharp, store(sharp, tmp_path / "sharp", windows=[0])).rows(np.array([0]))
    assert rows.label_logp.min() == -65504.0
    assert torch.isfinite(rows.logp).all()
    assert torch.isfinite(rows.entropy).all()
    assert rows.logp[:, 0].max() == 0.0


def test_wide_vocabularies_keep_their_ids(tmp_path: Path, teacher: Teacher) -> None:
    wide = load_teacher(teacher.facts, torch.device("cpu"))
    padding = torch.zeros(70_000 - REAL, wide.head_weight.shape[1])
    wide.head_weight = torch.cat([padding, wide.head_weight])  # the likely tokens come last
    wide.facts = dataclasses.replace(wide.facts, vocab_size=70_000)
    rows = opened(wide, store(wide, tmp_path / "c", windows=[5], size=3)).rows(np.array([5]))
    logits, _ = dense(teacher, 5)
    likely = logits.max(-1).values > 0  # a padded token has logit 0
    assert torch.equal(rows.ids[likely, 0], logits[likely].argmax(-1) + 70_000 - REAL)
    assert likely.any()


KILLED = """
import os, signal, sys, time
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
            while not (Path(sys.argv[3]) / "shard-00001.safetensors").exists():  # the writer is a thread
                time.sleep(0.01)
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
        ({"teacher_sha256": mine, "corpus_sha256": CORPUS, "size": 9}, "size is 8, wanted 9"),
        ({"teacher_sha256": mine, "corpus_sha256": CORPUS, "mode": "sampling"}, "mode is 'top_k', wanted 'sampling'"),
    ):
        with pytest.raises(BadInput, match=message):
            open_cache(out, **words)  # type: ignore[arg-type]
    assert open_cache(out, teacher_sha256=mine, corpus_sha256=CORPUS, mode="top_k", size=8).size == 8
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
        store(teacher, tmp_path / "wide", size=264)


def test_caches_of_two_modes_are_not_fused(teacher: Teacher, tmp_path: Path) -> None:
    folders = [store(teacher, tmp_path / mode, mode=mode) for mode in ("top_k", "sampling")]
    hashes = [teacher.facts.weights_sha256] * 2
    with pytest.raises(BadInput, match="sampling: mode 'sampling', but top_k has 'top_k'; caches are fused only with"):
        open_caches(folders, hashes, corpus_sha256=CORPUS)
    assert [c.mode for c in open_caches([folders[1]] * 2, hashes, corpus_sha256=CORPUS)] == ["sampling"] * 2


def test_what_goes_wrong_in_the_writer_ends_the_capture(teacher: Teacher, tmp_path: Path) -> None:
    for blocked in (1, 5):  # in the middle, and the last one, which no later shard waits for
        out = tmp_path / f"c{blocked}"
        (out / f"shard-{blocked:05d}.tmp").mkdir(parents=True)
        with pytest.raises(SafetensorError, match="Is a directory"):
            store(teacher, out)
        assert not (out / "cache.json").exists()
        assert len(list(out.glob("*.safetensors"))) == blocked


def test_size_is_what_the_page_says(teacher: Teacher, tmp_path: Path) -> None:
    out = store(teacher, tmp_path / "c", size=64, shard_tokens=1 << 17)
    manifest = json.loads((out / "cache.json").read_text())
    assert manifest["shards"][0]["size"] < N * (T - 1) * (64 * 4 + 8) + N * 8 + 1500  # the header
