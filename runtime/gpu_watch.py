"""A GPU while it works: clocks, temperature and throttling around and inside the timed windows, device memory between them.

The process that works asks, for a card says nothing of a measurement before it starts or after it is over: it idles. Inside a
window only two quick questions are asked; the list of processes, which takes milliseconds, waits until it is closed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

WATCH_PERIOD_S = 0.1


class Watched(Protocol):
    """A GPU that says how it fares."""

    def conditions(self) -> dict[str, Any]:
        """Clocks, temperature, power and throttling right now."""
        ...

    def glance(self) -> tuple[float | None, list[str] | None]:
        """(clock in MHz, what slows it down) right now, cheap enough for a timed window."""
        ...


class Memory(Protocol):
    """Device memory in use, looked at whenever asked to."""

    peak_mib: float

    def look(self) -> None:
        """Take a sample."""
        ...


class GpuWatch:
    """Watches one GPU from a thread; without a GPU and its memory it does nothing."""

    def __init__(self, gpu: Watched | None, memory: Memory | None = None) -> None:
        self._gpu, self._memory = gpu, memory
        self._start: dict[str, Any] | None = None
        self._end: dict[str, Any] | None = None
        self._clocks: list[float] = []
        self._reasons: list[str] | None = None
        self._looks = 0
        self._timed = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if gpu is not None or memory is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def begin(self) -> None:
        """The first window is about to open, and the card is warm."""
        self._start = self._conditions()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """A window in which nothing slow is asked; one that is being answered is waited for."""
        with self._lock:
            self._timed = True
        try:
            yield
        finally:
            self._timed = False

    def look(self) -> None:
        """Look at the memory now, between two windows."""
        if self._memory is not None:
            with self._lock:
                self._memory.look()

    def end(self) -> None:
        """The last window has just closed. Memory is watched no longer."""
        self._end = self._conditions()
        self.look()
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def found(self) -> dict[str, Any] | None:
        """{"start", "end": conditions, "during": what was seen inside the windows}, None without a GPU."""
        if self._gpu is None:
            return None
        clocks = sorted(self._clocks)
        during = {
            "looks": self._looks,
            "sm_mhz_min": clocks[0] if clocks else None,
            "sm_mhz_median": clocks[len(clocks) // 2] if clocks else None,
            "sm_mhz_max": clocks[-1] if clocks else None,
            "throttled_by": self._reasons,
        }
        return {"start": self._start, "end": self._end, "during": during}

    def _conditions(self) -> dict[str, Any] | None:
        return None if self._gpu is None else self._gpu.conditions()

    def _watch(self) -> None:
        while not self._stop.wait(WATCH_PERIOD_S):
            with self._lock:
                if not self._timed:
                    if self._memory is not None:
                        self._memory.look()
                    continue
            if self._gpu is not None:
                self._glance(self._gpu)

    def _glance(self, gpu: Watched) -> None:
        mhz, reasons = gpu.glance()
        self._looks += 1
        if mhz is not None:
            self._clocks.append(mhz)
        if reasons is not None:
            known = self._reasons or []
            self._reasons = known + [reason for reason in reasons if reason not in known]


def with_gpu(surroundings: dict[str, Any], found: dict[str, Any] | None) -> dict[str, Any]:
    """`environment()` with the GPU's conditions as the working process saw them, in place of the idle card's."""
    if found is None:
        return surroundings
    placed = {**surroundings, "gpu_during": found["during"]}
    for when in ("start", "end"):
        if found[when] is not None:
            placed[when] = {**surroundings.get(when, {}), "gpu": found[when]}
    return placed
