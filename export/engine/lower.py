"""The fused graph in standard ONNX (opset 24) with a cache of fixed length, written in place: what engines are built from.

    input_ids        int64 [batch, new]
    position_ids     int64 [batch, new]     of each token in its row; a key is attended where its position is not later
    write_indices    int64 [batch]          where the new keys and values of a row go in its cache
    key_positions    int64 [attended]       0, 1, ...: as many slots of the cache as attention looks at
    logit_positions  int64 [batch, kept]    which of the new tokens give logits
    past_key_values.i.key / .value          [batch, n_kv_heads, capacity, head_size]
    -> logits [batch, kept, vocab], present.i.key / .value of the same shape as the past, in the same memory

Each operator of onnxruntime's own becomes what standard ONNX has for it, with the same weights:

    GroupQueryAttention               RotaryEmbedding, TensorScatter, Attention        (TensorRT: IKVCacheUpdateLayer, IAttention)
    Skip(Simplified)LayerNormalization   Add, LayerNormalization / RMSNormalization
    QuickGelu, FastGelu, Gelu         Sigmoid and products, Gelu

TensorRT's cache update wants a network input of a fixed length, whose output is a network output in the same memory
(https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/transformers-kv-cache.html); it needs TensorRT 10.15 or
TensorRT-RTX 1.3. Rows are stored without padding: what stands in a slot later than a row's position is never attended to.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgestill.export.engine.lower_attention import Places, lower_attention
from edgestill.export.nodes import input_of, made_by, shared_constant, substitute
from edgestill.export.quantized_ops import CONTRIB
from edgestill.export.rewrite.logits_to_keep import NAME as KEEP
from edgestill.runtime.errors import BadInput

OPSET = 24
"""The first with TensorScatter."""
NEW_INPUTS = {
    "position_ids": ("batch_size", "new"),
    "write_indices": ("batch_size",),
    "key_positions": ("attended",),
    "logit_positions": ("batch_size", "kept"),
}


def lower(model: ir.Model, capacity: int) -> None:
    """Rewrite the fused float32 graph in place.

    Raises:
        BadInput: its attention stayed plain, or it holds an operator that has no standard form here.
    """
    graph = model.graph
    layers = [node for node in graph if node.op_type == "GroupQueryAttention"]
    if not layers:
        raise BadInput(
            "an engine keeps its cache in place, which needs attention as one operator, and this model's stayed plain "
            "(`edgestill build` for cpu-x86 says why in report.html); use engine onnxruntime-cpu"
        )
    places = _add_inputs(graph)
    for node in layers:
        lower_attention(graph, node, places, capacity)
    for node in list(graph):
        if node.domain == CONTRIB:
            _standard(graph, node)
    _choose_logits(graph, places)
    _drop_inputs(model)
    model.graph.opset_imports.pop(CONTRIB, None)
    model.graph.opset_imports[""] = OPSET


def _add_inputs(graph: ir.Graph) -> Places:
    """The inputs beside input_ids and the cache, in their order."""
    known = {value.name: value for value in graph.inputs}
    found: dict[str, ir.Value] = {}
    for name, shape in NEW_INPUTS.items():
        value = known.get(name)
        if value is None:
            value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64))
            graph.inputs.append(value)
        value.shape = ir.Shape(shape)
        found[name] = value
    known["input_ids"].shape = ir.Shape(("batch_size", "new"))
    return Places(
        graph, found["position_ids"], found["write_indices"], found["key_positions"], found["logit_positions"]
    )


def _drop_inputs(model: ir.Model) -> None:
    """Inputs that lengths came from, and what computed with them."""
    graph = model.graph
    RemoveUnusedNodesPass()(model)
    for value in [value for value in graph.inputs if value.name in ("attention_mask", KEEP)]:
        if value.uses():
            reader = next(iter(value.uses())).node
            raise BadInput(
                f"{reader.op_type} {reader.name!r} reads {value.name}, which an engine has not; use engine onnxruntime-cpu"
            )
        graph.inputs.remove(value)
        graph.initializers.pop(str(value.name), None)


# ------------------------------------------------------------------------------------------------------ small operators


def _standard(graph: ir.Graph, node: ir.Node) -> None:
    """One operator of onnxruntime's own in standard ones."""
    if node.op_type not in STANDARD:
        raise BadInput(f"{node.op_type} {node.name!r} has no standard form for an engine; use engine onnxruntime-cpu")
    STANDARD[node.op_type](graph, node)


def _skip_norm(graph: ir.Graph, node: ir.Node) -> None:
    """s = a + b and its norm."""
    rms = node.op_type == "SkipSimplifiedLayerNormalization"
    total = ir.node("Add", node.inputs[:2], name=f"{node.name}_sum")
    attributes = {"epsilon": node.attributes.get_float("epsilon", 1e-5), "axis": -1}
    inputs = [total.outputs[0], *node.inputs[2:]]
    norm = ir.node("RMSNormalization" if rms else "LayerNormalization", inputs, attributes, name=node.name)
    for made, replaced in ((norm.outputs[0], node.outputs[0]), (total.outputs[0], node.outputs[3])):
        made.shape, made.type = replaced.shape, replaced.type
        ir.convenience.replace_all_uses_with(replaced, made)
    graph.insert_before(node, [total, norm])
    graph.remove(node, safe=True)


def _quick_gelu(graph: ir.Graph, node: ir.Node) -> None:
    """x sigmoid(alpha x)."""
    x, alpha = input_of(node, 0), node.attributes.get_float("alpha", 1.702)
    nodes = []
    inner = x
    if alpha != 1.0:
        factor = shared_constant(graph, f"quick_gelu_{alpha:g}", np.array(alpha, np.float32))
        nodes.append(ir.node("Mul", [x, factor], name=f"{node.name}_scaled"))
        inner = nodes[-1].outputs[0]
    nodes.append(ir.node("Sigmoid", [inner], name=f"{node.name}_gate"))
    nodes.append(ir.node("Mul", [x, nodes[-1].outputs[0]], name=node.name))
    substitute(node, *nodes)


def _gelu(graph: ir.Graph, node: ir.Node) -> None:
    """By erf, or in the tanh form."""
    form = "tanh" if node.op_type == "FastGelu" else "none"
    substitute(node, ir.node("Gelu", [input_of(node, 0)], {"approximate": form}, name=node.name))


STANDARD: dict[str, Callable[[ir.Graph, ir.Node], None]] = {
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "SkipLayerNormalization": _skip_norm,
    "QuickGelu": _quick_gelu,
    "FastGelu": _gelu,
    "Gelu": _gelu,
}


# --------------------------------------------------------------------------------------------------------------- logits


def _choose_logits(graph: ir.Graph, places: Places) -> None:
    """The head reads the hidden states of `logit_positions`."""
    keep = next((value for value in graph.inputs if value.name == KEEP), None)
    cuts = [] if keep is None else [use.node for use in keep.uses()]
    cut = cuts[0].outputs[0].uses() if len(cuts) == 1 else ()
    node = next((use.node for use in cut if use.node.op_type == "Slice"), None)
    if node is None:
        raise BadInput(
            "the graph computes its logits in a way that can't be cut to some positions; use engine onnxruntime-cpu"
        )
    axis = shared_constant(graph, "logit_axis", np.array([2], np.int64))
    index = ir.node("Unsqueeze", [places.logit_positions, axis], name="logit_index")
    chosen = ir.node("GatherND", [input_of(node, 0), index.outputs[0]], {"batch_dims": 1}, name="logit_rows")
    substitute(node, index, chosen)
    logits = next(value for value in graph.outputs if value.name == "logits")
    assert logits.shape is not None
    logits.shape = ir.Shape(("batch_size", "kept", logits.shape[2]))
    assert made_by(chosen.outputs[0], "GatherND") is chosen
