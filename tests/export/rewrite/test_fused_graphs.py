"""The fused graph of every family: what became of each part, the same logits as torch, and plain forms with their reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny import write_model

from edgestill.export.attention_op import why_plain
from edgestill.export.onnx_export import ExportedGraph, export_fused, export_onnx
from edgestill.export.parity import check_parity, check_quantized_parity
from edgestill.export.quantize import dequantize_graph, quantize_graph
from edgestill.export.rewrite.outcome import Outcome
from edgestill.export.rewrite.rules import join_weights
from edgestill.profiles.schema import PrecisionSpec

IDS = np.random.default_rng(0).integers(0, 320, (2, 26))
Fused = Callable[..., tuple[Path, ExportedGraph, dict[str, Outcome]]]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral with a window": ("mistral", {"sliding_window": 8}),
    "gemma": ("gemma", {}),
    "phi, partly rotated": ("phi", {}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 1.0}),
    "llama, scaled angles": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
}


@pytest.fixture(scope="session")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Fused:
    """(family, config fields) -> (checkpoint, fused float32 graph, outcome of each rule)."""
    known: dict[str, tuple[Path, ExportedGraph, dict[str, Outcome]]] = {}

    def make(family: str, **fields: Any) -> tuple[Path, ExportedGraph, dict[str, Outcome]]:
        key = f"{family} {fields}"
        if key not in known:
            folder = tmp_path_factory.mktemp(family)
            checkpoint = write_model(folder / "checkpoint", family, **fields)
            graph, outcomes = export_fused(checkpoint, export_onnx(checkpoint, folder / "plain"), folder / "fused")
            known[key] = (checkpoint, graph, {outcome.rule: outcome for outcome in outcomes})
        return known[key]

    return make


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_torch_in_every_way(name: str, fused: Fused) -> None:
    family, fields = FAMILIES[name]
    checkpoint, graph, outcomes = fused(family, **fields)
    assert graph.graph.cache == "shared"
    assert [row for row in check_parity(checkpoint, graph, IDS) if not row.passed] == []
    assert outcomes["attention"] == Outcome("attention", 2)
    found = operators(graph.path)
    assert found["GroupQueryAttention"] == 2
    assert found["SkipSimplifiedLayerNormalization"] + found["SkipLayerNormalization"] == outcomes["skip norm"].done
    assert found["Sigmoid"] + found["Tanh"] + found["Erf"] == 0
    assert outcomes["activation"] == Outcome("activation", 2)
    assert outcomes["logits_to_keep"].done == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"Transpose": 1, "Softmax": 0, "Concat": 0, "Reshape": 0, "SkipSimplifiedLayerNormalization": 4}),
        ("phi, partly rotated", {"Slice": 1, "Concat": 0, "Reshape": 0, "SkipLayerNormalization": 2, "FastGelu": 2}),
        ("gpt2", {"Gemm": 0, "Transpose": 1, "SkipLayerNormalization": 5, "FastGelu": 2}),
        ("gpt_neox", {"Gelu": 2, "SkipLayerNormalization": 2}),
        ("gemma", {"FastGelu": 2}),
        ("qwen3", {"QuickGelu": 2, "Reshape": 8}),
    ],
)
def test_what_stays_of_the_trace(name: str, expected: dict[str, int], fused: Fused) -> None:
    family, fields = FAMILIES[name]
    found = operators(fused(family, **fields)[1].path)
    assert {operator: found[operator] for operator in expected} == expected


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}, "heads of 8 values are no multiple of 16"),
        ("gpt_neox", {}, "it rotates 8 values of a head, no multiple of 16"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "angles of kind dynamic depend on the length",
        ),
    ],
)
def test_attention_that_is_not_understood_stays_plain_and_says_why(
    family: str, fields: dict[str, Any], reason: str, fused: Fused
) -> None:
    checkpoint, graph, outcomes = fused(family, **fields)
    assert outcomes["attention"].done == 0
    assert reason in outcomes["attention"].left[0]
    assert graph.graph.cache == "growing"
    assert operators(graph.path)["GroupQueryAttention"] == 0
    assert outcomes["activation"].done == 2  # the other parts are fused all the same
    assert [row for row in check_parity(checkpoint, graph, IDS) if not row.passed] == []


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("bloom", {"hidden_size": 64, "n_layer": 1, "n_head": 4}, "cannot be replaced by name"),
        ("gpt2", {"n_embd": 64, "n_head": 4, "scale_attn_by_inverse_layer_idx": True}, "is scaled layer by layer"),
        ("gpt2", {"n_embd": 64, "n_head": 4, "scale_attn_weights": False}, "attention is not scaled"),
        ("gemma3_text", {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4}, "2 tables of rotary angles"),
        ("gpt_oss", {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4}, "attention has sinks of its own"),
        ("cohere", {"hidden_size": 64, "num_attention_heads": 4}, "does not rotate the halves"),
    ],
)
def test_models_known_to_differ_are_named(family: str, fields: dict[str, Any], reason: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, vocab_size=64, num_hidden_layers=1, **fields)
    assert reason in str(why_plain(AutoModelForCausalLM.from_config(config)))


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi, partly rotated", "gpt2", "gpt_neox"])
def test_joined_weights_multiply_as_apart(name: str, weights: str, fused: Fused, tmp_path: Path) -> None:
    family, fields = FAMILIES[name]
    _, graph, _ = fused(family, **fields)
    shipped, yardstick = tmp_path / "model.onnx", tmp_path / "yardstick.onnx"
    if weights == "float32":
        shipped.write_bytes(graph.path.read_bytes())
        yardstick = graph.path
    else:
        quantize_graph(graph.path, shipped, PrecisionSpec(weights=weights))  # type: ignore[arg-type]
        dequantize_graph(shipped, yardstick)
    before = operators(shipped)
    (outcome,) = join_weights(shipped)
    rows = check_quantized_parity(shipped, yardstick, graph.facts, graph.graph, IDS)
    assert [row for row in rows if not row.passed] == []
    product = "MatMul" if weights == "float32" else "MatMulNBits"
    # the two norms of a random gpt_neox layer are equal, so attention and MLP read the same, as they do in phi
    joined, fewer = {"gpt2": (2, 0), "gpt_neox": (2, 2), "phi": (2, 6)}.get(family, (4, 6))
    assert (outcome.done, before[product] - operators(shipped)[product]) == (joined, fewer)
    assert outcome.left == ()


def test_joined_integers_are_the_ones_that_were_apart(fused: Fused, tmp_path: Path) -> None:
    _, graph, _ = fused("qwen2")
    path = tmp_path / "model.onnx"
    quantize_graph(graph.path, path, PrecisionSpec(weights="int4", symmetric=False))
    apart = {i.name: onnx.numpy_helper.to_array(i).tobytes() for i in onnx.load(path).graph.initializer}
    join_weights(path)
    together = b"".join(onnx.numpy_helper.to_array(i).tobytes() for i in onnx.load(path).graph.initializer)
    packed = {name: data for name, data in apart.items() if name.endswith(("_codes", "_scales", "_zero_points"))}
    assert len(packed) > 30
    assert [name for name, data in packed.items() if data not in together] == []


def test_weights_of_different_width_stay_apart(fused: Fused, tmp_path: Path) -> None:
    """With a size budget, some layers have 8 bits."""
    from edgestill.export.blockwise import quantize_int8
    from edgestill.export.graph_io import load_graph
    from edgestill.export.linear_layers import Linear, find_weights
    from edgestill.export.nodes import constant_array
    from edgestill.export.quantize import ByValues, digest_of

    _, graph, _ = fused("llama")
    first = next(w for w in find_weights(load_graph(graph.path).graph) if isinstance(w, Linear))
    matrix = constant_array(first.weight)
    path = tmp_path / "model.onnx"
    quantize_graph(graph.path, path, PrecisionSpec(), given=ByValues({digest_of(matrix): quantize_int8(matrix, 32)}))
    (outcome,) = join_weights(path)
    assert outcome.done == 3
    assert [reason.partition(": ")[2] for reason in outcome.left] == ["they differ in bits"]


def test_the_default_keeps_every_logit_for_who_does_not_know_the_input(fused: Fused) -> None:
    import onnxruntime

    _, graph, _ = fused("llama")
    session = onnxruntime.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
    assert "logits_to_keep" not in {i.name for i in session.get_inputs()}
    feeds = {
        spec.name: np.zeros((1, 2, 0, 16), np.float32) for spec in graph.graph.inputs if spec.name.startswith("past")
    }
    feeds |= {"input_ids": IDS[:1], "attention_mask": np.ones((1, 26), np.int64)}
    whole = session.run(["logits"], feeds)[0]
    last = session.run(["logits"], feeds | {"logits_to_keep": np.array([2], np.int64)})[0]
    assert (whole.shape, last.shape) == ((1, 26, 320), (1, 2, 320))
    np.testing.assert_allclose(last, whole[:, -2:], rtol=0, atol=1e-5)


def test_nothing_of_transformers_or_the_exporter_stays_replaced(fused: Fused) -> None:
    from transformers.cache_utils import DynamicCache
    from transformers.models.llama import modeling_llama

    before = (DynamicCache.update, modeling_llama.apply_rotary_pos_emb)
    fused("llama", hidden_act="gelu")
    assert (DynamicCache.update, modeling_llama.apply_rotary_pos_emb) == before


def test_large_weights_lie_outside_and_a_shared_embedding_once(
    fused: Fused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgestill.export import graph_io

    _, graph, _ = fused("llama")
    path, yardstick = tmp_path / "model.onnx", tmp_path / "yardstick.onnx"
    quantize_graph(graph.path, path, PrecisionSpec())
    dequantize_graph(path, yardstick)
    inside = path.stat().st_size
    monkeypatch.setattr(graph_io, "EXTERNAL_OVER_BYTES", 0)
    outcomes = {outcome.rule: outcome for outcome in join_weights(path)}
    assert outcomes["constant reshape"] == Outcome("constant reshape", 1)
    outside = tmp_path / "model.onnx.data"
    assert outside.stat().st_size + path.stat().st_size < inside + 4096 * 40  # pages begin anew; nothing stands twice
    places = {
        (i.name, e.value) for i in onnx.load(path, load_external_data=False).graph.initializer for e in i.external_data
    }
    codes = [name for name, _ in places if "embed" in name and "codes" in name]
    assert len(set(codes)) == 2  # as the head reads them, and as the table does
    offsets = [value for name, value in places if name in codes]
    assert len(set(offsets)) < len(offsets)
    rows = check_quantized_parity(path, yardstick, graph.facts, graph.graph, IDS)
    assert [row for row in rows if not row.passed] == []
