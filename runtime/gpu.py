"""What an NVIDIA GPU says of itself: identity, memory of this process, clocks, temperature, throttling, energy.

Through NVML (the nvidia-ml-py package) on cards, through the kernel's files on Jetson, whose GPU has no NVML counters. What cannot
be read is None, or a reason where a report would show it.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
POWER_PERIOD_S = 0.01
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
JETSON_RAILS = ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_GPU_SOC", "POM_5V_IN")
"""Names of INA3221 rails; the first that exists is the whole board's."""


class Gpu:
    """One GPU, by NVML: the one at a PCI bus id, or NVML's first."""

    def __init__(self, nvml: Any, bus_id: str | None = None) -> None:
        self._nvml = nvml
        self._handle = (
            nvml.nvmlDeviceGetHandleByIndex(0) if bus_id is None else nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        )

    def identity(self) -> dict[str, Any]:
        """name, compute_capability, driver, memory_mib, memory_bandwidth_gb_per_s (of its memory clock and bus width)."""
        major, minor = self._nvml.nvmlDeviceGetCudaComputeCapability(self._handle)
        memory = self._read("nvmlDeviceGetMemoryInfo")
        width = self._read("nvmlDeviceGetMemoryBusWidth")
        clock = self._read("nvmlDeviceGetMaxClockInfo", self._nvml.NVML_CLOCK_MEM)
        bandwidth = None if not width or not clock else round(BUS_WIDTH_FACTOR * clock * 1e6 * width / 8 / 1e9, 1)
        return {
            "name": _text(self._nvml.nvmlDeviceGetName(self._handle)),
            "compute_capability": f"{major}.{minor}",
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

    def __init__(self, gpu: Gpu, start: int) -> None:
        self._gpu, self._start = gpu, start

    def joules(self) -> float:
        """Energy since the start, J."""
        return ((self._gpu.millijoules() or self._start) - self._start) / 1e3

    def idle_watts(self, seconds: float = 1.0) -> float:
        """Mean power while this process sleeps for `seconds`, W."""
        return _mean_watts(self.joules, seconds)


class JetsonEnergy:
    """Joules of a Jetson board since this object was made: its power rail sampled by a thread and summed."""

    def __init__(self, rail: JetsonRail) -> None:
        self._rail = rail
        self._joules, self._before, self._watts = 0.0, time.perf_counter(), rail.watts()
        self._lock = threading.Lock()
        threading.Thread(target=self._sample, daemon=True).start()

    def joules(self) -> float:
        """Energy since the start, J."""
        with self._lock:
            now = time.perf_counter()
            watts = self._rail.watts()
            self._joules += (now - self._before) * (watts + self._watts) / 2  # trapezoid between two samples
            self._before, self._watts = now, watts
            return self._joules

    def idle_watts(self, seconds: float = 1.0) -> float:
        """Mean power while this process sleeps for `seconds`, W."""
        return _mean_watts(self.joules, seconds)

    def _sample(self) -> None:
        while True:
            time.sleep(POWER_PERIOD_S)
            self.joules()


@dataclass(frozen=True)
class JetsonRail:
    """One rail of an INA3221 power monitor, as the kernel's hwmon shows it: millivolts and milliamperes."""

    name: str
    millivolts: Path
    milliamperes: Path

    def watts(self) -> float:
        """Present power, W."""
        return int(self.millivolts.read_text()) * int(self.milliamperes.read_text()) / 1e6


def jetson_rail(root: Path = Path("/sys/class/hwmon")) -> JetsonRail | None:
    """The rail of the whole board, None where there is no INA3221 (or it may not be read)."""
    rails: dict[str, JetsonRail] = {}
    for label in sorted(root.glob("hwmon*/in*_label")):
        number = label.name.removeprefix("in").removesuffix("_label")
        try:
            if "ina3221" not in (label.parent / "name").read_text():
                continue
            rail = JetsonRail(
                label.read_text().strip(), label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
            )
            rail.watts()
        except (OSError, ValueError):
            continue
        rails[rail.name] = rail
    return next((rails[name] for name in JETSON_RAILS if name in rails), None)


def open_gpu_energy(gpu: Gpu | None = None) -> GpuEnergy | JetsonEnergy | str:
    """A counter of what the GPU (on Jetson: the board) draws, or the reason why there is none."""
    rail = jetson_rail()
    if rail is not None:
        return JetsonEnergy(rail)
    found = gpu or open_gpu()
    if found is None:
        return "no NVML here (install nvidia-ml-py and the driver)"
    start = found.millijoules()
    return "this GPU keeps no energy counter" if start is None else GpuEnergy(found, start)


class DeviceMemory:
    """The highest device memory of this process, looked at whenever asked to."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._before = gpu.used_mib()
        self.peak_mib = 0.0
        self.by_process = False

    def look(self) -> None:
        """Take a sample."""
        own = self._gpu.process_mib()
        if own is not None:
            self.by_process = True
        elif (used := self._gpu.used_mib()) is not None and self._before is not None:
            own = used - self._before
        self.peak_mib = max(self.peak_mib, own or 0.0)


def _mean_watts(joules: Any, seconds: float) -> float:
    start, energy = time.perf_counter(), joules()
    time.sleep(seconds)
    return float((joules() - energy) / (time.perf_counter() - start))


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
