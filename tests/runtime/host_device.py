"""A GPU and a TensorRT made of host memory and onnxruntime, at the boundary where the real ones are called.

`HostDevice` hands out addresses of host memory and records or replays work; `HostLibrary` opens an ONNX file as an "engine" whose
execution contexts read and write those addresses. The backend above runs unchanged, on the very graph that engines are built
from, so its buffers, shapes, optimization profiles and recorded steps are tested with real numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from edgestill.runtime.engines.cuda import Card
from edgestill.runtime.engines.plan import EnginePlan
from edgestill.runtime.manifest import Graph

NUMPY = {"float32": np.float32, "float16": np.float16, "int64": np.int64}
ELEMENT = {"float32": 1, "float16": 10, "int64": 7}


class HostDevice:
    """Device memory is host memory; a stream writes its work down, and does it when it is waited for: as late as a GPU may."""

    def __init__(self) -> None:
        self.held: dict[int, npt.NDArray[np.uint8]] = {}
        self.pending: dict[int, list[Callable[[], None]]] = {}
        self.graphs: list[HostGraph] = []
        self.captured = self.replayed = 0
        self.capturing: dict[int, list[Callable[[], None]]] = {}
        self.events: list[str] = []

    def card(self) -> Card:
        return Card("host", "8.9", "13.0", "580.65.06", 1 << 30)

    def allocate(self, n_bytes: int, stream: int) -> int:
        memory = np.full(n_bytes, 0xAB, np.uint8)
        self.held[memory.ctypes.data] = memory
        self.do(lambda: memory.fill(0), stream)
        return int(memory.ctypes.data)

    def free(self, address: int) -> None:
        self.events.append("free")
        del self.held[address]

    def pinned(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        return np.zeros(n_bytes, np.uint8)

    def stream(self) -> int:
        number = 1 + max(self.pending, default=0)
        self.pending[number] = []
        return number

    def close_stream(self, stream: int) -> None:
        self.events.append("close stream")
        assert not self.pending.pop(stream), "work was left on a stream"

    def upload(self, address: int, host: npt.NDArray[Any], stream: int) -> None:
        recording, given = stream in self.capturing, host.copy()

        def copy() -> None:
            assert recording or np.array_equal(host, given), "a buffer was rewritten before its upload was done"
            ctypes.memmove(address, host.ctypes.data, host.nbytes)

        self.do(copy, stream)

    def download(self, host: npt.NDArray[Any], address: int, stream: int) -> None:
        self.do(lambda: ctypes.memmove(host.ctypes.data, address, host.nbytes) and None, stream)

    def wait(self, stream: int) -> None:
        assert stream not in self.capturing, "a stream that is being captured can't be waited for"
        actions, self.pending[stream] = self.pending[stream], []
        for action in actions:
            action()

    def capture(self, work: Callable[[], None], stream: int) -> HostGraph:
        assert not self.pending[stream], "recorded before the run that makes ready for it is done"
        self.capturing[stream] = []
        work()
        graph = HostGraph(self, stream, self.capturing.pop(stream))
        self.graphs.append(graph)
        self.captured += 1
        return graph

    def do(self, action: Callable[[], None], stream: int) -> None:
        self.capturing.get(stream, self.pending[stream]).append(action)


class HostGraph:
    """What was recorded."""

    def __init__(self, device: HostDevice, stream: int, actions: list[Callable[[], None]]) -> None:
        self.device, self.stream, self.actions = device, stream, actions

    def replay(self) -> None:
        self.device.replayed += 1
        for action in self.actions:
            self.device.do(action, self.stream)

    def close(self) -> None:
        assert not self.device.pending[self.stream], "a graph is given back while it runs"
        self.device.events.append("close graph")
        self.device.graphs.remove(self)


class HostLibrary:
    """Opens ONNX files as engines."""

    def __init__(self, path: Path, graph: Graph, plan: EnginePlan, device: HostDevice) -> None:
        self.flavour = SimpleNamespace(name="tensorrt")
        self.version = "host"
        self.serialized = 0
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._engine = _Engine(session, graph, plan, device)
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: self._engine if data == b"engine" else None)
        self._runtime = runtime

    def runtime(self, write: Callable[[str], None]) -> Any:
        write("error: not an engine")
        return self._runtime

    def numpy_name(self, kind: str) -> str:
        return kind

    def running(self, engine: _Engine, compiled: bytes, before: Any = None) -> Any:
        grown = compiled + b"k"  # as if a kernel had been compiled

        def serialize() -> bytes:
            self.serialized += 1
            return grown

        return SimpleNamespace(captures=False, context=lambda: _Context(engine), compiled=serialize)


class _Engine:
    def __init__(self, session: Any, graph: Graph, plan: EnginePlan, device: HostDevice) -> None:
        self.session, self.graph, self.plan, self.device = session, graph, plan, device
        self.specs = {spec.name: spec for spec in (*graph.inputs, *graph.outputs)}
        self.num_io_tensors = len(self.specs)

    def get_tensor_name(self, i: int) -> str:
        return list(self.specs)[i]

    def get_tensor_dtype(self, name: str) -> str:
        return self.specs[name].dtype

    def get_aliased_input_tensor(self, name: str) -> str:
        return name.replace("present.", "past_key_values.")


class _Context:
    """Refuses shapes outside its optimization profile, and asserts what TensorRT asks of those who record its work."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._ready: dict[str, tuple[int, ...]] | None = None
        """The shapes of the last run that was not recorded."""
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        self._profile = number
        return True

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        assert self._profile is not None
        least, _, most = self._engine.plan.shapes(name, self._engine.specs[name].shape)[self._profile]
        assert all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True)), (name, shape, least, most)
        self._shapes[name] = shape

    def execute_async_v3(self, stream: int) -> bool:
        shapes, addresses, engine = dict(self._shapes), dict(self._addresses), self._engine
        rows, kept = shapes["logit_positions"]

        recording = stream in engine.device.capturing
        assert not recording or shapes == self._ready, "recorded without a run of these shapes before"
        self._ready = shapes

        def run() -> None:
            assert not recording or self._shapes == shapes, "replayed after its context took other shapes"
            binding = engine.session.io_binding()
            for spec in engine.graph.inputs:
                binding.bind_input(spec.name, "cpu", 0, ELEMENT[spec.dtype], shapes[spec.name], addresses[spec.name])
            for spec in engine.graph.outputs:
                past = spec.name.replace("present.", "past_key_values.")
                shape = (rows, kept, spec.shape[2]) if spec.name == "logits" else shapes[past]
                binding.bind_output(spec.name, "cpu", 0, ELEMENT[spec.dtype], shape, addresses[spec.name])
            engine.session.run_with_iobinding(binding)

        engine.device.do(run, stream)
        return True
