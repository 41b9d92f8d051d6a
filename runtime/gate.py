"""The gate: measured values against limits, with the arithmetic shown.

A limit is tested on the one-sided 95 % bound, the upper one for what should be low and the lower one for what should be high.
A row without a value or without a bound never passes: with a limit on it the verdict is at best `incomplete`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgestill.runtime.bundle import open_bundle, write_local
from edgestill.runtime.child import MeasurementFailed
from edgestill.runtime.device import ENGINE, conditions, environment
from edgestill.runtime.engines.cuda import Cuda
from edgestill.runtime.engines.flavour import is_engine, on_gpu, open_library
from edgestill.runtime.engines.opening import ensure_engine
from edgestill.runtime.errors import BadInput, BundleError, EdgestillError, MissingPart, OutputRefused
from edgestill.runtime.gpu_watch import with_gpu
from edgestill.runtime.manifest import Manifest
from edgestill.runtime.measure import (
    RESOURCES,
    Measurement,
    bundle_mib,
    measure_bundle,
    measure_quality_apart,
    workload_of,
)
from edgestill.runtime.metrics import METRICS, Direction, metric
from edgestill.runtime.processor import architecture
from edgestill.runtime.progress import Progress
from edgestill.runtime.settings import tuned_threads
from edgestill.runtime.statistics import Estimate

Verdict = Literal["pass", "fail", "incomplete"]
QUALITY = tuple(name for name, m in METRICS.items() if m.source != "profile")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Check:
    """One row of the verdict table."""

    name: str
    value: float | None
    standard_error: float | None
    n: int
    """Samples behind the value: tokens, generations, or 1 for a size."""
    bound: float | None
    """The one-sided 95 % bound that the limit is tested on."""
    limit: float | None
    direction: Direction
    unit: str
    passed: bool | None
    """None: no limit, or not measured."""
    reason: str | None = None
    """Why there is no value or no bound."""


@dataclass(frozen=True)
class Report:
    """What `check` found out: report.json and local/check-*.json."""

    verdict: Verdict
    checks: tuple[Check, ...]
    environment: dict[str, Any]
    samples: dict[str, Any]
    """Raw latencies (ms) with the workload they belong to; the warm-up stands apart."""
    quality: dict[str, Any] = field(default_factory=dict)
    """Perplexities of the teachers, the fused target, the float student and the artifact, by domain (quality_beside)."""
    teachers: list[dict[str, Any]] = field(default_factory=list)
    """The teachers' own measurements on the build machine, from the manifest."""
    student_torch: dict[str, Any] = field(default_factory=dict)
    """The float student in torch on the build machine, from the manifest."""
    paths: dict[str, Any] = field(default_factory=dict)
    """How far the cached one-token path and the whole-window path are apart (path_differences)."""
    memory_timeline: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    """Of the bundle."""
    engine: dict[str, Any] = field(default_factory=dict)
    """TensorRT: fingerprint and build of the engine that was judged, or the `reason` why there is none; else empty."""

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, as report.json holds them."""
        return {**dataclasses.asdict(self), "checks": [dataclasses.asdict(check) for check in self.checks]}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Report:
        """The report that `to_json` gave.

        Raises:
            BadInput: a field is missing or unknown.
        """
        try:
            checks = tuple(Check(**row) for row in content["checks"])
            return Report(**{**content, "checks": checks})
        except (KeyError, TypeError) as wrong:
            raise BadInput(f"not a report of this version: {wrong}; run `edgestill check` again") from wrong

    def text(self) -> str:
        """`to_json` as the text of a file; NaN and infinity cannot occur."""
        return json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"


def judge(estimates: Mapping[str, Estimate], limits: Mapping[str, float]) -> tuple[Verdict, tuple[Check, ...]]:
    """Compare estimates with limits, rows in the order of METRICS (`perplexity/<domain>` after `perplexity`).

    `fail`: a limit does not hold. `incomplete`: all that could be tested holds, but a limited row has no value or no bound.

    Raises:
        BadInput: a limit or an estimate has a name that is no metric.
    """
    names = _ordered({*estimates, *limits})
    checks = tuple(
        _check(name, estimates.get(name, Estimate.missing(NOT_MEASURED)), limits.get(name)) for name in names
    )
    if any(check.passed is False for check in checks):
        return "fail", checks
    if any(check.limit is not None and check.passed is None for check in checks):
        return "incomplete", checks
    return "pass", checks


def _ordered(names: set[str]) -> list[str]:
    unknown = sorted(name for name in names if metric(name) is None)
    if unknown:
        raise BadInput(f"{', '.join(unknown)}: no such metric; there are {', '.join(METRICS)} and perplexity/<domain>")
    rank = {name: i for i, name in enumerate(METRICS)}
    return sorted(names, key=lambda name: (rank[name.partition("/")[0]], name))


def _check(name: str, estimate: Estimate, limit: float | None) -> Check:
    what = metric(name)
    if what is None:  # `_ordered` has refused it
        raise BadInput(f"{name}: no such metric")
    bound = estimate.upper if what.direction == "lower" else estimate.lower
    passed: bool | None = None
    reason = estimate.reason if bound is None else None
    if limit is not None and estimate.broken:
        passed = False
    elif limit is not None and bound is not None:
        passed = bound <= limit if what.direction == "lower" else bound >= limit
    return Check(
        name,
        estimate.value,
        estimate.standard_error,
        estimate.n,
        bound,
        limit,
        what.direction,
        what.unit,
        passed,
        reason,
    )


def check_bundle(bundle: Path, progress: Progress | None = None, *, keep: bool = True) -> Report:
    """Integrity, quality against the reference, speed, memory and energy of `bundle`, on this machine.

    Args:
        keep: also write the report to `local/check-<utc>.json`; a folder that cannot be written is said, not an error.

    Raises:
        BundleError: the bundle is damaged; everything that is wrong, in one line.
    """
    from edgestill.runtime.bundle import read_manifest, verify_bundle

    problems = verify_bundle(bundle)
    if problems:
        raise BundleError("; ".join(problems))
    manifest = read_manifest(bundle)
    surroundings = environment(manifest.engine)
    engine = _engine(bundle, manifest, progress)
    estimates, beside, paths = _quality(bundle, manifest, progress)
    measured = _resources(bundle, manifest, progress)
    surroundings["end"] = conditions()
    surroundings = with_gpu(surroundings, measured.gpu)
    if "reason" in engine:  # none could be had here, so none was judged
        surroundings["engine"] = None
    verdict, checks = judge(estimates | measured.estimates, manifest.limits)
    report = Report(
        verdict=verdict,
        checks=checks,
        environment=surroundings,
        samples=measured.samples,
        quality=beside,
        teachers=manifest.teachers,
        student_torch=manifest.provenance.get("student_torch") or {},
        paths=paths,
        memory_timeline=measured.memory_timeline,
        name=manifest.name,
        engine=engine,
    )
    if keep:
        _keep(bundle, report, progress)
    return report


def _engine(bundle: Path, manifest: Manifest, progress: Progress | None) -> dict[str, Any]:
    """The engine that will be judged, built when it is missing; its reason where there can be none here."""
    if not is_engine(manifest.engine):
        return {}
    try:
        stored = ensure_engine(open_bundle(bundle), progress)
    except EdgestillError as refusal:
        if progress is not None:
            progress.say(f"no engine: {refusal}")
        return {"reason": str(refusal)}
    return {
        "fingerprint": dataclasses.asdict(stored.fingerprint),
        "digest": stored.fingerprint.digest,
        "built_now": stored.built_now,
        **stored.record,
    }


def _quality(
    bundle: Path, manifest: Manifest, progress: Progress | None
) -> tuple[dict[str, Estimate], dict[str, Any], dict[str, Any]]:
    """(estimates, table beside the teachers, differences of the paths); all rows null where the process gave nothing."""
    try:
        found = measure_quality_apart(bundle, _threads(manifest), progress)
    except MeasurementFailed as failure:
        return {name: Estimate.missing(str(failure)) for name in QUALITY}, {}, {}
    return found["estimates"], found["beside"], found["paths"]


def _resources(bundle: Path, manifest: Manifest, progress: Progress | None) -> Measurement:
    """The resource rows; null, with the reason, on a machine that the bundle was not built for."""
    size = {"bundle_mib": bundle_mib(bundle, manifest)}
    reason = wrong_machine(manifest.profile.get("device", {}))
    if reason is None:
        try:
            work = workload_of(manifest, threads=tuned_threads(bundle))
        except BadInput as refusal:
            reason = str(refusal)
    if reason is not None:
        return Measurement({name: Estimate.missing(reason) for name in RESOURCES} | size)
    return measure_bundle(
        bundle,
        prompt_tokens=work.prompt_tokens,
        new_tokens=work.new_tokens,
        batch_size=work.batch_size,
        threads=work.threads,
        progress=progress,
    )


def wrong_machine(device: Mapping[str, Any]) -> str | None:
    """Why speed and memory measured here would not be those of `device` (a profile's section), or None."""
    repair = "run `edgestill check` on the target"
    arch, engine = device.get("arch", architecture()), device.get("engine", ENGINE)
    if arch != architecture():
        return f"built for {arch}, this machine is {architecture()}: {repair}"
    if on_gpu(engine):
        return _wrong_card(device, repair)
    if engine != ENGINE:
        return f"built for engine {engine}, this machine runs {ENGINE}: {repair}"
    return None


def _wrong_card(device: Mapping[str, Any], repair: str) -> str | None:
    """Why the GPU here is not the one of a profile's `device`, or None."""
    engine = str(device["engine"])
    try:
        if is_engine(engine):
            open_library(engine)
        card = Cuda().card()
    except MissingPart as missing:
        return f"built for engine {engine}: {str(missing).partition(';')[0]}: {repair}"
    capability = device.get("compute_capability")
    if capability not in (None, card.compute_capability):
        return f"built for compute capability {capability}, {card.name} here has {card.compute_capability}: {repair}"
    return None


def _threads(manifest: Manifest) -> int:
    return int(manifest.profile.get("device", {}).get("threads", 1))


def _keep(bundle: Path, report: Report, progress: Progress | None) -> None:
    stamp = report.environment["end"]["utc"].replace("-", "").replace(":", "")
    try:
        path = write_local(open_bundle(bundle), f"check-{stamp}.json", report.text().encode())
    except OutputRefused as refusal:
        if progress is not None:
            progress.say(f"report not kept: {refusal}")
        return
    if progress is not None:
        progress.say(f"report: {path}")
