"""A Hugging Face checkpoint as an ONNX graph with cache inputs and outputs, by way of Optimum.

The only file that imports Optimum (whose release holds transformers below 4.58). Its tracer runs the model once with
random token ids and records the operators; parity.py compares the result with torch, so Optimum's own validation is off.

Attention is traced in its `eager` form: fewer operators than sdpa's, which wraps every softmax in a test for NaN; and once more as
one operator (attention_op.py), for the fused graph.
"""

from __future__ import annotations

import logging
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from edgestill.export.attention_op import as_one_operator, why_plain
from edgestill.export.graph_io import load_graph, save_graph
from edgestill.export.model_facts import facts_of_checkpoint
from edgestill.export.rewrite.outcome import Outcome
from edgestill.export.rewrite.rules import fuse
from edgestill.runtime.errors import BadInput
from edgestill.runtime.manifest import Graph, ModelFacts, TensorSpec

TASK = "text-generation-with-past"
FILE = "model.onnx"


@dataclass(frozen=True)
class ExportedGraph:
    """A graph file, its inputs and outputs, and the facts of the model in it."""

    path: Path
    graph: Graph
    facts: ModelFacts


def export_onnx(checkpoint: Path, out: Path) -> ExportedGraph:
    """Write `out`/model.onnx (and model.onnx.data above 1.5 GB): float32, with growing cache.

    Inputs: input_ids and position_ids int64 [batch, new], attention_mask int64 [batch, past + new], and per layer
    past_key_values.i.{key,value} float32 [batch, n_kv_heads, past, head_size]. Outputs: logits float32 [batch, new,
    vocab] and present.i.{key,value} [batch, n_kv_heads, past + new, head_size].

    Raises:
        BadInput: no checkpoint with safetensors weights, or a model type that Optimum cannot export with a cache.
    """
    facts = facts_of_checkpoint(checkpoint)
    _require_exporter(facts.model_type)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export.tmp-", dir=out) as folder:
        _trace(checkpoint, Path(folder))
        save_graph(load_graph(Path(folder) / FILE), out / FILE)
    return ExportedGraph(out / FILE, describe_graph(out / FILE), facts)


@dataclass(frozen=True)
class Exports:
    """One model in two forms: `plain` ONNX operators, and `fused` into what onnxruntime has fast kernels for."""

    plain: ExportedGraph
    fused: ExportedGraph


def export_fused(checkpoint: Path, plain: ExportedGraph, out: Path) -> tuple[ExportedGraph, tuple[Outcome, ...]]:
    """Write `out`/model.onnx: the same model in the operators that onnxruntime has fast kernels for, still in float32.

    Attention is one operator and its cache one buffer, where `why_plain` finds nothing; else it stays as in `plain`. Returns
    the graph and what each rewrite did.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export.tmp-", dir=out) as folder:
        why = _trace(checkpoint, Path(folder), fused=True)
        model = load_graph(plain.path if why is not None else Path(folder) / FILE)
        layers = sum(node.op_type == "GroupQueryAttention" for node in model.graph)
        outcomes = (Outcome("attention", layers, (why,) if why else ()), *fuse(model))
        save_graph(model, out / FILE)
    return ExportedGraph(out / FILE, describe_graph(out / FILE), plain.facts), outcomes


def describe_graph(path: Path, name: str = FILE) -> Graph:
    """The inputs and outputs of the graph in `path` for a manifest that ships it as `name`."""
    graph = load_graph(path).graph
    cache: Literal["growing", "shared"] = "growing"
    if any(node.op_type == "GroupQueryAttention" for node in graph):
        cache = "shared"
    return Graph(name, tuple(map(_spec, graph.inputs)), tuple(map(_spec, graph.outputs)), cache)


def _spec(value: ir.Value) -> TensorSpec:
    if value.name is None or value.dtype is None or value.shape is None:
        raise BadInput(f"graph input or output {value.name!r} has no type or shape; export the checkpoint again")
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, shape)


def _require_exporter(model_type: str) -> None:
    """Raise BadInput unless Optimum exports `model_type` with a cache."""
    with _quiet():
        from optimum.exporters.onnx import model_configs  # noqa: F401  (fills the table that is read next)
        from optimum.exporters.tasks import TasksManager

        try:
            tasks = TasksManager.get_supported_tasks_for_model_type(model_type, "onnx", library_name="transformers")
        except KeyError:
            tasks = {}
    if TASK not in tasks:
        raise BadInput(
            f"model_type {model_type!r} has no ONNX export with a cache in Optimum; use one like llama or qwen2"
        )


def _trace(checkpoint: Path, folder: Path, *, fused: bool = False) -> str | None:
    """Let Optimum write model.onnx (and what else it likes) into `folder`; `fused`: with attention as one operator, or
    nothing but the reason why not."""
    import torch

    from edgestill.compress.low_rank import load_student

    with _quiet(), _random_state_kept(), _trace_warnings_ignored():
        from optimum.exporters.onnx import onnx_export_from_model

        try:
            model = load_student(checkpoint, torch.float32, attention="eager")
        except OSError as missing:
            why = str(missing)[:120]
            raise BadInput(f"{checkpoint}: no safetensors weights that load ({why}); use save_pretrained") from missing
        reason = why_plain(model) if fused else None
        if reason is None:
            with as_one_operator(model) if fused else nullcontext():
                onnx_export_from_model(model, folder, task=TASK, device="cpu", do_validation=False)
    return reason


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the chatter of Optimum and transformers below ERROR; the levels are put back."""
    loggers = [logging.getLogger(name) for name in ("optimum", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Give back the random state from which Optimum draws the sizes and the ids of its trace."""
    import torch

    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)


@contextmanager
def _trace_warnings_ignored() -> Iterator[None]:
    """Ignore what tracing is known to warn of; whether the trace is right is parity.py's to say."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export", DeprecationWarning)
        warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning)
        warnings.filterwarnings("ignore", "Exporting aten::index operator of advanced indexing", UserWarning)
        yield
