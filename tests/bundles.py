"""Tiny real bundles: a model of tiny.py, exported by Optimum, in a folder with its manifest.

`make_bundle` writes what the product ships (graph, tokenizer, generation config, manifest) around random weights, so tests of
the runtime open real files with the real engine. Each model is exported once per test session and then copied.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tiny import read_json, write_model

from edgestill.runtime.manifest import (
    MANIFEST,
    FileEntry,
    Graph,
    Manifest,
    ModelFacts,
    Precision,
    TensorSpec,
    manifest_to_json,
)

PROFILE: dict[str, Any] = {
    "name": "tiny-cpu",
    "device": {"arch": "x86_64", "engine": "onnxruntime-cpu", "threads": 1, "memory_mib": 512},
    "workload": {"prompt_tokens": 8, "new_tokens": 8, "batch_size": 1},
    "precision": {"weights": "float32"},
    "budget": {},
}


def make_bundle(
    folder: Path,
    family: str = "llama",
    *,
    profile: Mapping[str, Any] | None = None,
    limits: Mapping[str, float] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    fused: bool = False,
    **write_model_kwargs: Any,
) -> Path:
    """A bundle of a random `family` model in `folder` (made, must not exist); returns `folder`.

    `fused`: with the graph that builds ship on onnxruntime; else Optimum's own.
    `extra_files`: further shipped files (`reference/held_out.safetensors`, ...) by POSIX name.
    """
    shutil.copytree(_exported(family, fused, _freeze(write_model_kwargs)), folder)
    for name, data in (extra_files or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    config = read_json(checkpoint(family, **write_model_kwargs) / "config.json")
    write_manifest(folder, config, profile or PROFILE, limits or {})
    return folder


def checkpoint(family: str = "llama", **write_model_kwargs: Any) -> Path:
    """The Hugging Face folder that `make_bundle` exports for the same arguments: the independent reference of tests."""
    return _checkpoint(family, _freeze(write_model_kwargs))


def write_manifest(
    folder: Path, config: Mapping[str, Any], profile: Mapping[str, Any], limits: Mapping[str, float]
) -> None:
    """Hash every file of `folder` but local/ into a fresh manifest.json."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST and not name.startswith("local/"):
            data = path.read_bytes()
            files[name] = FileEntry(hashlib.sha256(data).hexdigest(), len(data))
    inputs, outputs = graph_specs(folder / "model.onnx")
    manifest = Manifest(
        name=f"tiny-{config['model_type']}",
        files=files,
        model=model_facts(config),
        graph=Graph("model.onnx", inputs, outputs, _cache(folder / "model.onnx")),
        precision=Precision("float32"),
        profile=dict(profile),
        limits=dict(limits),
        tool_version="test",
    )
    (folder / MANIFEST).write_text(manifest_to_json(manifest), encoding="utf-8")


def graph_specs(graph: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an ONNX file."""
    import onnx

    def spec(value: Any) -> TensorSpec:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        return TensorSpec(value.name, dtype, tuple(d.dim_param or d.dim_value for d in tensor.shape.dim))

    proto = onnx.load(graph, load_external_data=False).graph
    return tuple(map(spec, proto.input)), tuple(map(spec, proto.output))


def _cache(graph: Path) -> Literal["growing", "shared"]:
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph.node
    return "shared" if any(node.op_type == "GroupQueryAttention" for node in nodes) else "growing"


def model_facts(config: Mapping[str, Any]) -> ModelFacts:
    """The facts of a Hugging Face config.json."""
    hidden = config.get("hidden_size") or config["n_embd"]
    heads = config.get("num_attention_heads") or config["n_head"]
    return ModelFacts(
        model_type=config["model_type"],
        parameters=0,
        n_layers=config.get("num_hidden_layers") or config["n_layer"],
        n_heads=heads,
        n_kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or hidden // heads,
        hidden_size=hidden,
        vocab_size=config["vocab_size"],
        max_tokens=config.get("max_position_embeddings") or config["n_positions"],
        bos_token_id=config["bos_token_id"],
        eos_token_ids=(config["eos_token_id"],),
    )


def _freeze(kwargs: Mapping[str, Any]) -> str:
    return json.dumps(kwargs, sort_keys=True)


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="edgestill-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _checkpoint(family: str, frozen: str) -> Path:
    kwargs = json.loads(frozen)
    if "merges" in kwargs:
        kwargs["merges"] = [tuple(m) for m in kwargs["merges"]]
    folder = Path(tempfile.mkdtemp(prefix=f"{family}-", dir=_scratch()))
    return write_model(folder, family, **kwargs)


@functools.cache
def _exported(family: str, fused: bool, frozen: str) -> Path:
    """Graph and tokenizer files, without a manifest."""
    source = _checkpoint(family, frozen)
    if fused:
        return _fused(source)
    work, out = (Path(tempfile.mkdtemp(prefix=f"{family}-{kind}-", dir=_scratch())) for kind in ("onnx", "bundle"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracer and deprecation noise of torch.onnx, which Optimum calls
        from optimum.exporters.onnx import onnx_export_from_model
        from transformers import AutoModelForCausalLM

        logging.getLogger("optimum").setLevel(logging.ERROR)
        model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
        onnx_export_from_model(
            model,
            work,
            task="text-generation-with-past",
            do_validation=False,
            no_post_process=True,
            device="cpu",
        )
    for path in sorted(work.glob("model.onnx*")):
        shutil.copy(path, out / path.name)
    _copy_texts(source, out)
    return out


def _fused(source: Path) -> Path:
    from edgestill.export.onnx_export import export_fused, export_onnx
    from edgestill.export.rewrite.rules import join_weights

    work, out = (Path(tempfile.mkdtemp(prefix=f"fused-{kind}-", dir=_scratch())) for kind in ("onnx", "bundle"))
    export_fused(source, export_onnx(source, work), out)
    join_weights(out / "model.onnx")
    _copy_texts(source, out)
    return out


def _copy_texts(source: Path, out: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, out / name)
