"""The two TensorRTs behind one thin adapter: `tensorrt` (the full one) and `tensorrt-rtx`, whose Python APIs are nearly the same.

    tensorrt       builds on the GPU that will run the engine, for it alone
    tensorrt-rtx   builds anywhere, a machine without a GPU included, for chosen compute capabilities; the engine is finished
                   by just-in-time compilation on the card

What differs between the two and their versions stands here; builder.py and backends/tensorrt.py know one API.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from edgestill.runtime.engines.capabilities import KV_CACHE_FROM
from edgestill.runtime.errors import BadInput, MissingPart


@dataclass(frozen=True)
class Flavour:
    """One of the two."""

    name: str
    module: str
    extra: str
    """Of pyproject.toml."""
    builds_without_gpu: bool
    times_kernels: bool
    """Whether the builder measures kernels, so that a timing cache shortens the next build; the other compiles on the card."""


FLAVOURS = {
    "tensorrt": Flavour("tensorrt", "tensorrt", "tensorrt", builds_without_gpu=False, times_kernels=True),
    "tensorrt-rtx": Flavour("tensorrt-rtx", "tensorrt_rtx", "rtx", builds_without_gpu=True, times_kernels=False),
}


def is_engine(engine: Any) -> bool:
    """Whether a profile's `device.engine` is a TensorRT flavour."""
    return engine in FLAVOURS


def on_gpu(engine: Any) -> bool:
    """Whether a profile's `device.engine` runs on an NVIDIA GPU."""
    return is_engine(engine) or engine == "onnxruntime-cuda"


class Library:
    """An imported TensorRT."""

    def __init__(self, flavour: Flavour, module: ModuleType) -> None:
        self.flavour = flavour
        self.trt: Any = module
        self.version = str(module.__version__)

    def runtime(self, write: Callable[[str], None]) -> Any:
        """A Runtime that logs to `write`.

        Raises:
            MissingPart: CUDA does not start.
        """
        return self._started(self.trt.Runtime, write)

    def builder(self, write: Callable[[str], None]) -> Any:
        """A Builder that logs to `write`.

        Raises:
            MissingPart: CUDA does not start.
        """
        return self._started(self.trt.Builder, write)

    def _started(self, kind: Any, write: Callable[[str], None]) -> Any:
        try:
            return kind(self.logger(write))
        except TypeError as refusal:
            if "nullptr" not in str(refusal):  # the bindings' word for a factory that gave nothing
                raise
            raise MissingPart(
                f"{self.flavour.name} {self.version} does not start: CUDA finds no GPU, or its driver is too old",
                "run this on the target, or update its driver",
            ) from refusal

    # build -----------------------------------------------------------------------------------------------------------

    def logger(self, write: Callable[[str], None]) -> Any:
        """An ILogger that hands lines to `write`, with what severity they have; VERBOSE is left out."""
        trt = self.trt
        names = {getattr(trt.ILogger.Severity, n): n.lower() for n in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")}

        class Lines(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in names:
                    write(f"{names[severity]}: {message}")

        return Lines()

    def progress_monitor(self, step: Callable[[str, int, int], None]) -> Any:
        """An IProgressMonitor that calls `step` (phase, done, total) for the outermost phases."""
        trt = self.trt

        class Steps(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)
                self._outer: dict[str, int] = {}

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                if not parent_phase:
                    self._outer[phase_name] = num_steps

            def phase_finish(self, phase_name: str) -> None:
                self._outer.pop(phase_name, None)

            def step_complete(self, phase_name: str, step_number: int) -> bool:
                if phase_name in self._outer:
                    step(phase_name, step_number + 1, self._outer[phase_name])
                return True  # go on

        return Steps()

    def network(self, builder: Any) -> Any:
        """An empty network in which every type is the graph's (newer versions know no other)."""
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return builder.create_network(0 if flag is None else 1 << int(flag))

    def target(self, config: Any, compute_capability: str | None) -> None:
        """Make `config` build for a card of that capability; None for the card at hand.

        Raises:
            BadInput: this flavour builds for the card at hand only, or not for that one.
        """
        if not self.flavour.builds_without_gpu:
            if compute_capability is not None:
                raise BadInput(f"{self.flavour.name} builds for the GPU at hand only, not for {compute_capability}")
            return
        kinds = self.trt.ComputeCapability
        name = "CURRENT" if compute_capability is None else f"SM{compute_capability.replace('.', '')}"
        kind = getattr(kinds, name, None)
        config.num_compute_capabilities = 1
        if kind is None or not config.set_compute_capability(kind, 0):
            offered = ", ".join(sorted(n for n in kinds.__members__ if n.startswith("SM")))
            raise BadInput(f"{self.flavour.name} {self.version} builds for {offered}, not for {compute_capability}")

    def let_attention_decompose(self, network: Any) -> int:
        """Allow attention without a kernel of its own (float32, odd head sizes) to run as plain products; returns how many
        there are."""
        trt, found = self.trt, 0
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionInputLayer  # the API hands layers out as their base class
                layer.attention.decomposable = True
                found += 1
        return found

    # run -------------------------------------------------------------------------------------------------------------

    def numpy_name(self, kind: Any) -> str:
        """numpy's name of a tensor's type; bfloat16 has none in numpy and keeps its own."""
        trt = self.trt
        names = {
            trt.DataType.FLOAT: "float32",
            trt.DataType.HALF: "float16",
            trt.DataType.BF16: "bfloat16",
            trt.DataType.INT64: "int64",
            trt.DataType.INT32: "int32",
        }
        return names.get(kind, str(kind))

    def running(self, engine: Any, compiled: bytes, before: Running | None = None) -> Running:
        """How contexts of `engine` are made; `compiled`: kernels that an earlier process compiled for it on this card.

        `before`: contexts share its kernels, and compile those of a new shape before it runs, not beside it.
        """
        if self.flavour.times_kernels:
            return Running(engine, None, None)
        config = engine.create_runtime_config()
        config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        kinds = self.trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kinds.LAZY if before is None else kinds.EAGER
        cache = config.create_runtime_cache() if before is None else before.cache
        if compiled:
            cache.deserialize(compiled)
        config.set_runtime_cache(cache)
        return Running(engine, config, cache)


@dataclass(frozen=True)
class Running:
    """An engine with what its contexts share. TensorRT-RTX compiles kernels when a shape first runs, and keeps them in `cache`."""

    engine: Any
    config: Any
    cache: Any

    @property
    def captures(self) -> bool:
        """Whether contexts record their CUDA graphs themselves."""
        return self.config is not None

    def context(self) -> Any:
        """A new execution context, None where memory is short."""
        if self.config is None:
            return self.engine.create_execution_context()
        return self.engine.create_execution_context(self.config)

    def compiled(self) -> bytes:
        """All kernels that were compiled so far, for the next process."""
        return b"" if self.cache is None else bytes(self.cache.serialize())


def open_library(name: str) -> Library:
    """Import the flavour called `name`.

    Raises:
        MissingPart: it is not installed, its libraries do not load, or it is too old.
    """
    flavour = FLAVOURS[name]
    install = f"pip install 'edgestill[{flavour.extra}]'"
    try:
        module = importlib.import_module(flavour.module)
    except ModuleNotFoundError as missing:
        raise MissingPart(f"{name} is not installed here", install) from missing
    except (ImportError, OSError) as broken:
        raise MissingPart(
            f"{name} does not load ({' '.join(str(broken).split())[:160]})", f"reinstall it: {install}"
        ) from broken
    found = tuple(int(part) for part in re.findall(r"\d+", str(module.__version__))[:2])
    if found < KV_CACHE_FROM[name]:
        least = ".".join(map(str, KV_CACHE_FROM[name]))
        raise MissingPart(
            f"{name} {module.__version__} cannot update a cache in place", f"install {name} {least} or newer"
        )
    return Library(flavour, module)
