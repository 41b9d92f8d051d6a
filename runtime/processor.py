"""The processor of this machine: its word in profiles, its name, the cores a process may use.

Apart from device.py because every bundle that is opened asks, and the rest of what a machine is costs imports that a small process
feels. Readers of /proc and /sys take the root they read from.
"""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
CPUS = Path("/sys/devices/system/cpu")
PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def architecture() -> str:
    """`x86_64` or `aarch64`, as profiles spell them; another machine's own word otherwise."""
    machine = platform.machine()
    return ARCHITECTURES.get(machine.lower(), machine)


def cpu_model(proc: Path = PROC) -> str:
    """The processor's name; on boards whose /proc/cpuinfo has none, the board's."""
    fields = dict.fromkeys(("model name", "Model", "Hardware"), "")
    for line in (read_kernel(proc / "cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in fields:
            fields[key.strip()] = value.strip()
    return next((name for name in fields.values() if name), platform.processor() or "unknown")


def usable_cores(cpus: Path = CPUS, cgroup: Path = CGROUP) -> int:
    """Physical cores this process may run on: its affinity, hyper-threads counted once, and the container's quota."""
    allowed = allowed_cpus()
    cores = {
        (
            read_kernel(cpus / f"cpu{i}/topology/physical_package_id"),
            read_kernel(cpus / f"cpu{i}/topology/core_id") or f"cpu{i}",
        )
        for i in allowed
    }
    quota = _cpu_quota(cgroup)
    return max(1, min(len(cores), math.ceil(quota) if quota is not None else len(cores)))


def read_kernel(path: Path) -> str | None:
    """The stripped text of a small kernel file, None where it is absent or refused."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().strip("\0")
    except OSError:
        return None


def allowed_cpus() -> list[int]:
    """Processor numbers this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpu_quota(cgroup: Path) -> float | None:
    """Processors' worth of time the control group allows, None without a limit."""
    quota, _, period = (read_kernel(cgroup / "cpu.max") or "max").partition(" ")
    if not quota.isdigit():
        quota, period = (
            read_kernel(cgroup / "cpu/cpu.cfs_quota_us") or "",
            read_kernel(cgroup / "cpu/cpu.cfs_period_us") or "",
        )
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) > 0 else None
