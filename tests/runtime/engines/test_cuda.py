"""What is asked of CUDA's bindings, by bindings that write it down: order, what is given back, and what an absence is called."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgestill.runtime.engines.cuda import Cuda, CudaError
from edgestill.runtime.errors import MissingPart
from edgestill.runtime.gpu import first_gpu


class Code(int):
    """An error code with the name that CUDA has for it."""

    name = "cudaSuccess"


def code(number: int, name: str) -> Code:
    found = Code(number)
    found.name = name
    return found


class Bindings:
    """cuda.bindings.runtime: every call is written down; `answers` replace what it returns."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.memory = ctypes.create_string_buffer(64)
        self.answers = {
            "cudaGetDeviceCount": (0, 1),
            "cudaMalloc": (0, 4096),
            "cudaMallocHost": (0, ctypes.addressof(self.memory)),
            "cudaStreamCreateWithFlags": (0, 7),
            "cudaStreamEndCapture": (0, "graph"),
            "cudaGraphInstantiate": (0, "executable"),
            "cudaGetErrorString": (0, b"unknown error"),
            **answers,
        }
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeRelaxed="relaxed")
        self.cudaStreamNonBlocking = 1

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return self.answers.get(name, (0,))

        return call


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bindings]:
    def make(**answers: Any) -> Bindings:
        made = Bindings(**answers)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", made)
        return made

    return make


def test_memory_is_zeroed_in_the_order_of_the_stream_that_will_use_it(bindings: Callable[..., Bindings]) -> None:
    made = bindings()
    assert Cuda().allocate(100, 7) == 4096
    assert made.calls[-2:] == [("cudaMalloc", 100), ("cudaMemsetAsync", 4096, 0, 100, 7)]


def test_pinned_memory_lives_as_long_as_the_last_view_of_it(bindings: Callable[..., Bindings]) -> None:
    made = bindings()
    view = Cuda().pinned(64).view(np.float32)[:4].reshape(2, 2)
    gc.collect()
    assert made.calls[-1] == ("cudaMallocHost", 64)
    del view
    gc.collect()
    assert made.calls[-1] == ("cudaFreeHost", ctypes.addressof(made.memory))


def test_a_recording_is_replayed_and_given_back(bindings: Callable[..., Bindings]) -> None:
    made = bindings()
    cuda = Cuda()
    stream = cuda.stream()
    graph = cuda.capture(lambda: cuda.wait(3), stream)
    graph.replay()
    graph.close()
    cuda.close_stream(stream)
    assert made.calls[2:] == [
        ("cudaStreamCreateWithFlags", 1),
        ("cudaStreamBeginCapture", 7, "relaxed"),
        ("cudaStreamSynchronize", 3),
        ("cudaStreamEndCapture", 7),
        ("cudaGraphInstantiate", "graph", 0),
        ("cudaGraphDestroy", "graph"),
        ("cudaGraphLaunch", "executable", 7),
        ("cudaGraphExecDestroy", "executable"),
        ("cudaStreamDestroy", 7),
    ]


def test_a_recording_that_cannot_be_made_executable_is_given_back(bindings: Callable[..., Bindings]) -> None:
    made = bindings(cudaGraphInstantiate=(900, None))
    with pytest.raises(CudaError, match=r"cudaGraphInstantiate failed: unknown error"):
        Cuda().capture(lambda: None, 7)
    assert made.calls[-1] == ("cudaGraphDestroy", "graph")


@pytest.mark.parametrize(
    ("driver", "line"),
    [
        (12020, "driver here is for CUDA 12.2, cuda.bindings are for 13.5; update the driver, or pip install"),
        (11080, "driver here is for CUDA 11.8, cuda.bindings are for 13.5; update the driver"),
        (0, "no NVIDIA driver or GPU is here; run this on the target, or install its driver"),
    ],
)
def test_a_driver_that_is_too_old_is_not_called_absent(
    driver: int, line: str, bindings: Callable[..., Bindings]
) -> None:
    bindings(
        cudaGetDeviceCount=(code(35, "cudaErrorInsufficientDriver"), None),
        cudaDriverGetVersion=(0, driver),
        cudaRuntimeGetVersion=(0, 13050),
    )
    with pytest.raises(MissingPart) as refusal:
        Cuda()
    assert line in str(refusal.value)
    assert str(refusal.value).endswith("'cuda-bindings==12.*'") == (driver == 12020)


def test_the_bus_id_of_cudas_first_card(bindings: Callable[..., Bindings], monkeypatch: pytest.MonkeyPatch) -> None:
    bindings(cudaDeviceGetPCIBusId=(0, b"0000:3B:00.0\0\0\0\0"))
    assert first_gpu() == "0000:3B:00.0"
    bindings(cudaDeviceGetPCIBusId=(100, None))
    assert first_gpu() is None
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert first_gpu() is None
