"""Energy of the processor package from RAPL counters under /sys/class/powercap, where the kernel lets this process read them.

A counter is in microjoules and wraps at `max_energy_range_uj`; it covers the whole package, so whatever else runs is in it
(the idle power that is subtracted is measured in the same process, just before).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

POWERCAP = Path("/sys/class/powercap")
IDLE_SECONDS = 1.0


class Counter(Protocol):
    """Something that counts the joules that a part of the machine draws."""

    @property
    def what(self) -> str:
        """Which part."""
        ...

    def joules(self) -> float:
        """Energy since the counter was made, J."""
        ...

    def idle_watts(self, seconds: float = IDLE_SECONDS) -> float:
        """Mean power while this process sleeps for `seconds`, W."""
        ...


@dataclass
class _Zone:
    """One package: its counter file, the value where it wraps, the last raw reading (microjoules)."""

    counter: Path
    wraps_at: int
    last: int


class EnergyCounter:
    """Joules drawn by all packages since this object was made. Read it at least once per wrap (minutes)."""

    what = "the processor's packages"

    def __init__(self, zones: list[_Zone]) -> None:
        self._zones = zones
        self._microjoules = 0

    def joules(self) -> float:
        """Energy since the start, J; never falls, whatever the counters wrap."""
        for zone in self._zones:
            raw = int(zone.counter.read_text())
            step = raw - zone.last
            self._microjoules += step if step >= 0 else step + zone.wraps_at
            zone.last = raw
        return self._microjoules / 1e6

    def idle_watts(self, seconds: float = IDLE_SECONDS) -> float:
        """Mean power while this process sleeps for `seconds`, W."""
        start, energy = time.perf_counter(), self.joules()
        time.sleep(seconds)
        return (self.joules() - energy) / (time.perf_counter() - start)


def open_counter(root: Path = POWERCAP) -> EnergyCounter | str:
    """A counter over all packages, or the reason why energy is unavailable."""
    zones: list[_Zone] = []
    for folder in sorted(root.glob("*-rapl:*")):
        if folder.name.count(":") != 1:  # intel-rapl:0:1 is a part of the package intel-rapl:0
            continue
        try:
            wraps_at = int((folder / "max_energy_range_uj").read_text())
            zones.append(_Zone(folder / "energy_uj", wraps_at, int((folder / "energy_uj").read_text())))
        except PermissionError:
            return f"{folder}/energy_uj is readable by root only"
        except (OSError, ValueError):
            continue
    return EnergyCounter(zones) if zones else f"no energy counter under {root}"
