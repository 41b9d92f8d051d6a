"""Latency, throughput, memory and energy of a bundle on this machine, from a measuring process of its own.

`measure_bundle` starts the process (measuring_process.py), waits, and turns its samples into estimates; `bench_bundle` is the
same without limits. Quality is measured in another process, so that its memory is not taken for the workload's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.child import MeasurementFailed, run_child
from edgestill.runtime.device import (
    conditions,
    environment,
    gpu_identity,
    last_level_cache_mib,
    memory_bandwidth_gb_per_s,
)
from edgestill.runtime.engines.flavour import on_gpu
from edgestill.runtime.gpu_watch import with_gpu
from edgestill.runtime.manifest import Manifest
from edgestill.runtime.metrics import METRICS
from edgestill.runtime.progress import Progress
from edgestill.runtime.reference import FOLDER, HELD_OUT
from edgestill.runtime.settings import tuned_threads
from edgestill.runtime.statistics import Estimate, block_mean, median, p95
from edgestill.runtime.workload import Workload, check_workload

RESOURCES = tuple(name for name, m in METRICS.items() if m.source == "profile")
TIMELINE_POINTS = 400
MIB = 1 << 20


@dataclass(frozen=True)
class Measurement:
    """What one run of the workload says: estimates by metric name, raw samples, resident memory over time."""

    estimates: dict[str, Estimate]
    samples: dict[str, Any] = field(default_factory=dict)
    memory_timeline: dict[str, Any] = field(default_factory=dict)
    """{"points": [[s, MiB]...], "phases": [[s, name]...]}"""
    gpu: dict[str, Any] | None = None
    """The GPU's conditions around and inside the timed windows (GpuWatch.found); None where none was used."""


def workload_of(
    manifest: Manifest,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
) -> Workload:
    """The profile's workload with the given counts in place of its own.

    Raises:
        BadInput: the model cannot run it.
    """
    stated = manifest.profile.get("workload", {})
    work = Workload(
        prompt_tokens=prompt_tokens if prompt_tokens is not None else int(stated.get("prompt_tokens", 128)),
        new_tokens=new_tokens if new_tokens is not None else int(stated.get("new_tokens", 64)),
        batch_size=batch_size if batch_size is not None else int(stated.get("batch_size", 1)),
        threads=threads or int(manifest.profile.get("device", {}).get("threads", 1)),
    )
    check_workload(work, manifest.model)
    return work


def measure_bundle(
    bundle: Path,
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
    threads: int,
    repeats: int | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Run the workload in a fresh process and estimate every resource metric.

    Args:
        repeats: generations; None for as many as about 20 s allow (at least 5, and 100 first tokens where each is cheap).

    A process that fails or is killed gives rows without values and its reason, not an exception.
    """
    from edgestill.runtime.bundle import read_manifest

    manifest = read_manifest(bundle)
    work = Workload(prompt_tokens, new_tokens, batch_size, threads, repeats)
    estimates = {"bundle_mib": bundle_mib(bundle, manifest)}
    try:
        found = run_child("resources", bundle, dataclasses.asdict(work), "speed and memory", progress)
    except MeasurementFailed as failure:
        missing = {name: Estimate.missing(str(failure)) for name in RESOURCES if name not in estimates}
        return Measurement(missing | estimates)
    estimates |= latency_estimates(found, work) | {
        "load_ms": median(np.array(found["load_ms"])),
        "peak_rss_mib": _peak(found["peak_rss_mib"]),
        "peak_device_mib": device_estimate(found, manifest),
        "energy_j_per_token": energy_estimate(found, work),
    }
    speed = estimates["decode_tokens_per_s"]
    bytes_read, profile = graph_bytes(manifest), manifest.profile
    fraction = device_bandwidth_fraction if on_gpu(manifest.engine) else bandwidth_fraction
    estimates["bandwidth_fraction"] = fraction(speed, bytes_read, work.batch_size, profile)
    samples = {
        "workload": dataclasses.asdict(work),
        "session": found["session"],
        "warm_up": found["warm_up"],
        "load_ms": _rounded(found["load_ms"]),
        "first_token_ms": _rounded(found["first_token_ms"]),
        "inter_token_ms": [_rounded(run) for run in found["inter_token_ms"]],
        "energy_of": found["energy_of"],
        "idle_watts": found["idle_watts"],
        "decode_j": None if found["energy_j"] is None else sum(found["energy_j"]),
        "decode_s": sum(found["decode_s"]),
    }
    timeline = {"points": _thin(found["rss"]), "phases": found["phases"]}
    return Measurement(estimates, samples, timeline, found["gpu"])


def latency_estimates(found: dict[str, Any], work: Workload) -> dict[str, Estimate]:
    """Latency quantiles and rates from the samples of the measuring process.

    Rates are medians over runs, their bounds order statistics; inter-token samples of one generation form a group.
    """
    first = np.array(found["first_token_ms"], np.float64)
    inter = [np.array(run, np.float64) for run in found["inter_token_ms"]]
    groups = np.repeat(np.arange(len(inter)), [len(run) for run in inter])
    together = np.concatenate(inter)
    decode = np.array([work.batch_size * len(run) / (run.sum() / 1e3) for run in inter])
    return {
        "first_token_ms_p50": median(first),
        "first_token_ms_p95": p95(first),
        "inter_token_ms_p50": median(together, groups),
        "inter_token_ms_p95": p95(together, groups),
        "prefill_tokens_per_s": median(work.batch_size * work.prompt_tokens / (first / 1e3)),
        "decode_tokens_per_s": median(decode),
    }


def energy_estimate(found: dict[str, Any], work: Workload) -> Estimate:
    """J per generated token: joules of all decode windows together, idle subtracted, over their tokens.

    Counters tick every few milliseconds (a GPU's about every 20), so one short window may hold a tick too many or none; over all
    windows that evens out, and what is left of it stands in the standard error over runs.
    """
    if found["energy_j"] is None:
        return Estimate.missing(f"unavailable: {found['energy_reason']}")
    tokens = work.batch_size * (work.new_tokens - 1)
    drawn = np.array(found["energy_j"], np.float64) - found["idle_watts"] * np.array(found["decode_s"], np.float64)
    return block_mean(drawn / tokens, np.arange(len(drawn)))  # as many tokens in every window: the mean is sum over sum


def bandwidth_fraction(speed: Estimate, graph_size: int, batch_size: int, profile: dict[str, Any]) -> Estimate:
    """Bytes read per step x steps/s over the measured read bandwidth; null where the weights fit in the last-level cache.

    `graph_size` (bytes of the graph's files) stands for the bytes read per step: of all weights only the rows of an untied
    input embedding stay unread.
    """
    cache = last_level_cache_mib()
    if cache is None:  # boards whose kernel does not tell: what the profile states
        cache = profile.get("device", {}).get("last_level_cache_mib")
    if cache is None:
        return Estimate.missing(
            "the size of the last-level cache is unknown: state last_level_cache_mib in the profile"
        )
    if graph_size <= cache * MIB:
        return Estimate.missing(f"weights ({graph_size / MIB:.4g} MiB) fit in the last-level cache ({cache:.4g} MiB)")
    return speed.scaled(graph_size / batch_size / (memory_bandwidth_gb_per_s() * 1e9))


def device_bandwidth_fraction(speed: Estimate, graph_size: int, batch_size: int, profile: dict[str, Any]) -> Estimate:
    """The same on a GPU, over the bandwidth of its memory clock and bus; the profile's figure where NVML does not say."""
    identity = gpu_identity() or {}
    stated = profile.get("device", {})
    bandwidth = identity.get("memory_bandwidth_gb_per_s") or stated.get("memory_bandwidth_gb_per_s")
    cache = stated.get("last_level_cache_mib") or 0.0
    if not bandwidth:
        return Estimate.missing("the bandwidth of this GPU is unknown: state memory_bandwidth_gb_per_s in the profile")
    if graph_size <= cache * MIB:
        return Estimate.missing(f"weights ({graph_size / MIB:.4g} MiB) fit in the GPU's cache ({cache:.4g} MiB)")
    return speed.scaled(graph_size / batch_size / (bandwidth * 1e9))


def device_estimate(found: dict[str, Any], manifest: Manifest) -> Estimate:
    """Peak device memory; a value that had to be taken of the whole card, or of a shared pool, says so."""
    if not on_gpu(manifest.engine):
        return Estimate.missing("no GPU is used by this engine")
    peak = found["peak_device_mib"]
    if not peak:
        return Estimate.missing("neither NVML nor CUDA says how much memory is in use here (install nvidia-ml-py)")
    return dataclasses.replace(Estimate.exact(peak), reason=found["device_reason"])


def graph_bytes(manifest: Manifest) -> int:
    """Bytes of the graph and its external data."""
    name = manifest.graph.file
    return sum(entry.size for path, entry in manifest.files.items() if path in (name, f"{name}.data"))


def bundle_mib(bundle: Path, manifest: Manifest) -> Estimate:
    """All shipped files, manifest.json included."""
    total = sum(entry.size for entry in manifest.files.values()) + (bundle / "manifest.json").stat().st_size
    return Estimate.exact(total / MIB)


def bench_bundle(
    bundle: Path,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Speed and memory without limits: a report whose `verdict` is None. Counts default to the profile's workload.

    Raises:
        BadInput: the workload does not fit the model.
        MeasurementFailed: the measuring process gave no result.
    """
    from edgestill.runtime.bundle import read_manifest
    from edgestill.runtime.gate import judge

    manifest = read_manifest(bundle)
    work = workload_of(manifest, prompt_tokens, new_tokens, batch_size, tuned_threads(bundle))
    surroundings = environment(manifest.engine)
    measured = measure_bundle(
        bundle,
        prompt_tokens=work.prompt_tokens,
        new_tokens=work.new_tokens,
        batch_size=work.batch_size,
        threads=work.threads,
        repeats=work.repeats,
        progress=progress,
    )
    if not measured.samples:
        raise MeasurementFailed(f"{bundle}: {measured.estimates['load_ms'].reason}")
    surroundings["end"] = conditions()
    surroundings = with_gpu(surroundings, measured.gpu)
    _, checks = judge(measured.estimates, {})
    return {
        "verdict": None,
        "name": manifest.name,
        "checks": [dataclasses.asdict(check) for check in checks],
        "environment": surroundings,
        "samples": measured.samples,
        "memory_timeline": measured.memory_timeline,
    }


def measure_quality_apart(bundle: Path, threads: int, progress: Progress | None) -> dict[str, Any]:
    """Quality in a process of its own: {"estimates": {name: Estimate}, "beside": table, "paths": differences}.

    Raises:
        MeasurementFailed: the bundle has no reference, or the process gave no result.
    """
    if not (bundle / FOLDER / HELD_OUT).is_file():
        raise MeasurementFailed("the bundle has no reference")
    found = run_child("quality", bundle, {"threads": threads}, "quality", progress)
    found["estimates"] = {name: Estimate(**fields) for name, fields in found["estimates"].items()}
    return found


def _peak(mib: float | None) -> Estimate:
    """The high-water mark of the one measuring process; a maximum has no spread to speak of."""
    return Estimate.missing("this system keeps no high-water mark") if mib is None else Estimate.exact(mib)


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _thin(points: list[list[float]]) -> list[list[float]]:
    """At most TIMELINE_POINTS points: the highest of each stretch, so that the peak stays."""
    if len(points) <= TIMELINE_POINTS:
        return points
    stretches = np.array_split(np.array(points), TIMELINE_POINTS)
    return [stretch[stretch[:, 1].argmax()].tolist() for stretch in stretches]
