"""What a Jetson says through the kernel's files, for NVML knows little of its GPU: power rails, clock, temperature, the board.

Every reader takes the root it reads from, and gives None where the kernel does not say.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HWMON, DEVFREQ = Path("/sys/class/hwmon"), Path("/sys/class/devfreq")
THERMAL, MODEL = Path("/sys/class/thermal"), Path("/proc/device-tree/model")
POWER_PERIOD_S = 0.05
"""Reading a rail takes the bus of its monitor for about a millisecond."""
RAILS = (
    ("VDD_IN",),
    ("POM_5V_IN",),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("VDD_CPU_GPU_CV", "VDD_SOC"),
    ("VDD_CPU_GPU_CV",),
    ("VDD_GPU_SOC",),
)
"""Labels of INA3221 channels whose sum is read, the first of which all exist. VDD_IN is the whole module (Orin Nano and NX),
POM_5V_IN the whole board of older ones; AGX Orin has neither, and its three make up the module ("Platform Power and Performance" in
the Jetson Linux Developer Guide, docs.nvidia.com/jetson). The last ones are parts of a module."""
GPU_NAME = re.compile(r"gpu|g[apv]\d\db", re.IGNORECASE)
"""Names of a Jetson's GPU in devfreq: 17000000.gpu, 17000000.ga10b, 17000000.gv11b."""
BANDWIDTH_GB_PER_S = (
    ("AGX Orin", 24_000, 204.8),
    ("Orin NX", 6_000, 102.4),
    (r"Orin Nano\b.*\bSuper", 6_000, 102.0),
    ("Orin Nano", 6_000, 68.0),
)
"""(model of the board, least memory in MiB, bandwidth): Jetson modules, table "Technical Specifications"
(https://www.nvidia.com/en-us/autonomous-machines/embedded-systems/jetson-orin/). Modules with less memory have a narrower bus."""


@dataclass(frozen=True)
class Rail:
    """One channel of an INA3221 power monitor, as the kernel's hwmon shows it: millivolts and milliamperes."""

    name: str
    millivolts: Path
    milliamperes: Path

    def watts(self) -> float:
        """Present power, W."""
        return int(self.millivolts.read_text()) * int(self.milliamperes.read_text()) / 1e6


@dataclass(frozen=True)
class Rails:
    """Channels that are read together."""

    parts: tuple[Rail, ...]

    @property
    def name(self) -> str:
        """`VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0`."""
        return " + ".join(rail.name for rail in self.parts)

    def watts(self) -> float:
        """Present power of all, W."""
        return sum(rail.watts() for rail in self.parts)


def power_rails(root: Path = HWMON) -> Rails | None:
    """The channels that come nearest to the whole board, None where there is no INA3221 (or it may not be read)."""
    found: dict[str, Rail] = {}
    for label in sorted(root.glob("hwmon*/in*_label")):
        number = label.name.removeprefix("in").removesuffix("_label")
        try:
            if "ina3221" not in (label.parent / "name").read_text():
                continue
            rail = Rail(
                label.read_text().strip(), label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
            )
            rail.watts()
        except (OSError, ValueError):
            continue
        found[rail.name] = rail
    for names in RAILS:
        if all(name in found for name in names):
            return Rails(tuple(found[name] for name in names))
    return None


class JetsonEnergy:
    """Joules of a Jetson since this object was made: its power rails sampled by a thread and summed."""

    def __init__(self, rails: Rails) -> None:
        self.what = f"the board: {rails.name}"
        self._rails = rails
        self._joules, self._before, self._watts = 0.0, time.perf_counter(), rails.watts()
        self._lock = threading.Lock()
        threading.Thread(target=self._sample, daemon=True).start()

    def joules(self) -> float:
        """Energy since the start, J."""
        with self._lock:
            now = time.perf_counter()
            watts = self._rails.watts()
            self._joules += (now - self._before) * (watts + self._watts) / 2  # trapezoid between two samples
            self._before, self._watts = now, watts
            return self._joules

    def idle_watts(self, seconds: float = 1.0) -> float:
        """Mean power while this process sleeps for `seconds`, W."""
        start, energy = time.perf_counter(), self.joules()
        time.sleep(seconds)
        return (self.joules() - energy) / (time.perf_counter() - start)

    def _sample(self) -> None:
        while True:
            time.sleep(POWER_PERIOD_S)
            self.joules()


class JetsonGpu:
    """The GPU of a Jetson by the kernel's files."""

    def __init__(self, clock: Path, thermal: Path = THERMAL, rails: Rails | None = None) -> None:
        self._clock, self._thermal, self._rails = clock, thermal, rails

    def conditions(self) -> dict[str, Any]:
        """Clock (MHz), temperature (C) and power (W) right now; the kernel does not say what throttles."""
        return {
            "sm_mhz": self.glance()[0],
            "memory_mhz": None,
            "temperature_c": self._temperature(),
            "power_w": None if self._rails is None else round(self._rails.watts(), 3),
            "throttled_by": None,
        }

    def glance(self) -> tuple[float | None, list[str] | None]:
        """(clock in MHz, None)."""
        hertz = _number(self._clock)
        return (None if hertz is None else hertz / 1e6), None

    def _temperature(self) -> float | None:
        for kind in sorted(self._thermal.glob("thermal_zone*/type")):
            if (_text(kind) or "").lower().startswith("gpu"):
                milli = _number(kind.with_name("temp"))
                return None if milli is None else milli / 1e3
        return None


def jetson_gpu(devfreq: Path = DEVFREQ, thermal: Path = THERMAL, hwmon: Path = HWMON) -> JetsonGpu | None:
    """The GPU whose clock the kernel shows, None where it shows none."""
    for folder in sorted(devfreq.glob("*")):
        if GPU_NAME.search(folder.name) and _number(folder / "cur_freq") is not None:
            return JetsonGpu(folder / "cur_freq", thermal, power_rails(hwmon))
    return None


def board(model: Path = MODEL) -> str | None:
    """What the board calls itself (`NVIDIA Jetson AGX Orin Developer Kit`), None on other machines."""
    name = _text(model)
    return name if name is not None and ("Jetson" in name or "Orin" in name) else None


def board_bandwidth(name: str | None, memory_mib: int | None) -> float | None:
    """Published memory bandwidth of a board in GB/s; None for one that is not in the table."""
    for pattern, least, bandwidth in BANDWIDTH_GB_PER_S:
        if name is not None and memory_mib is not None and re.search(pattern, name) and memory_mib >= least:
            return bandwidth
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return None


def _number(path: Path) -> float | None:
    text = _text(path)
    return float(text) if text is not None and text.lstrip("-").isdigit() else None
