"""A watched GPU: what is asked inside a timed window, what waits until it is closed, and what a report says of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from edgestill.runtime import gpu_watch
from edgestill.runtime.gpu_watch import GpuWatch, with_gpu


class Card:
    """Busy while `busy`: a higher clock, and a power cap that idling does not show."""

    def __init__(self) -> None:
        self.busy = False
        self.glances = 0

    def conditions(self) -> dict[str, Any]:
        return {"sm_mhz": 2520 if self.busy else 210, "throttled_by": []}

    def glance(self) -> tuple[float, list[str]]:
        self.glances += 1
        return (2520.0, ["power cap"]) if self.busy else (210.0, [])


class Memory:
    def __init__(self, card: Card) -> None:
        self.card, self.peak_mib = card, 0.0
        self.looks: list[bool] = []

    def look(self) -> None:
        self.looks.append(self.card.busy)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_watch, "WATCH_PERIOD_S", 0.002)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_windows_are_watched_and_slow_questions_wait_for_their_end() -> None:
    card = Card()
    memory = Memory(card)
    watch = GpuWatch(card, memory)
    wait_for(lambda: len(memory.looks) > 3)
    with watch.timed():
        card.busy = True
        watch.begin()
        seen = len(memory.looks)
        before = card.glances
        wait_for(lambda: card.glances > before + 3)
        assert len(memory.looks) == seen, "the list of processes is not asked for inside a window"
        card.busy = False
    watch.look()
    assert len(memory.looks) > seen and not any(memory.looks)
    watch.end()
    done = len(memory.looks)
    time.sleep(0.02)
    assert len(memory.looks) == done, "nobody asks any more"


def test_the_report_has_the_working_cards_conditions_not_the_idle_ones() -> None:
    card = Card()
    watch = GpuWatch(card)
    card.busy = True
    watch.begin()
    with watch.timed():
        wait_for(lambda: card.glances > 2)
    watch.end()
    card.busy = False
    found = watch.found()
    assert found is not None
    assert found["start"] == found["end"] == {"sm_mhz": 2520, "throttled_by": []}
    assert found["during"] == {
        "looks": card.glances,
        "sm_mhz_min": 2520.0,
        "sm_mhz_median": 2520.0,
        "sm_mhz_max": 2520.0,
        "throttled_by": ["power cap"],
    }
    idle = {"utc": "now", "gpu": card.conditions()}
    placed = with_gpu({"engine": "tensorrt", "start": idle, "end": idle}, found)
    assert placed["start"] == placed["end"] == {"utc": "now", "gpu": found["start"]}
    assert placed["gpu_during"] == found["during"] and idle["gpu"]["sm_mhz"] == 210


def test_without_a_gpu_nothing_is_watched() -> None:
    watch = GpuWatch(None)
    watch.begin()
    with watch.timed():
        pass
    watch.end()
    assert watch.found() is None
    surroundings = {"start": {"gpu": None}}
    assert with_gpu(surroundings, None) is surroundings
