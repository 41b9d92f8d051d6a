"""Speed and memory in a process of its own: enough samples, named warm-up, refusals, and a child that is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from bundles import make_bundle
from engines import make_engine_bundle

from edgestill.runtime import measure
from edgestill.runtime.errors import BadInput
from edgestill.runtime.measure import bench_bundle, measure_bundle
from edgestill.runtime.statistics import Estimate
from edgestill.runtime.workload import BUDGET_S, Workload, plan_runs


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("measure") / "bundle")


def test_a_cheap_workload_has_the_samples_that_a_p95_needs(bundle: Path) -> None:
    found = measure_bundle(bundle, prompt_tokens=8, new_tokens=6, batch_size=1, threads=1)
    first, between = found.estimates["first_token_ms_p95"], found.estimates["inter_token_ms_p95"]
    assert (first.n >= 100, between.n >= 100) == (True, True)
    assert first.value is not None
    assert first.upper is not None
    assert first.upper >= first.value > 0
    assert found.estimates["peak_rss_mib"].value > 10  # type: ignore[operator]
    assert found.samples["warm_up"]
    times = [t for t, _ in found.memory_timeline["points"]]
    assert times == sorted(times)
    assert max(mib for _, mib in found.memory_timeline["points"]) <= found.estimates["peak_rss_mib"].value + 1  # type: ignore[operator]


@pytest.mark.parametrize("batch", [1, 4])
def test_rates_are_those_of_the_samples_and_a_batch_counts_all_its_tokens(bundle: Path, batch: int) -> None:
    found = bench_bundle(bundle, 8, 6, batch, None)
    rows = {row["name"]: row["value"] for row in found["checks"]}
    decode = [batch * 5 / (sum(run) / 1e3) for run in found["samples"]["inter_token_ms"]]
    prefill = [batch * 8 / (ms / 1e3) for ms in found["samples"]["first_token_ms"]]
    assert {len(run) for run in found["samples"]["inter_token_ms"]} == {5}
    # the stored samples are rounded to 0.0001 ms
    assert rows["decode_tokens_per_s"] == pytest.approx(float(np.median(decode)), rel=1e-2)
    assert rows["prefill_tokens_per_s"] == pytest.approx(float(np.median(prefill)), rel=1e-2)
    assert found["samples"]["workload"]["batch_size"] == batch
    assert found["verdict"] is None
    assert found["environment"]["engine"] == "onnxruntime-cpu"


def test_a_bench_of_an_engine_names_it_and_the_card_that_worked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measuring process's word counts: an idle card before and after it says nothing."""
    folder = make_engine_bundle(tmp_path / "bundle")
    gpu = {"start": {"sm_mhz": 2520}, "end": {"sm_mhz": 2490}, "during": {"throttled_by": ["power cap"]}}
    rows = {name: Estimate.missing("not here") for name in measure.RESOURCES}
    monkeypatch.setattr(
        measure, "measure_bundle", lambda *_, **__: measure.Measurement(rows, {"workload": {}}, {}, gpu)
    )
    found = bench_bundle(folder)["environment"]
    assert found["engine"] == "tensorrt-rtx"
    assert (found["start"]["gpu"], found["end"]["gpu"]) == (gpu["start"], gpu["end"])
    assert found["gpu_during"] == {"throttled_by": ["power cap"]}


def test_a_p95_of_few_samples_is_null_and_says_so(bundle: Path) -> None:
    found = measure_bundle(bundle, prompt_tokens=8, new_tokens=6, batch_size=1, threads=1, repeats=5).estimates
    assert (found["first_token_ms_p95"].value, found["inter_token_ms_p95"].value) == (None, None)
    assert found["first_token_ms_p95"].reason == "n = 5 < 100 samples"
    assert found["inter_token_ms_p95"].reason == "n = 25 < 100 samples"
    assert found["first_token_ms_p50"].upper is not None


@pytest.mark.parametrize(
    ("first_s", "step_s", "plan"),
    [
        (0.001, 0.0001, (100, 200)),  # everything is cheap
        (0.02, 1.0, (5, 295)),  # cheap prompts, slow generations: never fewer than 5 of those
        (0.02, 0.02, (43, 257)),  # (20 s - 300 x 0.02 s) / 0.32 s
        (0.05, 0.0001, (100, 0)),
        (0.05, 0.05, (18, 82)),
        (0.5, 0.1, (10, 0)),  # a p95 of first tokens would take 50 s
    ],
)
def test_cheap_first_tokens_are_sampled_300_times_in_the_same_time_box(
    first_s: float, step_s: float, plan: tuple[int, int]
) -> None:
    work = Workload(prompt_tokens=8, new_tokens=16, batch_size=1, threads=1)
    assert plan_runs(first_s, step_s, work) == plan
    whole, extra = plan
    if whole > 5:
        assert whole * (first_s + 15 * step_s) + extra * first_s <= BUDGET_S
    assert plan_runs(first_s, step_s, Workload(8, 16, 1, 1, repeats=7)) == (7, 0)


def test_a_workload_longer_than_the_model_is_refused(bundle: Path) -> None:
    with pytest.raises(BadInput, match="128"):
        bench_bundle(bundle, 100, 60, 1, None)


def test_a_child_that_is_killed_leaves_rows_without_values(bundle: Path) -> None:
    killed = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not killed:
            for child in psutil.Process().children(recursive=True):
                if any("measuring_process" in word for word in child.cmdline()):
                    os.kill(child.pid, signal.SIGKILL)
                    killed.append(child.pid)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    found = measure_bundle(bundle, prompt_tokens=8, new_tokens=6, batch_size=1, threads=1)
    killer.join()
    assert killed
    assert found.estimates["first_token_ms_p50"].value is None
    assert "SIGKILL" in str(found.estimates["first_token_ms_p50"].reason)
