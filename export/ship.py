"""One bundle for one profile: export, quantize, measure, judge, write.

    7. onnx        the student through Optimum, float32, plain and fused, and the parity gate of both against torch
    8. quantize    the fused graph in the profile's precision, and its yardstick: the float32 graph of the shipped weights;
                   where the profile asks, other ways to store the weights beside it
    9. speed       the teachers and the float student in torch, on this machine, same workload
   10. bundle      staged, checked in a process of its own, given its report, renamed into place

A bundle is written whatever the gate says; only when parity with torch fails is there a report and no bundle. A bundle whose
inputs are unchanged is kept, its verdict read from its report, unless it failed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from edgestill.compress.stages import Stage, Workspace
from edgestill.compress.torch_speed import measure_apart
from edgestill.export.bundle_writer import finish_bundle, stage_bundle, tokenizer_files
from edgestill.export.compare_stage import compare_weights, name_of_shipped
from edgestill.export.engine.make import capacity_for, describe_engine_graph, engine_facts, for_engine
from edgestill.export.genai_config import genai_config
from edgestill.export.model_facts import facts_of_checkpoint
from edgestill.export.onnx_export import ExportedGraph, Exports, describe_graph, export_fused, export_onnx
from edgestill.export.origin import Origin, compared_windows
from edgestill.export.parity import check_parity
from edgestill.export.quantize_stage import quantize_stage
from edgestill.profiles.load import LoadedProfile
from edgestill.runtime.bundle import open_bundle, read_manifest, verify_bundle
from edgestill.runtime.engines.opening import ensure_engine, target_ahead
from edgestill.runtime.engines.store import SHIPPED
from edgestill.runtime.files import write_atomically
from edgestill.runtime.gate import Report, check_bundle
from edgestill.runtime.manifest import LOCAL, Manifest, Precision, canonical_json
from edgestill.runtime.progress import Progress
from edgestill.runtime.report import page

CODE = {"onnx": 2, "speed": 1, "bundle": 1}
"""Revision of what each stage computes; raise it when the same inputs would give another result."""
FUSED = "fused"
"""Folder of the fused graph in the stage of the plain one."""
PACKAGES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxruntime", "tokenizers", "datasets")


def ship(origin: Origin, target: LoadedProfile, space: Workspace, progress: Progress) -> str:
    """One bundle for one profile; returns its verdict."""
    onnx = _onnx_stage(origin, space, progress)
    exports = _exports(onnx.folder, origin)
    final = space.root / target.name
    if failed := [row for row in onnx.info["parity"] if not row["passed"]]:
        return _parity_failed(final, failed, progress)
    quantized = quantize_stage(origin, target, onnx, exports, space)
    if failed := [row for row in quantized.info["parity"] if not row["passed"]]:
        return _parity_failed(final, failed, progress)
    shutil.rmtree(_failure(final), ignore_errors=True)
    compared = compare_weights(origin, target, onnx, exports, space)
    if compared is not None:
        compared = {**compared, "ships": name_of_shipped(target.profile.precision, quantized.info["weights_from"])}
    speeds = _speed_stage(origin, target, space)
    key = hashlib.sha256(
        canonical_json(
            {
                "quantized": quantized.key,
                "reference": str(origin.reference and origin.reference.name),
                "limits": origin.limits,
                "profile": target.profile.model_dump(mode="json"),
                "speeds": speeds,
                "code": CODE["bundle"],
            }
        )
    ).hexdigest()
    kept = None if space.force else _kept_verdict(final, key)
    if kept is not None:
        progress.say(f"bundle {final}: done before, unchanged ({kept})")
        return kept
    progress.stage(f"bundle: {target.name}")
    manifest = _manifest(origin, target, _shipped(exports, quantized, target), quantized, speeds, key)
    staged = stage_bundle(final, manifest, _contents(origin, target, exports, quantized))
    try:
        engines = _engine_ahead(staged, progress) if target.profile.ship_engine else {}
        report = check_bundle(staged, progress, keep=False)
        files = _report_files(report, manifest, origin, onnx, quantized, compared) | engines
        finish_bundle(staged, files, final)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    progress.say(f"bundle: {final}")
    return report.verdict


# 7 ------------------------------------------------------------------------------------------------------------------


def _onnx_stage(origin: Origin, space: Workspace, progress: Progress) -> Stage:
    """model.onnx in float32, the same in fused operators, and the rows of the parity gate; shared by all profiles."""

    def run(folder: Path) -> dict[str, Any]:
        plain = export_onnx(origin.student, folder)
        fused, rewrites = export_fused(origin.student, plain, folder / FUSED)
        windows = compared_windows(origin, plain.facts)
        rows = check_parity(origin.student, plain, windows)
        rows += check_parity(origin.student, fused, windows, "fused: ")
        for row in rows:
            progress.say(row.words())
        return {
            "parity": [dataclasses.asdict(row) for row in rows],
            "rewrites": [dataclasses.asdict(outcome) for outcome in rewrites],
        }

    return space.stage(
        "onnx",
        "onnx: export through Optimum, parity with torch",
        {"student": origin.student_key, "code": CODE["onnx"]},
        run,
    )


def _exports(folder: Path, origin: Origin) -> Exports:
    facts = facts_of_checkpoint(origin.student)
    paths = folder / "model.onnx", folder / FUSED / "model.onnx"
    return Exports(*(ExportedGraph(path, describe_graph(path), facts) for path in paths))


def _parity_failed(final: Path, failed: list[dict[str, Any]], progress: Progress) -> str:
    """No bundle, only the report, beside where the bundle would be."""
    checks = [_parity_check(row) for row in failed]
    folder = _failure(final)
    folder.mkdir(exist_ok=True)
    report = {"verdict": "fail", "checks": checks, "environment": {}, "samples": {}}
    write_atomically(folder / "report.json", json.dumps(report, indent=1).encode())
    progress.say(f"parity with torch failed: no bundle; see {folder / 'report.json'}")
    return "fail"


def _parity_check(row: dict[str, Any]) -> dict[str, Any]:
    """A failed row as a row of the verdict table."""
    value = row["sqnr_db"] if row["unit"] == "dB" else row["max_abs_delta"]
    return {
        "name": f"parity/{row['path']}",
        "value": value,
        "standard_error": None,
        "n": row["positions"],
        "bound": value,
        "limit": row["limit"],
        "direction": "higher" if row["unit"] == "dB" else "lower",
        "unit": row["unit"],
        "passed": False,
        "reason": "the exported graph does not compute what torch computes",
    }


def _failure(final: Path) -> Path:
    """Where the report goes when there may be no bundle."""
    return final.with_name(f"{final.name}.failed")


# 9 ------------------------------------------------------------------------------------------------------------------


def _speed_stage(origin: Origin, target: LoadedProfile, space: Workspace) -> dict[str, Any]:
    """{name: measurement} of each teacher and of the float student ("student (torch)")."""
    work, threads = target.profile.workload, target.profile.device.threads
    new_tokens = min(work.new_tokens, 32)
    models = {**origin.teacher_paths, "student (torch)": (origin.student, "float32")}

    def run(folder: Path) -> dict[str, Any]:
        found = measure_apart(
            list(models.values()), prompt_tokens=work.prompt_tokens, new_tokens=new_tokens, threads=threads
        )
        return {name: dataclasses.asdict(speed) for name, speed in zip(models, found, strict=True)}

    inputs = {
        "student": origin.student_key,
        "teachers": origin.teachers,
        "workload": work.model_dump(mode="json"),
        "threads": threads,
        "code": CODE["speed"],
    }
    return space.stage("speed", "speed: teachers and float student in torch", inputs, run).info


# 10 -----------------------------------------------------------------------------------------------------------------


def _shipped(exports: Exports, quantized: Stage, target: LoadedProfile) -> ExportedGraph:
    """The graph that ships, with its inputs and outputs."""
    if not for_engine(target.profile):
        return exports.fused
    path, facts = quantized.folder / "model.onnx", exports.fused.facts
    return ExportedGraph(path, describe_engine_graph(path), engine_facts(facts, capacity_for(target.profile, facts)))


def _engine_ahead(staged: Path, progress: Progress) -> dict[str, bytes | Path]:
    """The engine for the profile's card, to ship."""
    bundle = open_bundle(staged)
    stored = ensure_engine(bundle, progress, target=target_ahead(bundle, None))
    shutil.rmtree(staged / LOCAL, ignore_errors=True)
    return {f"{SHIPPED}/{stored.fingerprint.digest}.engine": stored.data}


def _manifest(
    origin: Origin, target: LoadedProfile, exported: ExportedGraph, quantized: Stage, speeds: dict[str, Any], key: str
) -> Manifest:
    words = target.profile
    teachers = [{**facts, "torch": speeds.get(facts["name"])} for facts in origin.teachers]
    blocks = words.precision.weights in ("int8", "int4", "nf4", "fp4")
    lossy = words.precision.weights in ("int4", "int8")
    return Manifest(
        name=f"{origin.name}/{target.name}",
        files={},
        model=exported.facts,
        graph=exported.graph,
        precision=Precision(
            words.precision.weights,
            words.precision.block_size if blocks else None,
            words.precision.accuracy_level if lossy else None,
            quantized.info["weights_from"],
            quantized.info["bits_per_weight"],
        ),
        profile={"name": target.name, **words.model_dump(mode="json")},
        limits={**origin.limits, **words.budget, "parity_max_abs_logit": quantized.info["parity_limit"]},
        teachers=teachers,
        provenance={
            **origin.provenance,
            "profile": {"name": target.name, "text": target.text},
            "student_torch": speeds.get("student (torch)"),
            "packages": {name: _version(name) for name in PACKAGES},
            "key": key,
        },
        tool_version=_version("edgestill") or "",
    )


def _contents(origin: Origin, target: LoadedProfile, exports: Exports, quantized: Stage) -> dict[str, Path | bytes]:
    contents: dict[str, Path | bytes] = {
        file.name: file for file in quantized.folder.glob("model.onnx*") if not file.is_dir()
    }
    contents |= tokenizer_files(origin.student)
    if not for_engine(target.profile):  # onnxruntime-genai knows no cache of fixed length
        config = genai_config(exports.fused.facts, exports.fused.graph)
        contents["genai_config.json"] = json.dumps(config, indent=1).encode()
    contents["reference/parity.safetensors"] = quantized.folder / "parity.safetensors"
    if origin.reference is not None:
        contents["reference/held_out.safetensors"] = origin.reference / "held_out.safetensors"
    if target.profile.portable:
        own = (
            quantized.folder / "portable"
        )  # the same integers in plain operators; other precisions ship the float32 graph
        source = own if own.is_dir() else exports.plain.path.parent
        contents |= {f"portable/{file.name}": file for file in source.glob("model.onnx*")}
    return contents


def _report_files(
    report: Report,
    manifest: Manifest,
    origin: Origin,
    onnx: Stage,
    quantized: Stage,
    compared: dict[str, Any] | None,
) -> dict[str, bytes | Path]:
    """report/: report.json with the rows of both parity gates, report.html, training.jsonl."""
    content = report.to_json()
    content["parity"] = {"float32 graph": onnx.info["parity"], "shipped graph": quantized.info["parity"]}
    content["rewrites"] = [*onnx.info["rewrites"], *quantized.info["rewrites"]]
    kept = ("weights_from", "quantized", "left_float", "bits_per_weight")
    content["quantization"] = {name: quantized.info[name] for name in kept}
    if compared is not None:
        content["weights"] = compared
    files: dict[str, bytes | Path] = {"report/report.json": (json.dumps(content, indent=1) + "\n").encode()}
    if origin.training_log:
        files["report/training.jsonl"] = "".join(json.dumps(row) + "\n" for row in origin.training_log).encode()
    html = page(content, dataclasses.asdict(manifest), origin.training_log or None)
    files["report/report.html"] = html.encode()
    return files


def _kept_verdict(final: Path, key: str) -> str | None:
    """The verdict of an intact bundle from the same inputs, or None. A failure is judged again: the machine may be idle now."""
    if not final.is_dir() or verify_bundle(final):
        return None
    if read_manifest(final).provenance.get("key") != key:
        return None
    verdict: str = json.loads((final / "report" / "report.json").read_text(encoding="utf-8"))["verdict"]
    return None if verdict == "fail" else verdict


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
