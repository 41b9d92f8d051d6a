"""Energy from planted RAPL counters: packages add up, parts of a package do not, a counter may wrap."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgestill.runtime.energy import EnergyCounter, open_counter


def plant(root: Path, zone: str, microjoules: int, wraps_at: int = 1_000_000_000) -> Path:
    folder = root / zone
    folder.mkdir(parents=True)
    (folder / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def opened(root: Path) -> EnergyCounter:
    counter = open_counter(root)
    assert isinstance(counter, EnergyCounter)
    return counter


def test_packages_add_up_and_their_parts_are_not_counted_twice(tmp_path: Path) -> None:
    one, two = plant(tmp_path, "intel-rapl:0", 5_000_000), plant(tmp_path, "intel-rapl:1", 0)
    part = plant(tmp_path, "intel-rapl:0:0", 0)
    counter = opened(tmp_path)
    assert counter.joules() == 0
    one.write_text("7000000")
    two.write_text("500000")
    part.write_text("900000000")
    assert counter.joules() == pytest.approx(2.5)
    assert counter.joules() == pytest.approx(2.5)


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    file = plant(tmp_path, "intel-rapl:0", 9_000_000, wraps_at=10_000_000)
    counter = opened(tmp_path)
    for raw, joules in ((500_000, 1.5), (9_500_000, 10.5), (0, 11.0)):
        file.write_text(str(raw))
        assert counter.joules() == pytest.approx(joules)


def test_a_counter_that_stands_still_is_no_power(tmp_path: Path) -> None:
    plant(tmp_path, "intel-rapl:0", 123)
    assert opened(tmp_path).idle_watts(0.01) == 0


def test_without_a_counter_the_reason_is_given(tmp_path: Path) -> None:
    assert open_counter(tmp_path) == f"no energy counter under {tmp_path}"
    (tmp_path / "intel-rapl:0").mkdir()
    assert "no energy counter" in str(open_counter(tmp_path))
