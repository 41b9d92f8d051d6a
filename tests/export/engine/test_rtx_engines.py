"""TensorRT-RTX builds real engines here, without a GPU: what goes in is asserted, what comes out is read."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from engines import make_engine_bundle, write_profile
from tiny import write_model

from edgestill.compress.student import make_student
from edgestill.export.build import export_checkpoint
from edgestill.export.bundle_writer import tokenizer_files
from edgestill.export.engine.make import lower_graph, ship_graph
from edgestill.export.onnx_export import ExportedGraph, export_fused, export_onnx
from edgestill.export.plan import load_all
from edgestill.profiles.load import load_profile
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.bundle import open_bundle, verify_bundle
from edgestill.runtime.cli import run
from edgestill.runtime.engines.builder import EngineBuilder
from edgestill.runtime.engines.flavour import Library, open_library
from edgestill.runtime.engines.plan import DECODE, PREFILL, EnginePlan, check_network, plan_of
from edgestill.runtime.errors import BadInput, BundleError, MissingPart
from edgestill.runtime.progress import QuietProgress

pytest.importorskip("tensorrt_rtx", reason="needs pip install 'edgestill[rtx]'")
QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"
TYPES = {"float16": "HALF", "int4": "HALF", "int8": "HALF", "fp8": "HALF", "bfloat16": "BF16", "float32": "FLOAT"}
CASES = [
    *((family, weights) for family in ("llama", "qwen2", "gpt2") for weights in ("float16", "int4")),
    *(("llama", weights) for weights in ("int8", "fp8", "bfloat16", "float32")),
    *((family, "float16") for family in ("qwen3", "gemma", "phi", "gpt_neox")),
]


@pytest.fixture(scope="module")
def library() -> Library:
    return open_library("tensorrt-rtx")


def parsed(library: Library, path: Path) -> tuple[Any, Any]:
    """(builder, network) of a graph file."""
    builder = library.trt.Builder(library.logger(lambda _: None))
    network = library.network(builder)
    assert library.trt.OnnxParser(network, builder.logger).parse_from_file(str(path))
    return builder, network


@pytest.mark.parametrize(("family", "weights"), CASES)
def test_an_engine_is_built(family: str, weights: str, library: Library, tmp_path: Path) -> None:
    bundle = open_bundle(make_engine_bundle(tmp_path / "bundle", family, weights))
    manifest, plan = bundle.manifest, plan_of(bundle.manifest)
    assert manifest.precision.weights == weights and plan.capacity == 128
    path = bundle.path("model.onnx")
    builder, network = parsed(library, path)
    check_network(network, manifest.graph, manifest.model, library.numpy_name)
    trt, kinds, shapes = library.trt, {}, {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        kinds[tensor.name], shapes[tensor.name] = tensor.dtype, tuple(tensor.shape)
    caches = [name for name in kinds if name.startswith("past_key_values.")]
    assert len(caches) == 2 * manifest.model.n_layers
    for name in caches:
        assert kinds[name] == getattr(trt.DataType, TYPES[weights])
        assert shapes[name] == (-1, manifest.model.n_kv_heads, 128, manifest.model.head_size)
    for name in ("input_ids", "write_indices", "key_positions", "logit_positions"):
        assert kinds[name] == trt.DataType.INT64
    updates = [i for i in range(network.num_layers) if network.get_layer(i).type == trt.LayerType.KV_CACHE_UPDATE]
    assert len(updates) == len(caches), "every cache is written in place"
    quantized = [i for i in range(network.num_layers) if network.get_layer(i).type == trt.LayerType.DEQUANTIZE]
    assert bool(quantized) == (weights in ("int4", "int8", "fp8"))

    profiles = EngineBuilder(library, lambda _: None).profiles(builder, plan, manifest.graph)
    longest = {PREFILL: (2, 128), DECODE: (2, 1)}
    for number, profile in enumerate(profiles):
        assert tuple(map(tuple, profile.get_shape("input_ids")))[2] == longest[number]
        assert tuple(map(tuple, profile.get_shape("key_positions"))) == ((1,), (24,), (128,))

    lines: list[str] = []
    steps: list[tuple[str, int, int]] = []
    maker = EngineBuilder(library, lines.append, lambda *step: steps.append(step))
    built = maker.build(path, plan, manifest.graph, manifest.model, "8.9")
    assert len(built.data) > 100_000 and built.attention_layers == manifest.model.n_layers
    assert steps and lines and built.parse_seconds > 0 < built.build_seconds


def test_an_engine_of_int4_is_much_smaller_than_one_of_float16(library: Library, tmp_path: Path) -> None:
    """48 M parameters with a vocabulary of 8,192, as the issue of size is one of weights."""
    checkpoint = write_model(
        tmp_path / "checkpoint",
        "llama",
        width=512,
        layers=14,
        vocab=8192,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1536,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = export_onnx(checkpoint, tmp_path / "plain")
        fused, _ = export_fused(checkpoint, plain, tmp_path / "fused")
    lowered = lower_graph(fused, tmp_path / "lowered", 128)
    assert 45e6 < lowered.facts.parameters < 55e6
    sizes = {}
    for weights in ("float16", "int4"):
        precision = PrecisionSpec(weights=weights, block_size=64, accuracy_level=0)  # type: ignore[arg-type]
        shipped, _ = ship_graph(
            lowered, tmp_path / weights, precision, None, tmp_path / weights / "yardstick" / "y.onnx"
        )
        plan = EnginePlan("tensorrt-rtx", weights, "model.onnx", "", 128, 1, 128, 1, 64, 96)
        built = EngineBuilder(library, lambda _: None).build(shipped.path, plan, shipped.graph, shipped.facts, "8.9")
        sizes[weights] = len(built.data)
    assert sizes["int4"] <= 0.45 * sizes["float16"], sizes


@pytest.mark.parametrize(("inner", "block", "left"), [(288, 64, 0), (80, 32, 0), (72, 32, 2)])
def test_layers_whose_last_block_is_not_full(
    inner: int, block: int, left: int, library: Library, tmp_path: Path
) -> None:
    """288 inputs in blocks of 64, 80 in blocks of 32: the same weights in blocks that divide them; 72 has none of 16, and stays."""
    import numpy as np

    from edgestill.export.parity import ort_logits

    checkpoint = write_model(tmp_path / "checkpoint", "llama", intermediate_size=inner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = export_onnx(checkpoint, tmp_path / "plain")
        fused, _ = export_fused(checkpoint, plain, tmp_path / "fused")
    lowered = lower_graph(fused, tmp_path / "lowered", 128)
    precision = PrecisionSpec(weights="int4", block_size=block, accuracy_level=0)  # type: ignore[arg-type]
    shipped, report = ship_graph(lowered, tmp_path / "shipped", precision, None, tmp_path / "yardstick" / "model.onnx")
    assert [node.shape for node in report.left_float] == [(inner, 64)] * left
    if not left:  # the same integers as the graph for onnxruntime, whose blocks may be cut short
        reference, _ = quantized_for_onnxruntime(fused, tmp_path / "cpu.onnx", precision)
        ids = np.random.default_rng(0).integers(0, 300, (1, 20))
        ours = ort_logits(tmp_path / "yardstick" / "model.onnx", lowered.facts, lowered.graph, ids)
        np.testing.assert_allclose(ours, ort_logits(reference, fused.facts, fused.graph, ids), atol=2e-5)
    plan = EnginePlan("tensorrt-rtx", "int4", "model.onnx", "", 128, 1, 128, 1, 64, 96)
    built = EngineBuilder(library, lambda _: None).build(shipped.path, plan, shipped.graph, shipped.facts, "8.9")
    assert len(built.data) > 100_000


def quantized_for_onnxruntime(fused: Any, path: Path, precision: PrecisionSpec) -> tuple[Path, Any]:
    """The float32 graph of the weights that a CPU bundle of this precision ships."""
    from edgestill.export.quantize import dequantize_graph, quantize_graph

    report = quantize_graph(fused.path, path, precision)
    dequantize_graph(path, path.with_name("cpu-float.onnx"))
    return path.with_name("cpu-float.onnx"), report


def test_built_ahead_by_the_command_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGESTILL_HOME", str(tmp_path / "home"))
    folder = make_engine_bundle(tmp_path / "bundle")
    results = []
    for name in ("first", "second"):
        assert run(["engine", str(folder), "--ahead", "--json", str(tmp_path / f"{name}.json")]) == 0
        results.append(json.loads((tmp_path / f"{name}.json").read_text()))
    out = capsys.readouterr().out
    assert "compute capability 8.9, driver any" in out and "(done before)" in out
    assert [result["built_now"] for result in results] == [True, False]
    assert results[0]["digest"] == results[1]["digest"] and results[0]["peak_rss_mib"] > 100
    log = (folder / "local" / "engines" / results[0]["digest"] / "build.log").read_text()
    assert "Opset version:    24" in log
    assert run(["engine", str(folder), "--compute-capability", "12.0"]) == 0
    assert len(list((folder / "local" / "engines").glob("*/engine"))) == 2
    assert run(["engine", str(folder), "--compute-capability", "9.0"]) == 2
    assert "compute capability 9.0; use engine tensorrt" in capsys.readouterr().err


def test_a_bundle_ships_its_engine_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESTILL_HOME", str(tmp_path / "home"))
    profile = write_profile(tmp_path / "card.yaml", "int4", more="ship_engine: true\n")
    checkpoint = write_model(tmp_path / "checkpoint", "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict = export_checkpoint(checkpoint, str(profile), tmp_path / "out", None, None, QuietProgress())
    folder = tmp_path / "out" / "card"
    (name,) = (name for name in open_bundle(folder).manifest.files if name.endswith(".engine"))
    assert verdict == "incomplete" and name.startswith("engines/") and verify_bundle(folder) == []
    assert not (folder / "local").exists()
    from edgestill.runtime.engines.store import Target, find_engine

    found = find_engine(open_bundle(folder), open_library("tensorrt-rtx").version, Target("8.9", "13.0"))
    assert found is not None and found.data == (folder / name).read_bytes()


def test_an_engine_to_ship_is_refused_before_any_work_where_nothing_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = write_profile(tmp_path / "card.yaml", more="ship_engine: true\n")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingPart, match=r"tensorrt-rtx is not installed here; pip install 'edgestill\[rtx\]'"):
        export_checkpoint(tmp_path / "nowhere", str(profile), tmp_path / "out", None, None, QuietProgress())
    assert not (tmp_path / "out").exists()


def test_what_tensorrt_refuses_is_one_line(library: Library, tmp_path: Path) -> None:
    bundle = open_bundle(make_engine_bundle(tmp_path / "bundle"))
    manifest, plan, path = bundle.manifest, plan_of(bundle.manifest), bundle.path("model.onnx")
    builder = EngineBuilder(library, lambda _: None)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(BadInput, match=r"tensorrt-rtx [\d.]+ can't read broken.onnx \(.+\); upgrade it or build"):
        builder.build(broken, plan, manifest.graph, manifest.model, "8.9")
    with pytest.raises(BadInput, match=r"builds for SM120, SM121, SM75, SM80, SM86, SM89, not for 9.0"):
        builder.build(path, plan, manifest.graph, manifest.model, "9.0")
    other = dataclasses.replace(manifest.graph, outputs=manifest.graph.outputs[:-1])
    with pytest.raises(BundleError, match=r"differ in output present\.1\.value"):
        builder.build(path, plan, other, manifest.model, "8.9")


def test_types_that_do_not_fit_together_are_refused_with_tensorrts_reason(library: Library, tmp_path: Path) -> None:
    """A strongly typed network takes no half-converted graph: the reason that TensorRT logs stands in the line."""
    import numpy as np

    from edgestill.export.graph_io import load_graph, save_graph
    from edgestill.export.nodes import add_constant

    bundle = open_bundle(make_engine_bundle(tmp_path / "bundle"))
    manifest, plan = bundle.manifest, plan_of(bundle.manifest)
    model = load_graph(bundle.path("model.onnx"))
    product = next(node for node in model.graph if node.op_type == "MatMul")
    weight = product.inputs[1]
    assert weight is not None and weight.const_value is not None
    wide = add_constant(model.graph, "wide", weight.const_value.numpy().astype(np.float32))
    product.replace_input_with(1, wide)
    save_graph(model, tmp_path / "mixed.onnx")
    lines: list[str] = []
    with pytest.raises(BadInput, match=r"tensorrt-rtx .* mixed.onnx \(.*must have same input types.*\)"):
        EngineBuilder(library, lines.append).build(tmp_path / "mixed.onnx", plan, manifest.graph, manifest.model, "8.9")
    assert any(line.startswith("error: ") for line in lines)


def test_weights_in_a_file_beside_the_graph(library: Library, tmp_path: Path) -> None:
    from edgestill.export.graph_io import load_graph, save_graph

    bundle = open_bundle(make_engine_bundle(tmp_path / "bundle"))
    manifest, plan = bundle.manifest, plan_of(bundle.manifest)
    path = tmp_path / "apart" / "model.onnx"
    save_graph(load_graph(bundle.path("model.onnx")), path, external_over_bytes=1000)
    assert path.with_name("model.onnx.data").is_file()
    built = EngineBuilder(library, lambda _: None).build(path, plan, manifest.graph, manifest.model, "8.9")
    assert len(built.data) > 100_000


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the student that the packaged recipe describes, as it is before training."""
    import torch

    recipe = load_all("quickstart", ["rtx-4090"])
    teachers, spec = recipe.given.teachers, recipe.loaded.recipe.student
    model = make_student(spec, teachers, recipe.given.vocabulary, seed=0).model
    with torch.no_grad():
        for parameter in model.parameters():  # untrained weights are so small that every token is as likely
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    folder = tmp_path_factory.mktemp("quickstart") / "student"
    model.save_pretrained(folder)
    for name, content in tokenizer_files(teachers[0].path).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return folder


@pytest.mark.parametrize("weights", ["float16", "int4"])
def test_the_student_of_the_quickstart(weights: str, quickstart: Path, library: Library, tmp_path: Path) -> None:
    """Its engine for a packaged profile is built, of a graph that says what the float32 graph of its weights says."""
    profile = load_profile("rtx-4090").profile
    precision = profile.precision.model_copy(update={"weights": weights})
    lowered = lowered_of(quickstart, tmp_path, capacity=None)
    assert (lowered.facts.n_layers, lowered.facts.hidden_size, lowered.facts.parameters) == (3, 128, 1_053_568)
    yardstick = tmp_path / "yardstick" / "model.onnx"
    shipped, report = ship_graph(lowered, tmp_path / "shipped", precision, None, yardstick)
    assert len(report.quantized) == (0 if weights == "float16" else 3 * 7 + 2), "every layer, the head and the table"
    work = profile.workload
    attended = work.prompt_tokens + work.new_tokens
    plan = EnginePlan("tensorrt-rtx", weights, "model.onnx", "", 512, 1, work.prompt_tokens, 1, 256, attended)
    built = EngineBuilder(library, lambda _: None).build(shipped.path, plan, shipped.graph, shipped.facts, "8.9")
    least = lowered.facts.parameters * (2 if weights == "float16" else 0.5)
    assert built.attention_layers == 3 and len(built.data) > least, "all weights are in it"
    assert divergence(yardstick, lowered, shipped) <= 1e-3, "float16 arithmetic on the very weights that ship"


@pytest.mark.parametrize("weights", ["float16", "int4"])
def test_a_trained_model_in_16_bits(weights: str, tmp_path: Path) -> None:
    """A teacher of the quickstart: the graph that an engine is built from says what the float model says."""
    precision = PrecisionSpec(weights=weights, block_size=32, accuracy_level=0)  # type: ignore[arg-type]
    lowered = lowered_of(QUICKSTART / "teachers" / "prose", tmp_path, capacity=512)
    yardstick = tmp_path / "yardstick" / "model.onnx"
    shipped, _ = ship_graph(lowered, tmp_path / "shipped", precision, None, yardstick)
    assert divergence(yardstick, lowered, shipped) <= 1e-3


def lowered_of(checkpoint: Path, folder: Path, capacity: int | None) -> ExportedGraph:
    """`checkpoint` in standard operators, its cache as long as `capacity` or as the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = export_onnx(checkpoint, folder / "plain")
        fused, _ = export_fused(checkpoint, plain, folder / "fused")
    return lower_graph(fused, folder / "lowered", capacity or fused.facts.max_tokens)


def divergence(yardstick: Path, lowered: ExportedGraph, shipped: ExportedGraph) -> float:
    """KL of the shipped graph from the yardstick on a page of the quickstart's prose, nats per token."""
    import numpy as np
    from tokenizers import Tokenizer

    from edgestill.runtime.backends.ort import OrtBackend
    from edgestill.runtime.score import forward_windows

    text = (QUICKSTART / "corpus" / "prose" / "alice-in-wonderland.txt").read_text(encoding="utf-8")[20_000:24_000]
    found = Tokenizer.from_file(str(QUICKSTART / "tokenizer" / "tokenizer.json")).encode(text).ids
    ids = np.array(found[:512]).reshape(4, 128)
    both = []
    for path, graph in ((yardstick, lowered.graph), (shipped.path, shipped.graph)):
        backend = OrtBackend(path, shipped.facts, graph, threads=1)
        logits = np.concatenate([chunk.copy() for _, chunk in forward_windows(backend, ids, path="prefill")], axis=1)
        log_p = logits - logits.max(-1, keepdims=True)
        both.append(log_p - np.log(np.exp(log_p).sum(-1, keepdims=True)))
    return float((np.exp(both[0]) * (both[0] - both[1])).sum(-1).mean())
