"""The CUDA provider's way of running a graph, all but the provider: a session on the CPU that answers to its name."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from engines import make_engine_bundle
from onnxruntime.capi import onnxruntime_pybind11_state as state

from edgestill.runtime.backends import fixed_cache, ort
from edgestill.runtime.backends.ort import EXACT_DEQUANTIZED, OrtBackend
from edgestill.runtime.backends.ort_fixed import Pool
from edgestill.runtime.bundle import open_bundle
from edgestill.runtime.errors import BundleError, MissingPart
from edgestill.runtime.model import load

CUDA = "CUDAExecutionProvider"
CAPTURING = (CUDA, {"enable_cuda_graph": "1"})
Refusal = Callable[[Any], Exception | None]


class Sessions:
    """In place of onnxruntime.InferenceSession: on the CPU, with what it was asked written down; `refuse` looks at providers."""

    def __init__(self, refuse: Refusal = lambda _: None, fails_recording: bool = False, loads: bool = True) -> None:
        self.asked: list[Any] = []
        self.graph_ids: list[int] = []
        self.refuse, self.fails_recording, self.loads = refuse, fails_recording, loads
        self.real = onnxruntime.InferenceSession

    def __call__(self, path: str, options: Any, *, providers: list[Any], enable_fallback: int) -> Any:
        assert enable_fallback == 0, "the Python wrapper would try again on the CPU"
        if providers == ["CPUExecutionProvider"]:
            return self.real(path, options, providers=providers)
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        (provider,) = providers
        self.asked.append(provider)
        if refusal := self.refuse(provider):
            raise refusal
        plain = onnxruntime.SessionOptions()
        plain.intra_op_num_threads = 1
        for key, value in EXACT_DEQUANTIZED.items():
            plain.add_session_config_entry(key, value)
        return _Session(self, self.real(path, plain, providers=["CPUExecutionProvider"]), provider)


class _Session:
    def __init__(self, sessions: Sessions, real: Any, provider: Any) -> None:
        self._sessions, self._real, self._provider = sessions, real, provider

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"] if self._sessions.loads else ["CPUExecutionProvider"]

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        graph_id = int(options.get_run_config_entry("gpu_graph_id"))
        if self._sessions.fails_recording and self._provider == CAPTURING and graph_id != -1:
            raise state.RuntimeException("operation not permitted when stream is capturing")
        self._sessions.graph_ids.append(graph_id)
        self._real.run_with_iobinding(binding, options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_bundle(tmp_path_factory.mktemp("cuda") / "bundle", engine="onnxruntime-cuda")


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sessions]:
    def make(**words: Any) -> Sessions:
        made = Sessions(**words)
        monkeypatch.setattr(onnxruntime, "InferenceSession", made)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
        monkeypatch.setitem(ort.MEMORY, "cuda", "cpu")
        return made

    return make


def backends(folder: Path) -> tuple[OrtBackend, OrtBackend]:
    """(by way of CUDA, on the CPU)."""
    bundle = open_bundle(folder)
    path, manifest = bundle.path("model.onnx"), bundle.manifest
    ours = OrtBackend(path, manifest.model, manifest.graph, threads=1, device="cuda")
    return ours, OrtBackend(path, manifest.model, manifest.graph, threads=1)


def test_steps_are_recorded_once_for_their_buffers_and_slots_and_prompts_never(
    folder: Path, sessions: Callable[..., Sessions], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = sessions()
    monkeypatch.setattr(fixed_cache, "ATTENDED_STEP", 16)
    ours, theirs = backends(folder)
    assert made.asked == [CAPTURING]
    assert made.graph_ids == [1, 1], "tried when it was opened: recorded, then replayed"
    assert ours.session["cuda_graph"] == "decode step captured by onnxruntime"
    ids = np.random.default_rng(0).integers(0, 300, (2, 40))
    for _ in range(2):
        made.graph_ids.clear()
        mine, other = ours.new_state(2, 40), theirs.new_state(2, 40)
        for first, last in [(0, 10), *((i, i + 1) for i in range(10, 40))]:
            got, wanted = (b.step(s, ids[:, first:last]) for b, s in ((ours, mine), (theirs, other)))
            np.testing.assert_array_equal(got, wanted)
        assert made.graph_ids == [-1, *[2] * 6, *[3] * 16, *[4] * 8]
        del mine, other
        gc.collect()
    first, second = ours.new_state(2, 40), ours.new_state(2, 40)
    made.graph_ids.clear()
    for each in (first, second):
        ours.step(each, ids[:, :1])
    assert made.graph_ids == [2, 5], "two texts at once have buffers and recordings of their own"


def test_a_text_after_the_first_uploads_its_tokens_only(
    folder: Path, sessions: Callable[..., Sessions], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions()
    ours, _ = backends(folder)
    made: list[tuple[int, ...]] = []
    real = Pool.empty

    def empty(pool: Pool, shape: tuple[int, ...], kind: Any) -> Any:
        made.append(shape)
        return real(pool, shape, kind)

    monkeypatch.setattr(Pool, "empty", empty)
    counts = []
    for _ in range(2):
        mine = ours.new_state(2, 20)
        for _ in range(5):
            ours.step(mine, np.ones((2, 1), np.int64))
        del mine
        gc.collect()
        counts.append(len(made))
    assert counts[0] == counts[1] > 0


def test_a_graph_that_cannot_be_captured_whole_runs_without(folder: Path, sessions: Callable[..., Sessions]) -> None:
    line = "This session cannot use the graph capture feature as requested by the user as all compute graph nodes ..."
    made = sessions(refuse=lambda provider: state.Fail(line) if provider == CAPTURING else None)
    ours, _ = backends(folder)
    assert made.asked == [CAPTURING, CUDA]
    assert ours.session["cuda_graph"] == "refused by onnxruntime: not all of the graph is on the GPU"
    ours.step(ours.new_state(1, 4), np.ones((1, 1), np.int64))


def test_a_step_that_fails_to_be_recorded_runs_without(folder: Path, sessions: Callable[..., Sessions]) -> None:
    made = sessions(fails_recording=True)
    ours, theirs = backends(folder)
    assert made.asked == [CAPTURING, CUDA]
    assert ours.session["cuda_graph"] == ("refused by onnxruntime: operation not permitted when stream is capturing")
    ids = np.ones((1, 1), np.int64)
    np.testing.assert_array_equal(ours.step(ours.new_state(1, 4), ids), theirs.step(theirs.new_state(1, 4), ids))


@pytest.mark.parametrize(
    ("words", "error", "line"),
    [
        (
            {
                "refuse": lambda _: state.Fail(
                    "This session contains graph nodes that are assigned to the default CPU EP, but fallback to CPU EP has been "
                    "explicitly disabled by the user."
                )
            },
            BundleError,
            r"no CUDA kernel for some of the graph and would run that on the CPU; upgrade onnxruntime-gpu, or build",
        ),
        (
            {"refuse": lambda _: state.RuntimeException("CUDA failure 100: no CUDA-capable device is detected")},
            MissingPart,
            r"CUDA does not start in onnxruntime .* \(CUDA failure 100.*\); run this on the target",
        ),
        ({"loads": False}, MissingPart, r"CUDAExecutionProvider does not load: libraries of CUDA or cuDNN are missing"),
    ],
)
def test_nothing_runs_on_the_cpu_unasked(
    words: dict[str, Any], error: type[Exception], line: str, folder: Path, sessions: Callable[..., Sessions]
) -> None:
    sessions(**words)
    with pytest.raises(error, match=line) as refusal:
        backends(folder)
    assert "\n" not in str(refusal.value)


def test_a_bundle_is_loaded_and_generates(folder: Path, sessions: Callable[..., Sessions]) -> None:
    made = sessions()
    model = load(folder)
    assert len(model.generate("the man", max_new_tokens=8, temperature=0.0).token_ids) == 8
    assert made.graph_ids.count(-1) == 1


def test_a_session_is_gone_with_its_backend(folder: Path) -> None:
    import weakref

    bundle = open_bundle(folder)
    ours = OrtBackend(bundle.path("model.onnx"), bundle.manifest.model, bundle.manifest.graph, threads=1)
    ours.step(ours.new_state(1, 4), np.ones((1, 1), np.int64))
    session = weakref.ref(ours._wiring.session)
    gc.disable()
    try:
        del ours
        assert session() is None
    finally:
        gc.enable()
