"""What a GPU says of itself: NVML's answers in our words, and silence where nothing is known. Jetsons: test_jetson.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgestill.runtime import device as device_module
from edgestill.runtime import gpu as gpu_module
from edgestill.runtime.commands_profiles import profile_text
from edgestill.runtime.device import describe_gpu
from edgestill.runtime.gpu import DeviceMemory, Gpu, GpuEnergy, open_gpu_energy

MIB = 1 << 20


class NVMLError(Exception):
    pass


class Nvml:
    """pynvml for one RTX 4090: what it answers, or that it does not support the question."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, **answers: Any) -> None:
        self.answers = {
            "nvmlDeviceGetHandleByIndex": "first of NVML",
            "nvmlDeviceGetHandleByPciBusId": "of the bus id",
            "nvmlDeviceGetCudaComputeCapability": (8, 9),
            "nvmlDeviceGetName": b"NVIDIA GeForce RTX 4090",
            "nvmlSystemGetDriverVersion": "580.65.06",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24564 * MIB, used=1000 * MIB),
            "nvmlDeviceGetMemoryBusWidth": 384,
            "nvmlDeviceGetMaxClockInfo": 10501,
            "nvmlDeviceGetClockInfo": 2520,
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetPowerUsage": 312_400,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x4 | 0x40,
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=os.getpid(), usedGpuMemory=300 * MIB)],
            "nvmlDeviceGetTotalEnergyConsumption": 5000,
            **answers,
        }

    def __getattr__(self, name: str) -> Any:
        def answer(*_: Any) -> Any:
            found = self.answers[name]
            if isinstance(found, Exception):
                raise found
            return found

        if name not in self.answers:
            raise AttributeError(name)
        return answer


def test_identity_and_conditions_by_hand() -> None:
    gpu = Gpu(Nvml())
    assert gpu.identity() == {
        "name": "NVIDIA GeForce RTX 4090",
        "compute_capability": "8.9",
        "driver": "580.65.06",
        "memory_mib": 24564,
        "memory_bandwidth_gb_per_s": 1008.1,  # 2 x 10.501 GHz x 384 / 8
    }
    assert gpu.conditions() == {
        "sm_mhz": 2520,
        "memory_mhz": 2520,
        "temperature_c": 61,
        "power_w": 312.4,
        "throttled_by": ["power cap", "thermal (hardware)"],
    }
    assert gpu.glance() == (2520, ["power cap", "thermal (hardware)"])


def test_what_a_card_does_not_say_is_none() -> None:
    refused = dict.fromkeys(
        ("nvmlDeviceGetMemoryBusWidth", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption"), NVMLError()
    )
    refused["nvmlDeviceGetCudaComputeCapability"] = NVMLError()
    gpu = Gpu(Nvml(**refused))
    assert gpu.identity()["compute_capability"] is None
    assert gpu.identity()["memory_bandwidth_gb_per_s"] is None
    assert gpu.conditions()["power_w"] is None
    assert open_gpu_energy(gpu) == "this GPU keeps no energy counter"


def test_energy_is_counted_from_now_on() -> None:
    nvml = Nvml()
    counter = open_gpu_energy(Gpu(nvml))
    assert isinstance(counter, GpuEnergy) and counter.joules() == 0
    nvml.answers["nvmlDeviceGetTotalEnergyConsumption"] = 7500
    assert counter.joules() == 2.5


def test_memory_of_this_process_or_else_the_growth_of_all() -> None:
    nvml = Nvml()
    memory = DeviceMemory(Gpu(nvml))
    memory.look()
    assert (memory.peak_mib, memory.by_process, memory.reason) == (300, True, None)
    hidden = Nvml(nvmlDeviceGetComputeRunningProcesses=[SimpleNamespace(pid=1, usedGpuMemory=5)])
    memory = DeviceMemory(Gpu(hidden))
    hidden.answers["nvmlDeviceGetMemoryInfo"] = SimpleNamespace(total=0, used=1700 * MIB)
    memory.look()
    hidden.answers["nvmlDeviceGetMemoryInfo"] = SimpleNamespace(total=0, used=1200 * MIB)
    memory.look()
    assert (memory.peak_mib, memory.by_process) == (700, False)
    assert memory.reason == "growth of the whole card's use: the driver hides this process's own"


@pytest.mark.parametrize(
    ("cards", "bus_id", "handle"),
    [(2, "0000:3B:00.0", "of the bus id"), (2, None, "first of NVML"), (1, "0000:3B:00.0", "first of NVML")],
)
def test_of_several_cards_the_one_that_cuda_uses(
    cards: int, bus_id: str | None, handle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_module, "first_gpu", lambda: bus_id)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(nvmlInit=None, nvmlDeviceGetCount=cards))
    gpu = gpu_module.open_gpu()
    assert gpu is not None and gpu._handle == handle
    assert gpu_module.driver_version() == "580.65.06"
    unknown = Nvml(nvmlInit=None, nvmlDeviceGetCount=2, nvmlDeviceGetHandleByPciBusId=NVMLError())
    monkeypatch.setitem(sys.modules, "pynvml", unknown)
    assert (gpu_module.open_gpu() is None) == (bus_id is not None), "never another card than the one that is used"


def test_a_machine_with_a_gpu_describes_it_as_a_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from edgestill.profiles.load import load_profile

    monkeypatch.setattr(device_module, "open_gpu", lambda: Gpu(Nvml()))
    monkeypatch.setattr(device_module, "open_cuda", lambda: None)
    found = describe_gpu()
    assert found is not None
    path = tmp_path / "card.yaml"
    path.write_text(profile_text(found))
    device = load_profile(str(path)).profile.device
    assert (device.engine, device.gpu, device.compute_capability) == ("tensorrt-rtx", "NVIDIA GeForce RTX 4090", "8.9")
    assert (device.memory_mib, device.memory_bandwidth_gb_per_s) == (24564, 1008.1)
    monkeypatch.setattr(device_module, "open_gpu", lambda: Gpu(Nvml(nvmlDeviceGetCudaComputeCapability=(9, 0))))
    hopper = describe_gpu()
    assert hopper is not None and hopper["engine"] == "tensorrt"


def test_no_nvml_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from edgestill.runtime.cli import run

    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_module.open_gpu() is None
    assert str(open_gpu_energy()).startswith("no NVML here")
    monkeypatch.setattr(device_module, "gpu_identity", lambda: None)
    monkeypatch.setattr(device_module, "open_cuda", lambda: None)
    assert run(["profiles", "detect", "--gpu"]) == 2
    assert run(["profiles", "cpu-x86", "--gpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "edgestill: no NVIDIA GPU is here, or its driver does not answer; run this on the target",
        "edgestill: --gpu goes with detect: edgestill profiles detect --gpu",
    ]
