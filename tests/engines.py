"""Tiny bundles for engines: a random model as `tensorrt-rtx` ships it, made once per session and then copied."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import shutil
import tempfile
import warnings
from pathlib import Path

from tiny import write_model

from edgestill.export.bundle_writer import tokenizer_files
from edgestill.export.engine.make import lower_graph, ship_graph
from edgestill.export.onnx_export import ExportedGraph, export_fused, export_onnx
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.manifest import FileEntry, Manifest, Precision, manifest_to_json

BLOCK = 32
PROFILE = """format: 1
device: {{arch: x86_64, engine: {engine}, threads: 1, memory_mib: 8192, memory_bandwidth_gb_per_s: 1008, gpu: NVIDIA card,
  compute_capability: "8.9"}}
workload: {{prompt_tokens: 16, new_tokens: 8, batch_size: {batch}}}
precision: {{weights: {weights}, block_size: 32}}
"""


def make_engine_bundle(
    folder: Path, family: str = "llama", weights: str = "float16", *, engine: str = "tensorrt-rtx"
) -> Path:
    """A bundle of a random `family` model for `engine` in `folder` (made, must not exist); returns `folder`."""
    shutil.copytree(_shipped(family, weights), folder)
    graph = _graph(family, weights)
    files = {
        path.name: FileEntry(hashlib.sha256(data := path.read_bytes()).hexdigest(), len(data))
        for path in sorted(folder.iterdir())
    }
    device = {"arch": "x86_64", "engine": engine, "threads": 1, "gpu": "NVIDIA card", "compute_capability": "8.9"}
    manifest = Manifest(
        name=f"tiny/{family}",
        files=files,
        model=graph.facts,
        graph=graph.graph,
        precision=Precision(weights),  # type: ignore[arg-type]
        profile={
            "name": "card",
            "device": device,
            "workload": {"prompt_tokens": 16, "new_tokens": 8, "batch_size": 2},
        },
        limits={"inter_token_ms_p50": 100.0},
        tool_version="test",
    )
    (folder / "manifest.json").write_text(manifest_to_json(manifest), encoding="utf-8")
    return folder


def write_profile(
    path: Path, weights: str = "float16", *, engine: str = "tensorrt-rtx", batch: int = 2, more: str = ""
) -> Path:
    """A profile of a card of compute capability 8.9."""
    path.write_text(PROFILE.format(weights=weights, engine=engine, batch=batch) + more, encoding="utf-8")
    return path


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="edgestill-test-engines-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _lowered(family: str) -> tuple[Path, ExportedGraph]:
    """(checkpoint, its graph in standard operators)."""
    folder = _folder() / family
    checkpoint = write_model(folder / "checkpoint", family, **({"width": 128} if family == "gpt_neox" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = export_onnx(checkpoint, folder / "plain")
        fused, _ = export_fused(checkpoint, plain, folder / "fused")
    return checkpoint, lower_graph(fused, folder / "lowered", 128)


@functools.cache
def _graph(family: str, weights: str) -> ExportedGraph:
    _, lowered = _lowered(family)
    precision = PrecisionSpec(weights=weights, block_size=BLOCK, accuracy_level=0)  # type: ignore[arg-type]
    out = _folder() / f"{family}-{weights}"
    made, _ = ship_graph(lowered, out, precision, None, _folder() / f"{family}-{weights}-yardstick" / "model.onnx")
    return dataclasses.replace(made)


@functools.cache
def _shipped(family: str, weights: str) -> Path:
    """The folder with what ships, the manifest apart."""
    checkpoint, folder = _lowered(family)[0], _graph(family, weights).path.parent
    for name, content in tokenizer_files(checkpoint).items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)
    return folder
