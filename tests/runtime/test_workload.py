"""The arithmetic around a workload: on which prompts it runs, and what its samples say, on numbers done by hand."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle

from edgestill.runtime import workload
from edgestill.runtime.measure import bandwidth_fraction, energy_estimate, latency_estimates
from edgestill.runtime.reference import Reference, save_reference
from edgestill.runtime.statistics import Estimate
from edgestill.runtime.workload import Workload, prompts

WORK = Workload(prompt_tokens=8, new_tokens=5, batch_size=2, threads=1)


def test_prompts_are_held_out_tokens_in_another_order(tmp_path: Path) -> None:
    ids = np.array([[3, 4, 5, 6]] * 2, np.int32)
    zeros = np.zeros(6, np.float32)
    blocks = np.arange(2, dtype=np.int32)
    save_reference(
        Reference(ids, np.ones(6, np.uint8), blocks.astype(np.int16), blocks, zeros, ("x", "y")), tmp_path / "reference"
    )
    got = list(islice(prompts(tmp_path, Workload(8, 2, 1, 1), vocab_size=9), 20))
    assert all(sorted(prompt[0].tolist()) == [3, 3, 4, 4, 5, 5, 6, 6] for prompt in got)
    assert len({tuple(prompt[0].tolist()) for prompt in got}) > 15


def test_prompts_without_a_reference_stay_inside_the_vocabulary(tmp_path: Path) -> None:
    got = np.concatenate(list(islice(prompts(tmp_path, WORK, vocab_size=9), 20)))
    assert (got.min(), got.max()) == (0, 8)


def test_rates_count_every_row_of_the_batch() -> None:
    # 5 runs: 16 prompt tokens in 10 ms; then 2 rows x 4 tokens in 4 x 2 ms
    found = latency_estimates({"first_token_ms": [10.0] * 5, "inter_token_ms": [[2.0] * 4] * 5}, WORK)
    assert found["prefill_tokens_per_s"].value == pytest.approx(1600)
    assert found["decode_tokens_per_s"].value == pytest.approx(1000)
    assert found["decode_tokens_per_s"].lower == pytest.approx(1000)
    assert (found["first_token_ms_p50"].value, found["inter_token_ms_p50"].n) == (10, 20)
    assert found["first_token_ms_p95"].value is None
    assert found["first_token_ms_p95"].reason == "n = 5 < 100 samples"


def test_energy_is_of_all_decode_windows_together_or_says_why_not() -> None:
    """Windows of 10 ms at 5 W above 3 W idle, under a counter that ticks every 20 ms: each reads 0 or 160 mJ, together 80 each."""
    found: dict[str, Any] = {"energy_j": [0.0, 0.16] * 10, "decode_s": [0.01] * 20, "idle_watts": 3.0}
    energy = energy_estimate(found, WORK)
    assert energy.value == pytest.approx((0.08 - 0.03) / 8) and energy.n == 20
    assert energy.standard_error == pytest.approx(0.01 * (20 / 19) ** 0.5 / 20**0.5)
    assert energy.lower is not None and energy.upper is not None and energy.lower < energy.value < energy.upper
    absent = energy_estimate({"energy_j": None, "energy_reason": "no counter"}, WORK)
    assert (absent.value, absent.reason) == (None, "unavailable: no counter")


def test_bandwidth_fraction_is_null_when_the_weights_fit_in_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import edgestill.runtime.measure as measure

    monkeypatch.setattr(measure, "last_level_cache_mib", lambda: 32.0)
    monkeypatch.setattr(measure, "memory_bandwidth_gb_per_s", lambda: 10.0)
    speed = Estimate(100.0, None, 9, 90.0, 110.0)
    assert "fit in the last-level cache" in str(bandwidth_fraction(speed, 32 << 20, 1, {}).reason)
    # 50 MB x 100 steps/s = 5 GB/s of 10; two rows a step halve the steps
    assert bandwidth_fraction(speed, 50_000_000, 1, {}).value == pytest.approx(0.5)
    assert bandwidth_fraction(speed, 50_000_000, 2, {}).lower == pytest.approx(0.225)
    monkeypatch.setattr(measure, "last_level_cache_mib", lambda: None)
    assert "unknown" in str(bandwidth_fraction(speed, 50_000_000, 1, {}).reason)
    stated = {"device": {"last_level_cache_mib": 2}}
    assert bandwidth_fraction(speed, 50_000_000, 1, stated).value == pytest.approx(0.5)


class Card:
    """A GPU in its own words: the clock is high while tokens are made, and an event is written down for each question."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.peak_mib, self.reason = 0.0, None
        self.what = "the whole card"

    def conditions(self) -> dict[str, Any]:
        self.events.append("conditions")
        return {"sm_mhz": 2520}

    def glance(self) -> tuple[float, list[str]]:
        return 2520.0, []

    def look(self) -> None:
        self.events.append("look")
        self.peak_mib = 700.0

    def joules(self) -> float:
        return 0.1 * self.events.count("generation")

    def idle_watts(self) -> float:
        return 0.5


def test_the_measuring_process_asks_the_card_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conditions right before the first and right behind the last generation, memory between them, energy of all together."""
    card = Card()
    for name, value in {
        "on_gpu": lambda _: True,
        "open_gpu": lambda: None,
        "watched_gpu": lambda _: card,
        "watched_memory": lambda _: card,
        "open_gpu_energy": lambda _: card,
    }.items():
        monkeypatch.setattr(workload, name, value)
    once = workload.generate_once

    def noted(*arguments: Any) -> Any:
        card.events.append("generation")
        return once(*arguments)

    monkeypatch.setattr(workload, "generate_once", noted)
    work = Workload(prompt_tokens=8, new_tokens=5, batch_size=1, threads=1, repeats=3)
    found = workload.run_workload(make_bundle(tmp_path / "bundle"), work, lambda *_: None)
    working = [event for event in card.events if event != "look"]
    assert working == ["generation"] * 2 + ["conditions"] + ["generation"] * 3 + ["conditions"]
    first = card.events.index("conditions")
    assert "look" in card.events[first:]
    assert found["gpu"]["start"] == found["gpu"]["end"] == {"sm_mhz": 2520}
    assert (found["peak_device_mib"], found["device_reason"], found["energy_of"]) == (700.0, None, "the whole card")
    assert len(found["energy_j"]) == len(found["decode_s"]) == 3 and found["idle_watts"] == 0.5
