"""What an NVIDIA GPU says of itself: identity, memory of this process, clocks, temperature, throttling, energy.

Through NVML (the nvidia-ml-py package) on cards; where it is silent, as on a Jetson, through the kernel's files (jetson.py) and
CUDA (cuda_facts.py). What cannot be read is None, or a reason where a report would show it.
"""

from __future__ import annotations

import importlib
import os
import time
from typing import Any

from edgestill.runtime.cuda_facts import PoolMemory, open_cuda
from edgestill.runtime.gpu_watch import Watched
from edgestill.runtime.jetson import JetsonEnergy, jetson_gpu, power_rails

MIB = 1 << 20
BUS_ID_CHARACTERS = 16
"""Room for a PCI bus id, which takes 13 with its end."""
THROTTLE = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}
"""Bits of nvmlDeviceGetCurrentClocksThrottleReasons that slow a measurement down (nvml.h)."""
BUS_WIDTH_FACTOR = 2
"""Transfers per memory clock: GDDR and HBM are double data rate by NVML's clock."""


class Gpu:
    """One GPU, by NVML: the one at a PCI bus id, or NVML's first."""

    def __init__(self, nvml: Any, bus_id: str | None = None) -> None:
        self._nvml = nvml
        self._handle = (
            nvml.nvmlDeviceGetHandleByIndex(0) if bus_id is None else nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        )

    def identity(self) -> dict[str, Any]:
        """name, compute_capability, driver, memory_mib, memory_bandwidth_gb_per_s (of its memory clock and bus width)."""
        capability = self._read("nvmlDeviceGetCudaComputeCapability")
        memory = self._read("nvmlDeviceGetMemoryInfo")
        width = self._read("nvmlDeviceGetMemoryBusWidth")
        clock = self._read("nvmlDeviceGetMaxClockInfo", self._nvml.NVML_CLOCK_MEM)
        bandwidth = None if not width or not clock else round(BUS_WIDTH_FACTOR * clock * 1e6 * width / 8 / 1e9, 1)
        return {
            "name": _text(self._nvml.nvmlDeviceGetName(self._handle)),
            "compute_capability": None if capability is None else ".".join(map(str, capability)),
            "driver": _text(self._nvml.nvmlSystemGetDriverVersion()),
            "memory_mib": None if memory is None else int(memory.total) // MIB,
            "memory_bandwidth_gb_per_s": bandwidth,
        }

    def conditions(self) -> dict[str, Any]:
        """Clocks (MHz), temperature (C), power (W) and what slows the card down, right now."""
        nvml = self._nvml
        power = self._read("nvmlDeviceGetPowerUsage")
        return {
            "sm_mhz": self._read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            "memory_mhz": self._read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "temperature_c": self._read("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "power_w": None if power is None else power / 1e3,
            "throttled_by": self._throttled_by(),
        }

    def glance(self) -> tuple[float | None, list[str] | None]:
        """(SM clock in MHz, what slows the card down): two quick questions, for a timed window."""
        return self._read("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM), self._throttled_by()

    def process_mib(self, pid: int | None = None) -> float | None:
        """Device memory of this process; None where the driver does not say (containers with their own process numbers)."""
        wanted = os.getpid() if pid is None else pid
        found = self._read("nvmlDeviceGetComputeRunningProcesses") or []
        used = [entry.usedGpuMemory for entry in found if entry.pid == wanted]
        return None if not used or used[0] is None else used[0] / MIB

    def used_mib(self) -> float | None:
        """Device memory that all processes use together."""
        memory = self._read("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used) / MIB

    def millijoules(self) -> int | None:
        """Energy of the card since its driver was loaded; None before the Volta generation."""
        found = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if found is None else int(found)

    def _throttled_by(self) -> list[str] | None:
        bits = self._read("nvmlDeviceGetCurrentClocksThrottleReasons")
        return None if bits is None else [name for bit, name in THROTTLE.items() if bits & bit]

    def _read(self, name: str, *arguments: Any) -> Any:
        """What NVML answers, None where this card or driver does not support the question."""
        try:
            return getattr(self._nvml, name)(self._handle, *arguments)
        except (self._nvml.NVMLError, AttributeError):
            return None


def open_gpu() -> Gpu | None:
    """The GPU that engines run on, or None where NVML, its driver or a GPU is missing.

    Of several, the one that CUDA calls its first; NVML's first where CUDA can't be asked.
    """
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        count = nvml.nvmlDeviceGetCount()
        return Gpu(nvml, first_gpu() if count > 1 else None) if count else None  # one card: CUDA need not wake up
    except nvml.NVMLError:
        return None


def first_gpu() -> str | None:
    """The PCI bus id of the GPU that engines run on, such as 0000:3B:00.0; None without bindings, driver or GPU.

    CUDA and NVML number cards differently: CUDA by speed, and only those of CUDA_VISIBLE_DEVICES.
    """
    try:
        runtime: Any = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return None
    code, found = runtime.cudaDeviceGetPCIBusId(BUS_ID_CHARACTERS, 0)
    if int(code) != 0:
        return None
    text = found.decode("ascii", "replace") if isinstance(found, bytes) else str(found)
    return text.partition("\0")[0]


def driver_version() -> str | None:
    """The NVIDIA driver's own version, such as 580.65.06; None where NVML is missing or does not say."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        return _text(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError:
        return None


def _nvml() -> Any:
    """The NVML module, ready to be asked; None where it, the library or the driver is missing."""
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


class GpuEnergy:
    """Joules of the whole card since this object was made, by its own counter (about 20 ms fine)."""

    what = "the whole card"

    def __init__(self, gpu: Gpu, start: int) -> None:
        self._gpu, self._start = gpu, start

    def joules(self) -> float:
        """Energy since the start, J."""
        return ((self._gpu.millijoules() or self._start) - self._start) / 1e3

    def idle_watts(self, seconds: float = 1.0) -> float:
        """Mean power while this process sleeps for `seconds`, W."""
        start, energy = time.perf_counter(), self.joules()
        time.sleep(seconds)
        return (self.joules() - energy) / (time.perf_counter() - start)


def open_gpu_energy(gpu: Gpu | None = None) -> GpuEnergy | JetsonEnergy | str:
    """A counter of what the GPU (on Jetson: the board) draws, or the reason why there is none."""
    rails = power_rails()
    if rails is not None:
        return JetsonEnergy(rails)
    found = gpu or open_gpu()
    if found is None:
        return "no NVML here (install nvidia-ml-py and the driver)"
    start = found.millijoules()
    return "this GPU keeps no energy counter" if start is None else GpuEnergy(found, start)


def watched_gpu(gpu: Gpu | None) -> Watched | None:
    """Who says how the GPU fares: NVML, or the kernel where NVML has no clocks."""
    if gpu is not None and gpu.glance()[0] is not None:
        return gpu
    return jetson_gpu() or gpu


def watched_memory(gpu: Gpu | None) -> DeviceMemory | PoolMemory | None:
    """Who says how much device memory is in use: NVML, or CUDA where NVML does not."""
    if gpu is not None and gpu.used_mib() is not None:
        return DeviceMemory(gpu)
    cuda = open_cuda()
    return None if cuda is None else PoolMemory(cuda)


class DeviceMemory:
    """The highest device memory of this process, looked at whenever asked to."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._before = gpu.used_mib()
        self.peak_mib = 0.0
        self.by_process = False

    @property
    def reason(self) -> str | None:
        """What a value is that is not this process's own."""
        return None if self.by_process else "growth of the whole card's use: the driver hides this process's own"

    def look(self) -> None:
        """Take a sample."""
        own = self._gpu.process_mib()
        if own is not None:
            self.by_process = True
        elif (used := self._gpu.used_mib()) is not None and self._before is not None:
            own = used - self._before
        self.peak_mib = max(self.peak_mib, own or 0.0)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
