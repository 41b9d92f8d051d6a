"""The little of CUDA that running an engine takes, through NVIDIA's own bindings (cuda.bindings): memory, streams, graphs.

Addresses are plain integers. Every call is checked; an error names the call and what CUDA says of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgestill.runtime.errors import EdgestillError, MissingPart

INSTALL = "pip install 'edgestill[tensorrt]' or 'edgestill[rtx]'"
NO_DRIVER = ("cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaErrorInitializationError", "cudaErrorStubLibrary")


class CudaError(EdgestillError):
    """A CUDA call failed: out of memory, a device that was lost, a kernel that faulted."""


@dataclass(frozen=True)
class Card:
    """The GPU that engines run on."""

    name: str
    compute_capability: str
    driver: str
    """CUDA version that the driver supports."""
    memory_bytes: int


class Device(Protocol):
    """What the backend asks of a GPU. `Cuda` is the real one."""

    def card(self) -> Card:
        """What it is."""
        ...

    def allocate(self, n_bytes: int) -> int:
        """Address of device memory, zeroed."""
        ...

    def free(self, address: int) -> None:
        """Give device memory back."""
        ...

    def pinned(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Host memory that copies run from at full speed, uint8 [n_bytes]; never given back."""
        ...

    def stream(self) -> int:
        """A new stream."""
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

    def capture(self, work: Callable[[], None], stream: int) -> Callable[[], None]:
        """Record what `work` puts on the stream; the result replays it."""
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
            name = getattr(code, "name", str(code))
            what = (
                "no NVIDIA driver or GPU is here"
                if name in NO_DRIVER or int(code) == 0
                else f"CUDA does not start ({name})"
            )
            raise MissingPart(what, "run this on the target, or install its driver")
        self._call("cudaSetDevice", 0)

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
        driver = f"{version // 1000}.{version % 1000 // 10}"
        return Card(name.strip("\0"), f"{major}.{minor}", driver, int(total))

    def allocate(self, n_bytes: int) -> int:
        """See `Device`."""
        address = int(self._call("cudaMalloc", max(n_bytes, 1)))
        self._call("cudaMemset", address, 0, max(n_bytes, 1))
        return address

    def free(self, address: int) -> None:
        """See `Device`."""
        self._call("cudaFree", address)

    def pinned(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """See `Device`."""
        import ctypes

        address = int(self._call("cudaMallocHost", max(n_bytes, 1)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))

    def stream(self) -> int:
        """See `Device`."""
        flag = int(getattr(self._rt, "cudaStreamNonBlocking", 1))
        return int(self._call("cudaStreamCreateWithFlags", flag))

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

    def capture(self, work: Callable[[], None], stream: int) -> Callable[[], None]:
        """See `Device`."""
        with self._capturing(stream) as ended:
            work()
        executable = self._call("cudaGraphInstantiate", ended[0], 0)
        self._call("cudaGraphDestroy", ended[0])
        return lambda: self._launch(executable, stream)

    @contextmanager
    def _capturing(self, stream: int) -> Any:
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        ended: list[Any] = []
        try:
            yield ended
        except BaseException:
            self._rt.cudaStreamEndCapture(stream)  # a stream left capturing takes no other work
            raise
        ended.append(self._call("cudaStreamEndCapture", stream))

    def _launch(self, executable: Any, stream: int) -> None:
        self._call("cudaGraphLaunch", executable, stream)

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
