"""What CUDA itself says of the first GPU, where NVML is silent (Jetson) or missing: memory in use, bus, cache, one pool or two."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class CudaFacts:
    """None where CUDA does not say."""

    compute_capability: str
    integrated: bool
    """CPU and GPU share one memory."""
    memory_bandwidth_gb_per_s: float | None
    """Of memory clock and bus; None for an integrated GPU, whose figures are not those of the shared memory."""
    l2_cache_mib: float | None


class CudaRuntime:
    """NVIDIA's bindings with a device behind them."""

    def __init__(self, runtime: Any) -> None:
        self._rt = runtime

    def facts(self) -> CudaFacts:
        """Of device 0."""
        names = ("Integrated", "MemoryClockRate", "GlobalMemoryBusWidth", "L2CacheSize")
        integrated, kilohertz, bits, cache = (self._attribute(name) for name in names)
        known = not integrated and kilohertz and bits
        major, minor = (self._attribute(f"ComputeCapability{part}") for part in ("Major", "Minor"))
        return CudaFacts(
            compute_capability=f"{major}.{minor}",
            integrated=bool(integrated),
            memory_bandwidth_gb_per_s=round(2 * kilohertz * 1e3 * bits / 8 / 1e9, 1) if known else None,
            l2_cache_mib=round(cache / MIB, 3) if cache else None,
        )

    def used_mib(self) -> float | None:
        """Memory of the device that all processes use together; the first call starts CUDA in this process."""
        code, *found = self._rt.cudaMemGetInfo()
        return None if int(code) != 0 else (int(found[1]) - int(found[0])) / MIB

    def _attribute(self, name: str) -> int:
        """The value of cudaDevAttr<name>, 0 where this CUDA does not have it."""
        kind = getattr(self._rt.cudaDeviceAttr, f"cudaDevAttr{name}", None)
        if kind is None:
            return 0
        code, *found = self._rt.cudaDeviceGetAttribute(kind, 0)
        return int(found[0]) if int(code) == 0 else 0


def open_cuda() -> CudaRuntime | None:
    """CUDA's runtime, or None where bindings, driver or GPU are missing."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return None
    code, *found = runtime.cudaGetDeviceCount()
    return CudaRuntime(runtime) if int(code) == 0 and found[0] else None


class PoolMemory:
    """The growth of what is in use of the device's memory since this object was made, by CUDA."""

    def __init__(self, cuda: CudaRuntime) -> None:
        self._cuda = cuda
        self._before = cuda.used_mib()
        self.peak_mib = 0.0
        self.reason = (
            "growth of the one pool that CPU and GPU share (unified memory), since CUDA started"
            if cuda.facts().integrated
            else "growth of the whole card's use since CUDA started: NVML does not tell this process's own"
        )

    def look(self) -> None:
        """Take a sample."""
        used = self._cuda.used_mib()
        if used is not None and self._before is not None:
            self.peak_mib = max(self.peak_mib, used - self._before)
