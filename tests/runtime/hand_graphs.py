"""Small ONNX graphs made by hand, for what tiny exported models do not show: float16 and one shared cache buffer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgestill.runtime.manifest import Graph, ModelFacts, TensorSpec

VOCAB, HEAD, MAX_TOKENS = 12, 16, 32


def facts(n_heads: int, n_kv_heads: int) -> ModelFacts:
    """Facts of a one-layer model."""
    return ModelFacts("hand", 0, 1, n_heads, n_kv_heads, HEAD, n_heads * HEAD, VOCAB, MAX_TOKENS, None, ())


def save(path: Path, nodes: list[Any], dtype: int, kv_heads: int, weights: dict[str, Any], cache: Any) -> Graph:
    """Write a graph with Optimum's names and return its description."""
    name = helper.tensor_dtype_to_np_dtype(dtype).name
    shapes: dict[str, tuple[int, str, list[str | int]]] = {
        "input_ids": (TensorProto.INT64, "int64", ["B", "n"]),
        "attention_mask": (TensorProto.INT64, "int64", ["B", "T"]),
        "past_key_values.0.key": (dtype, name, ["B", kv_heads, "P", HEAD]),
        "past_key_values.0.value": (dtype, name, ["B", kv_heads, "P", HEAD]),
        "logits": (dtype, name, ["B", "n", VOCAB]),
        "present.0.key": (dtype, name, ["B", kv_heads, "T", HEAD]),
        "present.0.value": (dtype, name, ["B", kv_heads, "T", HEAD]),
    }
    outputs = [n for n in shapes if n == "logits" or n.startswith("present")]
    inputs = [n for n in shapes if n not in outputs]
    info = {n: helper.make_tensor_value_info(n, kind, shape) for n, (kind, _, shape) in shapes.items()}
    constants = [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "hand", [info[n] for n in inputs], [info[n] for n in outputs], constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)

    def specs(names: list[str]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(n, shapes[n][1], tuple(shapes[n][2])) for n in names)

    return Graph(path.name, specs(inputs), specs(outputs), cache)


def running_sum(path: Path, dtype: type[np.floating[Any]] = np.float16) -> tuple[Graph, npt.NDArray[np.float64]]:
    """logits = (sum of the embeddings of all tokens so far, through the cache) @ I: exact in small integers.

    Returns the graph and the embedding [V, HEAD] (its first VOCAB columns are the logits of a single token).
    """
    embedding = np.random.default_rng(0).integers(-3, 4, (VOCAB, HEAD)).astype(np.float64)
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["x"]),
        helper.make_node("Unsqueeze", ["x", "one"], ["new"]),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
        helper.make_node("ReduceSum", ["past_key_values.0.value", "two"], ["before"], keepdims=0),
        helper.make_node("CumSum", ["x32", "axis"], ["within32"]),
        helper.make_node("Cast", ["x"], ["x32"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["within32"], ["within"], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),
        helper.make_node("Add", ["before", "within"], ["total"]),
        helper.make_node("Slice", ["total", "zero", "vocab", "two"], ["logits"]),
        helper.make_node("Shape", ["attention_mask"], ["unused"]),
    ]
    nodes.insert(5, nodes.pop(6))
    weights = {
        "embedding": embedding.astype(dtype),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "zero": np.array([0], np.int64),
        "vocab": np.array([VOCAB], np.int64),
        "axis": np.array(1, np.int64),
    }
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return save(path, nodes, kind, 1, weights, "growing"), embedding


def fused_attention(path: Path) -> tuple[Graph, dict[str, npt.NDArray[np.float32]]]:
    """One GroupQueryAttention (2 heads, 1 KV head) that reads and writes one buffer; returns the graph and its weights."""
    rng = np.random.default_rng(1)
    widths = {"wq": 2 * HEAD, "wk": HEAD, "wv": HEAD}
    weights = {n: rng.standard_normal((HEAD, w)).astype(np.float32) for n, w in widths.items()}
    weights["embedding"] = rng.standard_normal((VOCAB, HEAD)).astype(np.float32)
    weights["out"] = rng.standard_normal((2 * HEAD, VOCAB)).astype(np.float32)
    constants = {"minus_one": np.array(-1, np.int64), "axis": np.array([1], np.int64), "last": np.array(1, np.int64)}
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["x"]),
        *(helper.make_node("MatMul", ["x", w], [w[1]]) for w in widths),
        helper.make_node("ReduceSum", ["attention_mask", "axis"], ["lengths"], keepdims=0),
        helper.make_node("Add", ["lengths", "minus_one"], ["seqlens64"]),
        helper.make_node("Cast", ["seqlens64"], ["seqlens"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["shape"]),
        helper.make_node("Gather", ["shape", "last"], ["total64"]),
        helper.make_node("Cast", ["total64"], ["total"], to=TensorProto.INT32),
        helper.make_node(
            "GroupQueryAttention",
            ["q", "k", "v", "past_key_values.0.key", "past_key_values.0.value", "seqlens", "total"],
            ["attended", "present.0.key", "present.0.value"],
            domain="com.microsoft",
            num_heads=2,
            kv_num_heads=1,
        ),
        helper.make_node("MatMul", ["attended", "out"], ["logits"]),
    ]
    return save(path, nodes, TensorProto.FLOAT, 1, {**weights, **constants}, "shared"), weights


def fused_attention_reference(weights: dict[str, Any], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Logits [T, V] of `fused_attention` for one row of ids, in numpy."""
    x = weights["embedding"][ids].astype(np.float64)
    T = len(ids)
    q, k, v = x @ weights["wq"], x @ weights["wk"], x @ weights["wv"]
    masked = np.where(np.tril(np.ones((T, T), bool)), 0.0, -np.inf)
    heads = []
    for h in range(2):
        scores = q[:, h * HEAD : (h + 1) * HEAD] @ k.T / np.sqrt(HEAD) + masked
        p = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(p / p.sum(-1, keepdims=True) @ v)
    logits: npt.NDArray[np.float64] = np.concatenate(heads, -1) @ weights["out"]
    return logits
