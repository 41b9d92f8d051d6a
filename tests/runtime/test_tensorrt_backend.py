"""The TensorRT backend on a device made of host memory (host_device.py), against onnxruntime on the same graph."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engines import make_engine_bundle
from host_device import HostDevice, HostLibrary

from edgestill.runtime.backends import fixed_cache
from edgestill.runtime.backends.ort import OrtBackend
from edgestill.runtime.backends.tensorrt import TensorRTBackend
from edgestill.runtime.bundle import open_bundle
from edgestill.runtime.engines.plan import plan_of
from edgestill.runtime.errors import BundleError, MissingPart, PromptTooLong
from edgestill.runtime.model import Model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESTILL_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_bundle(tmp_path_factory.mktemp("engine") / "bundle")


def backends(folder: Path) -> tuple[TensorRTBackend, OrtBackend, HostDevice]:
    """(ours on the host device, onnxruntime on the same graph, the device)."""
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    plan, device, path = plan_of(manifest), HostDevice(), bundle.path(manifest.graph.file)
    library = HostLibrary(path, manifest.graph, plan, device)
    engine = TensorRTBackend(b"engine", library, device, plan, manifest.graph, manifest.model)  # type: ignore[arg-type]
    return engine, OrtBackend(path, manifest.model, manifest.graph, threads=1), device


@pytest.mark.parametrize(
    ("padding", "sizes"),
    [
        (None, [5, 1, 1, 1, 7, 1]),
        ([0, 3], [5, 1, 1, 2, 1]),
        ([9, 0, 2, 0, 1], [4, 4, 1, 1, 1]),  # more rows than the engine's batch of 2: three lanes
        (None, [1] * 20),
        (None, [40, 1]),
    ],
)
def test_every_step_gives_the_logits_of_onnxruntime(folder: Path, padding: list[int] | None, sizes: list[int]) -> None:
    ours, theirs, _ = backends(folder)
    rows = 2 if padding is None else len(padding)
    ids = np.random.default_rng(0).integers(0, 300, (rows, sum(sizes)))
    mine, other = (b.new_state(rows, ids.shape[1], padding) for b in (ours, theirs))
    start = 0
    for size in sizes:
        step = ids[:, start : start + size]
        got, wanted = ours.step(mine, step), theirs.step(other, step)
        start += size
        for row in range(rows):  # what a row gives for its padding means nothing
            first = 0 if padding is None else min(size, max(0, padding[row] - (start - size)))
            np.testing.assert_array_equal(got[row, first:], wanted[row, first:])


def test_prompts_longer_than_the_engine_takes_are_run_in_parts(folder: Path) -> None:
    ours, theirs, _ = backends(folder)
    longest = ours.plan.prefill_tokens
    assert longest == 128 == ours.plan.capacity
    short = TensorRTBackend.__new__(TensorRTBackend)
    short.__dict__ = dict(ours.__dict__)
    ids = np.random.default_rng(1).integers(0, 300, (1, 50))
    for keep, kept in itertools.product((1, 3, 40, 50), (16, 5)):
        short.plan = dataclasses.replace(ours.plan, prefill_tokens=16, kept_tokens=kept)
        short._free = {}
        got = short.step(short.new_state(1, 60), ids, keep)
        np.testing.assert_allclose(got, theirs.step(theirs.new_state(1, 60), ids, keep), atol=2e-3)
        assert got.shape == (1, keep, 320)


def test_the_decode_step_is_recorded_once_and_replayed(folder: Path) -> None:
    ours, _, device = backends(folder)
    state = ours.new_state(1, 40)
    ours.step(state, np.ones((1, 4), np.int64))
    for _ in range(10):
        ours.step(state, np.ones((1, 1), np.int64))
    assert (device.captured, device.replayed) == (1, 9)
    del state
    gc.collect()
    again = ours.new_state(1, 40)
    ours.step(again, np.ones((1, 1), np.int64))
    assert (device.captured, device.replayed) == (1, 10), "a lane that was used before keeps what it recorded"


def test_another_number_of_attended_slots_is_recorded_anew_and_one_recording_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's contexts assert that none is replayed after its context took another shape."""
    monkeypatch.setattr(fixed_cache, "ATTENDED_STEP", 16)
    ours, theirs, device = backends(folder)
    ids = np.random.default_rng(7).integers(0, 300, (1, 50))
    for text in range(2):
        mine, other = ours.new_state(1, 50), theirs.new_state(1, 50)
        for i in range(50):
            np.testing.assert_array_equal(ours.step(mine, ids[:, i : i + 1]), theirs.step(other, ids[:, i : i + 1]))
            assert len(device.graphs) == 1
        assert device.captured == 4 * (text + 1)
        del mine
        gc.collect()


def test_a_step_that_was_interrupted_is_waited_for_before_its_buffers_are_used_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, device = backends(folder)
    ids = np.random.default_rng(8).integers(0, 300, (3, 9))
    mine, other = ours.new_state(3, 20), theirs.new_state(3, 20)  # rows beyond the engine's batch of 2: two lanes
    real, waits = HostDevice.wait, itertools.count()

    def wait(device: HostDevice, stream: int) -> None:
        if next(waits) == 2:  # both steps are started, the first is about to be finished
            raise KeyboardInterrupt
        real(device, stream)

    with monkeypatch.context() as patched:
        patched.setattr(HostDevice, "wait", wait)
        with pytest.raises(KeyboardInterrupt):
            ours.step(mine, ids[:, :6])
    assert all(device.pending.values())
    for part in (ids[:, :3], ids[:, 3:8], ids[:, 8:]):
        np.testing.assert_array_equal(ours.step(mine, part), theirs.step(other, part))


def test_lanes_come_back_while_another_is_taken(folder: Path) -> None:
    """As when the garbage collector runs in the middle of it: nothing may wait for itself."""
    ours, _, _ = backends(folder)
    lanes = [ours._take(1) for _ in range(2)]

    class Collecting(dict):  # type: ignore[type-arg]
        def __getitem__(self, rows: int) -> object:
            if lanes:
                ours._give_back([lanes.pop()])
            return super().__getitem__(rows)

    ours._free = Collecting()
    taken: list[object] = []
    thread = threading.Thread(target=lambda: taken.extend(ours._take(1) for _ in range(2)), daemon=True)
    thread.start()
    thread.join(30)
    assert len(taken) == 2 and not lanes


def test_texts_after_the_first_allocate_nothing_and_all_is_given_back(folder: Path) -> None:
    ours, _, device = backends(folder)
    for _ in range(3):
        state = ours.new_state(1, 20)
        ours.step(state, np.ones((1, 6), np.int64))
        del state
        gc.collect()
        assert len(device.held) == 1
    ours.step(ours.new_state(1, 20), np.ones((1, 1), np.int64))
    del ours
    gc.collect()
    assert not device.held and not device.pending and not device.graphs
    assert device.events == ["close graph", "free", "close stream"]


def test_what_a_lane_held_before_is_never_seen(folder: Path) -> None:
    ours, _, _ = backends(folder)
    ids = np.random.default_rng(2).integers(0, 300, (1, 12))
    first = ours.step(ours.new_state(1, 20), ids).copy()
    gc.collect()
    dirty = ours.new_state(1, 100)
    ours.step(dirty, np.random.default_rng(3).integers(0, 300, (1, 90)))
    del dirty
    gc.collect()
    np.testing.assert_array_equal(ours.step(ours.new_state(1, 20), ids), first)


def test_a_rewound_state_goes_on_as_if_nothing_had_been_there(folder: Path) -> None:
    ours, _, _ = backends(folder)
    ids = np.random.default_rng(4).integers(0, 300, (1, 12))
    straight = ours.new_state(1, 20)
    ours.step(straight, ids[:, :6])
    wanted = ours.step(straight, ids[:, 6:7]).copy()
    state = ours.new_state(1, 20)
    ours.step(state, ids[:, :6])
    ours.step(state, np.zeros((1, 4), np.int64))
    ours.rewind(state, 6)
    np.testing.assert_array_equal(ours.step(state, ids[:, 6:7]), wanted)


def test_generate_stream_score_and_drafts_run_on_top(folder: Path) -> None:
    ours, theirs, _ = backends(folder)
    bundle = open_bundle(folder)
    engine, cpu = Model(bundle, ours), Model(bundle, theirs)
    for words in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 3, "top_k": 20}):
        assert (
            engine.generate("the man", max_new_tokens=12, **words).token_ids
            == cpu.generate("the man", max_new_tokens=12, **words).token_ids
        )
    ids = np.random.default_rng(5).integers(0, 300, 30)
    np.testing.assert_array_equal(engine.score(ids), cpu.score(ids))
    plain = engine.generate("the the the the", max_new_tokens=20, temperature=0.0)
    drafted = engine.generate("the the the the", max_new_tokens=20, temperature=0.0, draft="lookup")
    assert drafted.token_ids == plain.token_ids
    assert [p.token_id for p in engine.stream("a", max_new_tokens=5, temperature=0.0)]


def test_two_texts_at_once_are_independent(folder: Path) -> None:
    ours, theirs, _ = backends(folder)
    ids = np.random.default_rng(6).integers(0, 300, (2, 1, 30))
    found: dict[int, np.ndarray] = {}

    def run(which: int) -> None:
        state = ours.new_state(1, 40)
        found[which] = np.concatenate([ours.step(state, ids[which][:, i : i + 1]).copy() for i in range(30)], axis=1)

    threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in (0, 1):
        state = theirs.new_state(1, 40)
        wanted = np.concatenate([theirs.step(state, ids[which][:, i : i + 1]).copy() for i in range(30)], axis=1)
        np.testing.assert_array_equal(found[which], wanted)


def test_kernels_are_kept_after_a_text_for_the_next_process(folder: Path) -> None:
    from edgestill.runtime.engines.plan import fingerprint_of
    from edgestill.runtime.engines.store import CompiledKernels

    ours, _, device = backends(folder)
    kernels = CompiledKernels(fingerprint_of(ours.plan, "1.7", "8.9", None), "13.0")
    for kept in (b"k", b"kk"):
        backend = TensorRTBackend(b"engine", ours.library, device, ours.plan, ours.graph, ours.facts, kernels)
        backend.step(backend.new_state(1, 8), np.ones((1, 3), np.int64))
        gc.collect()
        assert kernels.read() == kept
    path = kernels._path
    path.write_bytes(path.read_bytes() + b"planted")
    assert kernels.read() == b"", "what this machine did not seal is not used"


def test_kernels_are_asked_for_after_new_shapes_only(folder: Path) -> None:
    ours, _, device = backends(folder)
    kept: list[bytes] = []
    kernels = SimpleNamespace(read=lambda: b"", write=kept.append)
    library = ours.library
    backend = TensorRTBackend(b"engine", library, device, ours.plan, ours.graph, ours.facts, kernels)
    for prompt, asked in ((3, 1), (3, 2), (3, 2), (3, 2), (4, 3)):  # once more than it grows: some may be late
        backend.step(backend.new_state(1, 8), np.ones((1, prompt), np.int64))
        gc.collect()
        assert library.serialized == asked  # type: ignore[attr-defined]
    assert kept == [b"k"]


def test_kernels_are_not_kept_where_home_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgestill.runtime.engines import trust
    from edgestill.runtime.engines.plan import EnginePlan, fingerprint_of
    from edgestill.runtime.engines.store import CompiledKernels

    plan = EnginePlan("tensorrt-rtx", "int4", "model.onnx", "", 128, 1, 128, 1, 64, 96)
    kernels = CompiledKernels(fingerprint_of(plan, "1.7", "8.9", None), "580.65.06")
    kernels.write(b"compiled")
    assert kernels.read() == b"compiled"

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(trust, "_make_key", refuse)
    trust.home().joinpath("machine.key").unlink()
    kernels.write(b"more")  # after a text, inside of the garbage collector: it may not raise
    assert kernels.read() == b""


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    ours, _, device = backends(folder)
    with pytest.raises(PromptTooLong, match="129 tokens exceed"):
        ours.new_state(1, 129)
    state = ours.new_state(1, 4)
    with pytest.raises(PromptTooLong):
        ours.step(state, np.ones((1, 5), np.int64))
    with pytest.raises(MissingPart, match=r"can't open this engine .*not an engine.*local/engines"):
        TensorRTBackend(b"other", ours.library, device, ours.plan, ours.graph, ours.facts)
    ours.engine.specs.pop("present.1.value")
    ours.engine.num_io_tensors -= 1
    with pytest.raises(BundleError, match=r"differ in present\.1\.value"):
        TensorRTBackend(b"engine", ours.library, device, ours.plan, ours.graph, ours.facts)
