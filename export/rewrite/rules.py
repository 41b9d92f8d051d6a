"""The rules in their order: those of the float graph, and those that join quantized weights."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgestill.export import graph_io
from edgestill.export.graph_io import load_graph, weight_bytes
from edgestill.export.quantized_ops import CONTRIB
from edgestill.export.rewrite.activation import activation
from edgestill.export.rewrite.attention_layout import attention_layout
from edgestill.export.rewrite.constant_reshape import constant_reshape
from edgestill.export.rewrite.flat_gemm import flat_gemm
from edgestill.export.rewrite.logits_to_keep import logits_to_keep
from edgestill.export.rewrite.outcome import Outcome
from edgestill.export.rewrite.pack_projections import pack_projections
from edgestill.export.rewrite.skip_norm import skip_norm

FOLDED_BYTES = 1024
"""Constants up to this size are folded: shapes and scalars, never a weight (a transposed head would be stored twice)."""


def join_weights(path: Path) -> tuple[Outcome, ...]:
    """Rewrite the graph file `path`, quantized or not, so that products of one activation are one product.

    Where weights lie outside the file, what is read in two shapes stands there once.
    """
    model = load_graph(path)
    outcomes = [pack_projections(model)]
    if weight_bytes(model) > graph_io.EXTERNAL_OVER_BYTES:
        outcomes.append(constant_reshape(model))
    RemoveUnusedNodesPass()(model)
    graph_io.save_graph(model, path, external_over_bytes=graph_io.EXTERNAL_OVER_BYTES)
    return tuple(outcomes)


def fuse(model: ir.Model) -> tuple[Outcome, ...]:
    """Rewrite the float graph in place; returns what each rule did."""
    from onnxscript import optimizer

    optimizer.optimize_ir(model, input_size_limit=FOLDED_BYTES, output_size_limit=FOLDED_BYTES)
    outcomes = []
    for rule in (flat_gemm, attention_layout, skip_norm, activation, logits_to_keep):
        outcomes.append(rule(model))
        RemoveUnusedNodesPass()(model)  # the next rule counts readers
    model.graph.opset_imports[CONTRIB] = 1
    return tuple(outcomes)
