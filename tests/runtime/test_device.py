"""Facts of the machine, read from planted /proc and /sys trees of boards that differ, and from this one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgestill.runtime import device, processor


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (device, processor):
        monkeypatch.setattr(module, "allowed_cpus", lambda: [0, 1, 2, 3])


def test_this_machine_in_the_words_of_a_profile() -> None:
    got = device.describe_device()
    assert got["arch"] in ("x86_64", "aarch64") and got["engine"] == "onnxruntime-cpu" and got["cpu"]
    assert 1 <= got["threads"] <= len(os.sched_getaffinity(0))
    assert got["memory_mib"] > 64 and got["memory_bandwidth_gb_per_s"] > 0.1


def test_environment_is_json_and_names_the_packages() -> None:
    got = json.loads(json.dumps(device.environment(), allow_nan=False))
    assert got["packages"]["numpy"] and got["packages"]["onnxruntime"] and got["python"].startswith("3.")
    assert got["start"]["utc"].endswith("Z")


@pytest.mark.parametrize(
    ("machine", "arch"),
    [("x86_64", "x86_64"), ("AMD64", "x86_64"), ("arm64", "aarch64"), ("aarch64", "aarch64"), ("riscv64", "riscv64")],
)
def test_architecture_words(monkeypatch: pytest.MonkeyPatch, machine: str, arch: str) -> None:
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    assert processor.architecture() == arch


@pytest.mark.usefixtures("four_cpus")
def test_hyper_threads_count_once_and_the_quota_binds(tmp_path: Path) -> None:
    files = {f"cpu{i}/topology/physical_package_id": "0" for i in range(4)}
    files |= {f"cpu{i}/topology/core_id": str(i // 2) for i in range(4)}
    cpus = plant(tmp_path / "cpu", files)
    assert processor.usable_cores(cpus, tmp_path / "none") == 2
    assert processor.usable_cores(tmp_path / "no-topology", tmp_path / "none") == 4
    assert processor.usable_cores(cpus, plant(tmp_path / "v2", {"cpu.max": "100000 100000"})) == 1
    assert processor.usable_cores(cpus, plant(tmp_path / "v2max", {"cpu.max": "max 100000"})) == 2
    v1 = plant(tmp_path / "v1", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"})
    assert processor.usable_cores(cpus, v1) == 1
    free = plant(tmp_path / "v1free", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"})
    assert processor.usable_cores(cpus, free) == 2


@pytest.mark.usefixtures("four_cpus")
def test_last_level_cache_sums_the_shared_instances(tmp_path: Path) -> None:
    files: dict[str, str] = {}
    for i in range(4):
        pair = "0-1" if i < 2 else "2-3"
        files |= {
            f"cpu{i}/cache/index0/level": "1",
            f"cpu{i}/cache/index0/size": "32K",
            f"cpu{i}/cache/index0/type": "Data",
        }
        files |= {
            f"cpu{i}/cache/index3/level": "3",
            f"cpu{i}/cache/index3/size": "16M",
            f"cpu{i}/cache/index3/type": "Unified",
        }
        files[f"cpu{i}/cache/index3/shared_cpu_list"] = pair
    assert device.last_level_cache_mib(plant(tmp_path / "cpu", files)) == 32
    assert device.last_level_cache_mib(tmp_path / "none") is None


def test_container_limits(tmp_path: Path) -> None:
    assert device.container_memory_mib(plant(tmp_path / "v2", {"memory.max": str(512 << 20)})) == 512
    assert device.container_memory_mib(plant(tmp_path / "v2max", {"memory.max": "max"})) is None
    assert (
        device.container_memory_mib(plant(tmp_path / "v1", {"memory/memory.limit_in_bytes": "9223372036854771712"}))
        is None
    )


def test_board_name_clock_and_temperature(tmp_path: Path) -> None:
    board = plant(
        tmp_path / "pi", {"cpuinfo": "processor\t: 0\nBogoMIPS\t: 108.00\n\nModel\t: Raspberry Pi 5 Model B Rev 1.0\n"}
    )
    assert processor.cpu_model(board) == "Raspberry Pi 5 Model B Rev 1.0"
    cpus = plant(tmp_path / "cpu", {"cpu0/cpufreq/scaling_cur_freq": "2400000\n"})
    assert device.cpu_mhz(board, cpus) == 2400.0 and device.cpu_mhz(board, tmp_path / "none") is None
    zones = plant(tmp_path / "thermal", {"thermal_zone0/temp": "48312", "thermal_zone1/temp": "51000"})
    assert device.temperature_c(zones) == 51.0 and device.temperature_c(tmp_path / "none") is None
