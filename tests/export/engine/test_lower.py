"""The graph of engines: every family in standard operators, step by step the logits of Optimum's own graph."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from tiny import write_model

from edgestill.export.engine.lower import lower
from edgestill.export.engine.make import describe_engine_graph, engine_facts
from edgestill.export.graph_io import load_graph, save_graph
from edgestill.export.nodes import add_constant
from edgestill.export.onnx_export import export_fused, export_onnx
from edgestill.export.ways import WAYS
from edgestill.runtime.backends.ort import OrtBackend
from edgestill.runtime.errors import BadInput

CAPACITY = 48
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma": {},
    "phi": {},
    "gpt2": {},
    "gpt_neox": {"width": 128},
}


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(checkpoint, plain graph, lowered graph) of a family."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_model(folder / "checkpoint", request.param, **FAMILIES[request.param])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = export_onnx(checkpoint, folder / "plain")
        fused, _ = export_fused(checkpoint, plain, folder / "fused")
    model = load_graph(fused.path)
    lower(model, CAPACITY)
    save_graph(model, folder / "model.onnx")
    return checkpoint, plain.path, folder / "model.onnx"


def test_standard_operators_only(exported: tuple[Path, Path, Path]) -> None:
    path = exported[2]
    onnx.checker.check_model(str(path), full_check=True)
    model = load_graph(path)
    assert {node.domain for node in model.graph} == {""} and dict(model.graph.opset_imports) == {"": 24}
    operators = [node.op_type for node in model.graph]
    assert operators.count("TensorScatter") == 4 and operators.count("Attention") == 2


def test_cache_inputs_and_outputs_are_of_one_fixed_shape(exported: tuple[Path, Path, Path]) -> None:
    graph = describe_engine_graph(exported[2])
    assert graph.cache == "fixed"
    inputs, outputs = ({spec.name: spec for spec in side} for side in (graph.inputs, graph.outputs))
    assert inputs.keys() - {n for n in inputs if n.startswith("past")} == {
        *("input_ids", "position_ids", "write_indices", "key_positions", "logit_positions")
    }
    for name, spec in inputs.items():
        if name.startswith("past_key_values."):
            assert (spec.shape[0], spec.shape[2]) == ("batch_size", CAPACITY)
            assert outputs[name.replace("past_key_values", "present")].shape == spec.shape
    assert outputs["logits"].shape[:2] == ("batch_size", "kept")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_running_it_gives_the_logits_of_the_plain_graph(
    way: str, exported: tuple[Path, Path, Path]
) -> None:
    from edgestill.export.model_facts import facts_of_checkpoint

    checkpoint, plain, path = exported
    ids = np.random.default_rng(0).integers(1, 300, (3, 21))
    session = onnxruntime.InferenceSession(str(plain), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(21), (3, 1))}
    feeds = {given.name: feeds[given.name] for given in session.get_inputs() if given.name in feeds}
    for given in session.get_inputs():
        if given.name.startswith("past"):
            feeds[given.name] = np.zeros((3, given.shape[1], 0, given.shape[3]), np.float32)
    wanted = session.run(["logits"], feeds)[0]
    backend = OrtBackend(
        path, engine_facts(facts_of_checkpoint(checkpoint), CAPACITY), describe_engine_graph(path), threads=1
    )
    compared = 0
    for window, start, logits in WAYS[way](backend, ids):
        np.testing.assert_allclose(logits, wanted[window, start : start + len(logits)], atol=5e-6)
        compared += len(logits)
    assert compared >= 21


def test_a_cache_in_one_buffer_is_what_a_cache_apart_gives(exported: tuple[Path, Path, Path]) -> None:
    """Past and present bound to the same memory, as on a GPU, against past and present apart."""
    session = onnxruntime.InferenceSession(str(exported[2]), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    feeds = {
        "input_ids": rng.integers(1, 300, (1, 3)),
        "position_ids": np.array([[4, 5, 6]]),
        "write_indices": np.array([4]),
        "key_positions": np.arange(16),
        "logit_positions": np.array([[2]]),
    }
    caches = {}
    for given in session.get_inputs():
        if given.name.startswith("past"):
            caches[given.name] = rng.standard_normal((1, *given.shape[1:])).astype(np.float32)
    apart = session.run(
        None, {k: v for k, v in {**feeds, **caches}.items() if k in {i.name for i in session.get_inputs()}}
    )
    binding = session.io_binding()
    for name, array in feeds.items():
        if name in {i.name for i in session.get_inputs()}:
            binding.bind_cpu_input(name, array)
    for name, array in caches.items():
        binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        present = name.replace("past_key_values", "present")
        binding.bind_output(present, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    names = [o.name for o in session.get_outputs()]
    np.testing.assert_array_equal(binding.get_outputs()[-1].numpy(), apart[names.index("logits")])
    for name, array in caches.items():
        np.testing.assert_array_equal(array, apart[names.index(name.replace("past_key_values", "present"))])


def test_what_has_no_standard_form_is_refused(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "checkpoint", "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = export_onnx(checkpoint, tmp_path / "plain")
        fused, _ = export_fused(checkpoint, plain, tmp_path / "fused")
    with pytest.raises(BadInput, match="needs attention as one operator, and this model's stayed plain"):
        lower(load_graph(plain.path), CAPACITY)
    model = load_graph(fused.path)
    head = next(value for value in model.graph.outputs if value.name == "logits").producer()
    assert head is not None
    scale = add_constant(model.graph, "scale", np.ones(1, np.float32))
    odd = ir.node("Mystery", [head.inputs[0], scale], domain="com.microsoft", name="odd")
    odd.outputs[0].shape, odd.outputs[0].type = head.inputs[0].shape, head.inputs[0].type
    model.graph.insert_before(head, odd)
    head.replace_input_with(0, odd.outputs[0])
    with pytest.raises(BadInput, match="Mystery 'odd' has no standard form for an engine; use engine onnxruntime-cpu"):
        lower(model, CAPACITY)
