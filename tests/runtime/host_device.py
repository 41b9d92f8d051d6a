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
    """Device memory is host memory; a stream does its work at once, or writes it down while it is being captured."""

    def __init__(self) -> None:
        self.held: dict[int, npt.NDArray[np.uint8]] = {}
        self.captured = self.replayed = 0
        self.log: list[Callable[[], None]] | None = None

    def card(self) -> Card:
        return Card("host", "8.9", "13.0", 1 << 30)

    def allocate(self, n_bytes: int) -> int:
        memory = np.zeros(n_bytes, np.uint8)
        self.held[memory.ctypes.data] = memory
        return int(memory.ctypes.data)

    def free(self, address: int) -> None:
        del self.held[address]

    def pinned(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        return np.zeros(n_bytes, np.uint8)

    def stream(self) -> int:
        return 1

    def upload(self, address: int, host: npt.NDArray[Any], stream: int) -> None:
        self.do(lambda: ctypes.memmove(address, host.ctypes.data, host.nbytes) and None)

    def download(self, host: npt.NDArray[Any], address: int, stream: int) -> None:
        self.do(lambda: ctypes.memmove(host.ctypes.data, address, host.nbytes) and None)

    def wait(self, stream: int) -> None:
        assert self.log is None, "a stream that is being captured can't be waited for"

    def capture(self, work: Callable[[], None], stream: int) -> Callable[[], None]:
        self.log = []
        work()
        recorded, self.log = self.log, None
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            for action in recorded:
                action()

        return replay

    def do(self, action: Callable[[], None]) -> None:
        if self.log is None:
            action()
        else:
            self.log.append(action)


class HostLibrary:
    """Opens ONNX files as engines."""

    def __init__(self, path: Path, graph: Graph, plan: EnginePlan, device: HostDevice) -> None:
        self.flavour = SimpleNamespace(name="tensorrt")
        self.version = "host"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._engine = _Engine(session, graph, plan, device)
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: self._engine if data == b"engine" else None)
        self.trt = SimpleNamespace(Runtime=lambda logger: runtime)

    def logger(self, write: Callable[[str], None]) -> None:
        write("error: not an engine")

    def numpy_name(self, kind: str) -> str:
        return kind

    def running(self, engine: _Engine, compiled: bytes) -> Any:
        grown = compiled + b"k"  # as if a kernel had been compiled
        return SimpleNamespace(captures=False, context=lambda: _Context(engine), compiled=lambda: grown)


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
    """Refuses, as TensorRT does, shapes outside its optimization profile."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
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

        def run() -> None:
            binding = engine.session.io_binding()
            for spec in engine.graph.inputs:
                binding.bind_input(spec.name, "cpu", 0, ELEMENT[spec.dtype], shapes[spec.name], addresses[spec.name])
            for spec in engine.graph.outputs:
                past = spec.name.replace("present.", "past_key_values.")
                shape = (rows, kept, spec.shape[2]) if spec.name == "logits" else shapes[past]
                binding.bind_output(spec.name, "cpu", 0, ELEMENT[spec.dtype], shape, addresses[spec.name])
            engine.session.run_with_iobinding(binding)

        engine.device.do(run)
        return True
