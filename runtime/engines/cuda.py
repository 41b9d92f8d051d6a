"""The little of CUDA that running an engine takes, through NVIDIA's own bindings (cuda.bindings): memory, streams, graphs.

Addresses are plain integers. Every call is checked; an error names the call and what CUDA says of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgestill.runtime.errors import EdgestillError, MissingPart
from edgestill.runtime.gpu import driver_version

INSTALL = "pip install 'edgestill[tensorrt]' or 'edgestill[rtx]'"
OLDEST_BINDINGS = 12000
"""CUDA's version number of the first cuda-bindings that the extras take (any driver of CUDA 12 runs all of CUDA 12)."""
TOO_OLD = "cudaErrorInsufficientDriver"
NO_DRIVER = (TOO_OLD, "cudaErrorNoDevice", "cudaErrorInitializationError", "cudaErrorStubLibrary")


class CudaError(EdgestillError):
    """A CUDA call failed: out of memory, a device that was lost, a kernel that faulted."""


@dataclass(frozen=True)
class Card:
    """The GPU that engines run on."""

    name: str
    compute_capability: str
    cuda: str
    """The CUDA version that the driver supports."""
    driver: str
    """The driver's own version; `CUDA 13.0` where it can't be read, as on Jetson, whose driver comes with the system."""
    memory_bytes: int


class Recorded(Protocol):
    """Work that was recorded from a stream."""

    def replay(self) -> None:
        """Put it on the stream again."""
        ...

    def close(self) -> None:
        """Give it back; none of its replays may still run."""
        ...


class Device(Protocol):
    """What the backend asks of a GPU. `Cuda` is the real one."""

    def card(self) -> Card:
        """What it is."""
        ...

    def allocate(self, n_bytes: int, stream: int) -> int:
        """Address of device memory, zeroed in the stream's order."""
        ...

    def free(self, address: int) -> None:
        """Give device memory back."""
        ...

    def pinned(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Host memory that copies run from at full speed, uint8 [n_bytes]; given back with the last view of it."""
        ...

    def stream(self) -> int:
        """A new stream."""
        ...

    def close_stream(self, stream: int) -> None:
        """Give a stream back."""
        ...

    def upload(self, address: int, host: npt.NDArray[Any], stream: int) -> None:
        """Copy a contiguous array to the device, in the stream's order."""
        ...

    def download(self, host: npt.NDArray[Any], address: int, stream: int) -> None:
        """Copy from the device into a contiguous array, in the stream's order."""
        ...

    def wait(self, stream: int) -> None:
        """Until all work of the stream is done."""
        ...

    def capture(self, work: Callable[[], None], stream: int) -> Recorded:
        """Record what `work` puts on the stream instead of doing it."""
        ...


class Cuda:
    """The first GPU of this process."""

    def __init__(self) -> None:
        """Raises MissingPart where bindings, driver or GPU are missing."""
        try:
            self._rt: Any = importlib.import_module("cuda.bindings.runtime")
        except (ModuleNotFoundError, ImportError) as missing:
            raise MissingPart("cuda.bindings is not installed here", INSTALL) from missing
        code, *found = self._rt.cudaGetDeviceCount()
        if int(code) != 0 or not found[0]:
            raise self._no_gpu(code)
        self._call("cudaSetDevice", 0)

    def _no_gpu(self, code: Any) -> MissingPart:
        """Why CUDA finds no GPU: a driver that is too old answers like one that is absent, but has a version."""
        name = getattr(code, "name", str(code))
        driver = int(self._call("cudaDriverGetVersion")) if name == TOO_OLD else 0
        if driver:
            ours = int(self._call("cudaRuntimeGetVersion"))
            older = f", or pip install 'cuda-bindings=={driver // 1000}.*'" if driver >= OLDEST_BINDINGS else ""
            return MissingPart(
                f"the NVIDIA driver here is for CUDA {_version(driver)}, cuda.bindings are for {_version(ours)}",
                f"update the driver{older}",
            )
        missing = name in NO_DRIVER or int(code) == 0
        what = "no NVIDIA driver or GPU is here" if missing else f"CUDA does not start ({name})"
        return MissingPart(what, "run this on the target, or install its driver")

    def card(self) -> Card:
        """See `Device`."""
        kinds = self._rt.cudaDeviceAttr
        major, minor = (
            self._call("cudaDeviceGetAttribute", getattr(kinds, f"cudaDevAttrComputeCapability{part}"), 0)
            for part in ("Major", "Minor")
        )
        version = int(self._call("cudaDriverGetVersion"))
        properties = self._call("cudaGetDeviceProperties", 0)
        name = properties.name.decode(errors="replace") if isinstance(properties.name, bytes) else str(properties.name)
        _, total = self._call("cudaMemGetInfo")
        cuda = _version(version)
        driver = driver_version() or f"CUDA {cuda}"
        return Card(name.strip("\0"), f"{major}.{minor}", cuda, driver, int(total))

    def allocate(self, n_bytes: int, stream: int) -> int:
        """See `Device`."""
        address = int(self._call("cudaMalloc", max(n_bytes, 1)))
        # on this stream: cudaMemset returns before it is done, on another stream, for which a non-blocking one does not wait
        self._call("cudaMemsetAsync", address, 0, max(n_bytes, 1), stream)
        return address

    def free(self, address: int) -> None:
        """See `Device`."""
        self._call("cudaFree", address)

    def pinned(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """See `Device`."""
        address = int(self._call("cudaMallocHost", max(n_bytes, 1)))
        memory = (ctypes.c_uint8 * n_bytes).from_address(address)
        # with the last array that looks at it: logits are views, and may outlive the lane that made them
        weakref.finalize(memory, self._free_pinned, address).atexit = False
        return np.ctypeslib.as_array(memory)

    def _free_pinned(self, address: int) -> None:
        with contextlib.suppress(CudaError):  # nobody is there to hear of it
            self._call("cudaFreeHost", address)

    def stream(self) -> int:
        """See `Device`."""
        flag = int(getattr(self._rt, "cudaStreamNonBlocking", 1))
        return int(self._call("cudaStreamCreateWithFlags", flag))

    def close_stream(self, stream: int) -> None:
        """See `Device`."""
        self._call("cudaStreamDestroy", stream)

    def upload(self, address: int, host: npt.NDArray[Any], stream: int) -> None:
        """See `Device`."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, host.ctypes.data, host.nbytes, kind, stream)

    def download(self, host: npt.NDArray[Any], address: int, stream: int) -> None:
        """See `Device`."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host.ctypes.data, address, host.nbytes, kind, stream)

    def wait(self, stream: int) -> None:
        """See `Device`."""
        self._call("cudaStreamSynchronize", stream)

    def capture(self, work: Callable[[], None], stream: int) -> Recorded:
        """See `Device`."""
        with self._capturing(stream) as ended:
            work()
        try:
            executable = self._call("cudaGraphInstantiate", ended[0], 0)
        finally:
            self._call("cudaGraphDestroy", ended[0])
        return _CudaGraph(self, executable, stream)

    @contextmanager
    def _capturing(self, stream: int) -> Any:
        # relaxed: what the garbage collector gives back meanwhile, memory of another model, must not end the recording
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self._call("cudaStreamBeginCapture", stream, mode)
        ended: list[Any] = []
        try:
            yield ended
        except BaseException:
            self._rt.cudaStreamEndCapture(stream)  # a stream left capturing takes no other work
            raise
        ended.append(self._call("cudaStreamEndCapture", stream))

    def _call(self, name: str, *arguments: Any) -> Any:
        """The results of a CUDA function without its error code.

        Raises:
            CudaError: it failed.
        """
        code, *results = getattr(self._rt, name)(*arguments)
        if int(code) != 0:
            _, words = self._rt.cudaGetErrorString(code)
            text = words.decode(errors="replace") if isinstance(words, bytes) else str(words)
            sizes = [argument for argument in arguments if isinstance(argument, int)]
            asked = (
                f" of {max(sizes) / (1 << 20):.1f} MiB" if name in ("cudaMalloc", "cudaMallocHost") and sizes else ""
            )
            raise CudaError(f"{name}{asked} failed: {text}; free device memory or restart the process")
        return results[0] if len(results) == 1 else results


class _CudaGraph:
    """An executable graph of CUDA."""

    def __init__(self, cuda: Cuda, executable: Any, stream: int) -> None:
        self._cuda, self._executable, self._stream = cuda, executable, stream

    def replay(self) -> None:
        """See `Recorded`."""
        self._cuda._call("cudaGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """See `Recorded`."""
        self._cuda._call("cudaGraphExecDestroy", self._executable)


def _version(number: int) -> str:
    """12090 is CUDA 12.9."""
    return f"{number // 1000}.{number % 1000 // 10}"
