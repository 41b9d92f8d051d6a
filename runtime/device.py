"""What this machine is: the facts a profile states, measured here, and the conditions a measurement was made under.

Every reader of /proc and /sys takes the root it reads from, and returns None where the kernel does not say: a fact that is
not there is null in a report, never guessed.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.cuda_facts import open_cuda
from edgestill.runtime.engines.capabilities import PRECISIONS
from edgestill.runtime.gpu import open_gpu, watched_gpu
from edgestill.runtime.jetson import board, board_bandwidth
from edgestill.runtime.processor import (
    CGROUP,
    CPUS,
    PROC,
    allowed_cpus,
    architecture,
    cpu_model,
    read_kernel,
    usable_cores,
)

ENGINE = "onnxruntime-cpu"
"""The engine that runs bundles on this machine."""
PACKAGES = (
    "edgestill",
    "numpy",
    "onnxruntime",
    "tokenizers",
    "safetensors",
    "jinja2",
    "psutil",
    "tensorrt",
    "tensorrt_rtx",
    "cuda-bindings",
)
MIB = 1 << 20

SWEEP_FACTOR, SWEEP_MIN, SWEEP_MAX = 4, 256 * MIB, 2048 * MIB
"""The bandwidth sweep reads this many times the last-level cache, within these sizes."""
SWEEP_REPEATS = 6


def describe_device() -> dict[str, Any]:
    """This machine in the words of a profile's `device` section, plus `cpu`; takes about a second (bandwidth is measured)."""
    gpu = gpu_identity()
    return {
        "arch": architecture(),
        "engine": ENGINE,
        "cpu": cpu_model(),
        "threads": usable_cores(),
        "memory_mib": memory_mib(),
        "last_level_cache_mib": last_level_cache_mib(),
        "memory_bandwidth_gb_per_s": memory_bandwidth_gb_per_s(),
        "gpu": None if gpu is None else gpu["name"],
        "compute_capability": None if gpu is None else gpu["compute_capability"],
    }


def environment(engine: str = ENGINE) -> dict[str, Any]:
    """What a reader needs to judge or repeat a measurement with `engine`: software, processor, limits, conditions right now."""
    return {
        "os": platform.platform(),
        "arch": architecture(),
        "engine": engine,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "cpu": cpu_model(),
        "threads": usable_cores(),
        "memory_mib": memory_mib(),
        "container_memory_limit_mib": container_memory_mib(),
        "last_level_cache_mib": last_level_cache_mib(),
        "gpu": gpu_identity(),
        "start": conditions(),
    }


def conditions() -> dict[str, Any]:
    """What changes while one measures: UTC time, clock, governor, temperature, load. Taken before and after."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_1min": None if load is None else round(load, 2),
        "cpu_mhz": cpu_mhz(),
        "governor": read_kernel(CPUS / "cpu0/cpufreq/scaling_governor"),
        "temperature_c": temperature_c(),
        "gpu": None if (gpu := watched_gpu(open_gpu())) is None else gpu.conditions(),
    }


def memory_mib(proc: Path = PROC) -> int | None:
    """Memory a process may use: the machine's, or the container's limit where that is smaller."""
    total = None
    for line in (read_kernel(proc / "meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) // 1024
    if total is None:
        import psutil

        total = int(psutil.virtual_memory().total) // MIB
    limit = container_memory_mib()
    return total if limit is None else min(total, limit)


def container_memory_mib(cgroup: Path = CGROUP) -> int | None:
    """The memory limit of the control group (v2, then v1), None without one."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = read_kernel(cgroup / name)
        if text is not None and text.isdigit() and int(text) < 1 << 60:  # v1 writes a huge number for "none"
            return int(text) // MIB
    return None


def last_level_cache_mib(cpus: Path = CPUS) -> float | None:
    """Size of the outermost cache over the processors this process may use, each shared instance counted once."""
    instances: dict[tuple[int, str], float] = {}
    for cpu in allowed_cpus():
        for index in sorted((cpus / f"cpu{cpu}/cache").glob("index*")):
            level, size, shared = (read_kernel(index / name) for name in ("level", "size", "shared_cpu_list"))
            if level is None or size is None or read_kernel(index / "type") == "Instruction":
                continue
            instances[int(level), shared or str(cpu)] = _kib(size) / 1024
    if not instances:
        return None
    last = max(level for level, _ in instances)
    return round(sum(size for (level, _), size in instances.items() if level == last), 3)


@functools.cache
def memory_bandwidth_gb_per_s() -> float:
    """Read bandwidth of main memory in 1e9 bytes/s: the best sweep over a buffer well above the last-level cache.

    One reduction per thread over its own part of the buffer (numpy releases the GIL), with one thread and with all usable
    cores; the best counts, because whatever else runs on the machine can only lower it.
    """
    cache = (last_level_cache_mib() or 0) * MIB
    size = min(max(SWEEP_FACTOR * cache, SWEEP_MIN), SWEEP_MAX, (memory_mib() or 4096) * MIB / 8)
    buffer = np.ones(int(size) // 8, np.uint64)  # ones, not zeros: untouched zero pages would all be the same one
    best = 0.0
    for threads in sorted({1, usable_cores()}):
        parts = np.array_split(buffer, threads)
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(SWEEP_REPEATS):
                start = time.perf_counter()
                list(pool.map(np.bitwise_or.reduce, parts))
                best = max(best, buffer.nbytes / (time.perf_counter() - start))
    return round(best / 1e9, 2)


def cpu_mhz(proc: Path = PROC, cpus: Path = CPUS) -> float | None:
    """Present clock of the first processor."""
    khz = read_kernel(cpus / "cpu0/cpufreq/scaling_cur_freq")
    if khz is not None and khz.isdigit():
        return int(khz) / 1000
    for line in (read_kernel(proc / "cpuinfo") or "").splitlines():
        if line.startswith("cpu MHz"):
            return float(line.partition(":")[2])
    return None


def temperature_c(thermal: Path = Path("/sys/class/thermal")) -> float | None:
    """The hottest thermal zone, degrees Celsius."""
    readings = [read_kernel(zone / "temp") for zone in thermal.glob("thermal_zone*")]
    values = [int(text) / 1000 for text in readings if text is not None and text.lstrip("-").isdigit()]
    return max(values, default=None)


def gpu_identity() -> dict[str, Any] | None:
    """The first NVIDIA GPU: name, compute_capability, and with NVML driver, memory_mib and memory_bandwidth_gb_per_s; None where
    there is none."""
    gpu = open_gpu()
    return _by_nvidia_smi() if gpu is None else gpu.identity()


def describe_gpu() -> dict[str, Any] | None:
    """The first GPU in the words of a profile's `device` section, plus `cpu`; None where there is none.

    What NVML leaves open is asked of CUDA; the bandwidth of a memory that CPU and GPU share is a published figure of the board.
    """
    found, cuda = gpu_identity(), open_cuda()
    facts = None if cuda is None else cuda.facts()
    if found is None and facts is None:
        return None
    known = found or {}
    unified = facts is not None and facts.integrated
    name = (board() if unified else None) or known.get("name") or "NVIDIA GPU"
    capability = known.get("compute_capability")
    if facts is not None and not re.fullmatch(r"\d+\.\d", capability or ""):
        capability = facts.compute_capability
    memory = memory_mib() if unified else known.get("memory_mib") or memory_mib()
    bandwidth = known.get("memory_bandwidth_gb_per_s") or (facts and facts.memory_bandwidth_gb_per_s)
    flavours = [flavour for flavour, cards in PRECISIONS.items() if capability in cards]
    return {
        "arch": architecture(),
        "engine": flavours[-1] if flavours else "onnxruntime-cuda",
        "cpu": name,
        "threads": usable_cores(),
        "memory_mib": memory,
        "unified_memory": unified,
        "last_level_cache_mib": None if facts is None else facts.l2_cache_mib,
        "memory_bandwidth_gb_per_s": board_bandwidth(board(), memory) if unified else bandwidth,
        "gpu": name,
        "compute_capability": capability,
    }


def _by_nvidia_smi() -> dict[str, Any] | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode != 0 or not answer.stdout.strip():
        return None
    name, _, capability = answer.stdout.splitlines()[0].rpartition(",")
    return {"name": name.strip(), "compute_capability": capability.strip()}


def _kib(text: str) -> float:
    """`32768K` or `32M` in KiB."""
    return (
        float(text[:-1]) * {"K": 1, "M": 1024, "G": 1024 * 1024}[text[-1]] if text[-1].isalpha() else float(text) / 1024
    )


def _version(name: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
