"""Speed and memory in a process of its own: enough samples, named warm-up, refusals, and a child that is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from bundles import make_bundle

from edgestill.runtime.errors import BadInput
from edgestill.runtime.measure import bench_bundle, measure_bundle


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


def test_a_batch_counts_all_its_tokens(bundle: Path) -> None:
    one = bench_bundle(bundle, 8, 6, 1, None)
    four = bench_bundle(bundle, 8, 6, 4, None)
    rows = [{row["name"]: row["value"] for row in found["checks"]} for found in (one, four)]
    for row in rows:
        assert row["decode_tokens_per_s"] > 0
        assert row["prefill_tokens_per_s"] == pytest.approx(row["prefill_tokens_per_s"])
    assert four["samples"]["workload"]["batch_size"] == 4
    assert four["verdict"] is None


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
