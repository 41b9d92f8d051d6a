"""A Jetson by its files and by CUDA, planted by hand: rails, clock, the one pool of memory, and a profile of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgestill.profiles.load import load_profile
from edgestill.runtime import cuda_facts, jetson
from edgestill.runtime import device as device_module
from edgestill.runtime import gpu as gpu_module
from edgestill.runtime.commands_profiles import profile_text
from edgestill.runtime.cuda_facts import CudaRuntime, PoolMemory, open_cuda
from edgestill.runtime.device import describe_gpu
from edgestill.runtime.gpu import watched_gpu, watched_memory
from edgestill.runtime.jetson import JetsonEnergy, Rails, board, board_bandwidth, jetson_gpu, power_rails
from edgestill.runtime.manifest import Manifest
from edgestill.runtime.measure import device_estimate

MIB = 1 << 20


def rail(root: Path, number: int, label: str, millivolts: int, milliamperes: int, monitor: str = "hwmon3") -> None:
    folder = root / monitor
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "name").write_text("ina3221\n")
    (folder / f"in{number}_label").write_text(f"{label}\n")
    (folder / f"in{number}_input").write_text(f"{millivolts}\n")
    (folder / f"curr{number}_input").write_text(f"{milliamperes}\n")


def rails(root: Path) -> tuple[str, float] | None:
    found = power_rails(root)
    return None if found is None else (found.name, found.watts())


def test_the_whole_module_is_one_rail_on_orin_nano_and_nx(tmp_path: Path) -> None:
    rail(tmp_path, 2, "VDD_CPU_GPU_CV", 5000, 1000)
    assert rails(tmp_path) == ("VDD_CPU_GPU_CV", 5.0)
    rail(tmp_path, 3, "VDD_SOC", 5000, 400)
    assert rails(tmp_path) == ("VDD_CPU_GPU_CV + VDD_SOC", 7.0)
    rail(tmp_path, 1, "VDD_IN", 5000, 1500)
    assert rails(tmp_path) == ("VDD_IN", 7.5)
    (tmp_path / "hwmon3" / "name").write_text("coretemp\n")
    assert rails(tmp_path) is None and rails(tmp_path / "nowhere") is None


def test_agx_orin_has_no_such_rail_and_three_are_summed(tmp_path: Path) -> None:
    rail(tmp_path, 1, "VDD_GPU_SOC", 19_000, 500)
    rail(tmp_path, 2, "VDD_CPU_CV", 19_000, 100)
    assert rails(tmp_path) == ("VDD_GPU_SOC", 9.5)
    rail(tmp_path, 3, "VIN_SYS_5V0", 5000, 800)
    rail(tmp_path, 2, "VDDQ_VDD2_1V8AO", 5000, 300, monitor="hwmon4")  # behind VIN_SYS_5V0, which counts it
    assert rails(tmp_path) == ("VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", pytest.approx(9.5 + 1.9 + 4.0))


def test_a_boards_energy_is_the_sum_of_its_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rail(tmp_path, 1, "VDD_IN", 5000, 1500)
    found = power_rails(tmp_path)
    assert isinstance(found, Rails)
    clock = [0.0]
    monkeypatch.setattr(jetson, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(jetson.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    counter = JetsonEnergy(found)
    clock[0] = 2.0
    assert counter.joules() == 15.0
    rail(tmp_path, 1, "VDD_IN", 5000, 2500)
    clock[0] = 4.0
    assert counter.joules() == 15.0 + 2 * (7.5 + 12.5) / 2
    assert counter.what == "the board: VDD_IN"


def plant_gpu(root: Path) -> dict[str, Path]:
    """devfreq, thermal and hwmon of an Orin."""
    for name, hertz in (("15340000.vic", 115_200_000), ("17000000.ga10b", 1_300_500_000)):
        (root / "devfreq" / name).mkdir(parents=True)
        (root / "devfreq" / name / "cur_freq").write_text(f"{hertz}\n")
    for i, (kind, milli) in enumerate((("cpu-thermal", 48_000), ("gpu-thermal", 51_500))):
        zone = root / "thermal" / f"thermal_zone{i}"
        zone.mkdir(parents=True)
        (zone / "type").write_text(f"{kind}\n")
        (zone / "temp").write_text(f"{milli}\n")
    rail(root / "hwmon", 1, "VDD_IN", 5000, 1500)
    return {name: root / name for name in ("devfreq", "thermal", "hwmon")}


def test_the_clock_comes_from_the_kernel_where_nvml_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = jetson_gpu(**plant_gpu(tmp_path))
    assert found is not None
    assert found.conditions() == {
        "sm_mhz": 1300.5,
        "memory_mhz": None,
        "temperature_c": 51.5,
        "power_w": 7.5,
        "throttled_by": None,
    }
    silent: Any = SimpleNamespace(glance=lambda: (None, None))
    speaking: Any = SimpleNamespace(glance=lambda: (2520, []))
    monkeypatch.setattr(gpu_module, "jetson_gpu", lambda: found)
    assert watched_gpu(None) is watched_gpu(silent) is found and watched_gpu(speaking) is speaking
    assert jetson_gpu(tmp_path / "nowhere") is None
    monkeypatch.setattr(gpu_module, "jetson_gpu", lambda: None)
    assert watched_gpu(silent) is silent and watched_gpu(None) is None


class Runtime:
    """cuda.bindings.runtime with one device."""

    def __init__(self, **attributes: int) -> None:
        self.attributes = {"ComputeCapabilityMajor": 8, "ComputeCapabilityMinor": 7, **attributes}
        self.cudaDeviceAttr = SimpleNamespace(**{f"cudaDevAttr{name}": name for name in self.attributes})
        self.free = 5000

    def cudaDeviceGetAttribute(self, kind: str, device: int) -> tuple[int, int]:  # noqa: N802
        return 0, self.attributes[kind]

    def cudaMemGetInfo(self) -> tuple[int, int, int]:  # noqa: N802
        return 0, self.free * MIB, 7000 * MIB

    def cudaGetDeviceCount(self) -> tuple[int, int]:  # noqa: N802
        return 0, 1


ORIN = {"Integrated": 1, "MemoryClockRate": 1_300_000, "GlobalMemoryBusWidth": 128, "L2CacheSize": 4 * MIB}


@pytest.mark.parametrize(("integrated", "words"), [(1, "unified memory"), (0, "NVML does not tell")])
def test_memory_grows_in_the_one_pool_where_nvml_gives_none(
    integrated: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(Integrated=integrated)
    monkeypatch.setattr(gpu_module, "open_cuda", lambda: CudaRuntime(runtime))
    memory = watched_memory(SimpleNamespace(used_mib=lambda: None))  # type: ignore[arg-type]
    assert isinstance(memory, PoolMemory)
    for free in (4200, 4700):
        runtime.free = free
        memory.look()
    assert memory.peak_mib == 800
    manifest = Manifest.__new__(Manifest)
    object.__setattr__(manifest, "profile", {"device": {"engine": "tensorrt"}})
    estimate = device_estimate({"peak_device_mib": memory.peak_mib, "device_reason": memory.reason}, manifest)
    assert estimate.value == estimate.upper == 800 and words in str(estimate.reason)
    monkeypatch.setattr(gpu_module, "open_cuda", lambda: None)
    assert watched_memory(None) is None


def test_cuda_says_what_it_knows() -> None:
    orin = CudaRuntime(Runtime(**ORIN)).facts()
    assert (orin.compute_capability, orin.integrated, orin.l2_cache_mib) == ("8.7", True, 4.0)
    assert orin.memory_bandwidth_gb_per_s is None, "its clock is not that of the shared memory"
    card = CudaRuntime(Runtime(MemoryClockRate=10_501_000, GlobalMemoryBusWidth=384)).facts()
    assert (card.integrated, card.memory_bandwidth_gb_per_s, card.l2_cache_mib) == (False, 1008.1, None)


def test_without_bindings_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(cuda_facts.importlib, "import_module", missing)
    assert open_cuda() is None


@pytest.mark.parametrize(
    ("model", "memory_mib", "bandwidth"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit", 62_000, 204.8),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7_600, 102.0),
        ("NVIDIA Jetson Orin Nano Developer Kit", 7_600, 68.0),
        ("NVIDIA Jetson Orin Nano Developer Kit", 3_400, None),  # the module of 4 GB has half the bus
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15_000, 102.4),
        ("Some other board", 15_000, None),
        (None, 15_000, None),
    ],
)
def test_bandwidth_of_a_board_is_the_published_one(model: str | None, memory_mib: int, bandwidth: float | None) -> None:
    assert board_bandwidth(model, memory_mib) == bandwidth


def test_the_board_names_itself(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    assert board(tmp_path / "model") == "NVIDIA Jetson AGX Orin Developer Kit"
    (tmp_path / "model").write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")
    assert board(tmp_path / "model") is None and board(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", None])
def test_an_orin_describes_itself_as_a_profile(
    name: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """NVML answers little or is not there; a bandwidth that nobody knows is left to the user, with a line that says so."""
    monkeypatch.setattr(device_module, "gpu_identity", lambda: {"name": "Orin (nvgpu)", "compute_capability": "[N/A]"})
    monkeypatch.setattr(device_module, "open_cuda", lambda: CudaRuntime(Runtime(**ORIN)))
    monkeypatch.setattr(device_module, "board", lambda: name)
    monkeypatch.setattr(device_module, "memory_mib", lambda: 7600)
    monkeypatch.setattr(device_module, "architecture", lambda: "aarch64")
    found = describe_gpu()
    assert found is not None
    text = profile_text(found)
    if name is None:
        assert "  # memory_bandwidth_gb_per_s: not known here; add the figure of the data sheet" in text
        text = text.replace("  # memory_bandwidth_gb_per_s: not", "  memory_bandwidth_gb_per_s: 50  # not")
    path = tmp_path / "orin.yaml"
    path.write_text(text)
    device = load_profile(str(path)).profile.device
    assert (device.engine, device.compute_capability, device.unified_memory) == ("tensorrt", "8.7", True)
    assert (device.gpu, device.memory_mib, device.last_level_cache_mib) == (name or "Orin (nvgpu)", 7600, 4.0)
    assert device.memory_bandwidth_gb_per_s == (102.0 if name else 50)
