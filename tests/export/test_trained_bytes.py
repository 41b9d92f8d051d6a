"""A student that learnt on a grid ships the bytes it learnt with: in the file, under the operator, and in every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from tiny import write_model
from transformers import AutoModelForCausalLM

from edgestill.compress.quantize.fake_quant import FakeQuant
from edgestill.compress.quantize.shipped import ShippedWeights, load_shipped_student
from edgestill.export import stored
from edgestill.export.onnx_export import ExportedGraph, export_fused, export_onnx
from edgestill.export.parity import ort_logits
from edgestill.export.quantize import dequantize_graph, quantize_graph
from edgestill.export.rewrite.rules import join_weights
from edgestill.export.trained import NOT_TRAINED, trained_weights, why_not
from edgestill.profiles.schema import PrecisionSpec, QuantizeSpec
from edgestill.runtime.backends.ort import OrtBackend
from edgestill.runtime.errors import BadInput

Array = npt.NDArray[Any]
STEPS = 256
SPECS: dict[str, dict[str, Any]] = {
    "int4": {"scheme": "int4"},
    "int4 asymmetric": {"scheme": "int4", "symmetric": False, "block_size": 16},
    "int8": {"scheme": "int8"},
    "nf4": {"scheme": "nf4"},
    "fp4": {"scheme": "fp4"},
}
OPERATOR = {"int4": "MatMulNBits", "int8": "MatMulNBits", "nf4": "MatMulBnb4", "fp4": "MatMulBnb4"}


def spec_of(name: str) -> tuple[QuantizeSpec, PrecisionSpec]:
    words = SPECS[name]
    precision = {key: value for key, value in words.items() if key != "scheme"}
    return QuantizeSpec(**words), PrecisionSpec(weights=words["scheme"], accuracy_level=0, **precision)


class Trained:
    """A checkpoint with bytes beside it, its export, and the student as training left it, weights on the grid."""

    def __init__(self, folder: Path, name: str, family: str) -> None:
        self.checkpoint = write_model(folder / "checkpoint", family, max_tokens=STEPS + 4)
        self.student: Any = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32).eval()
        self.spec, self.precision = spec_of(name)
        fake = FakeQuant(self.spec, self.student)
        state = {n: p.detach() for n, p in self.student.named_parameters()}
        self.shipped = ShippedWeights.of(self.spec, fake.encoded(state))
        self.shipped.save(self.checkpoint)
        self.export: ExportedGraph = export_onnx(self.checkpoint, folder / "onnx")
        self.path = folder / "quantized" / "model.onnx"
        given = trained_weights(self.checkpoint, self.precision)
        self.report = quantize_graph(self.export.path, self.path, self.precision, given=given)

    def values(self) -> list[Array]:
        """[K, N] of every linear layer, as the student multiplies it."""
        layers = [m for m in self.student.modules() if hasattr(m, "_edgestill_weight")]
        matrices = []
        for module in layers:
            weight = module.weight.detach().numpy()
            matrices.append(weight if type(module).__name__ == "Conv1D" else weight.T)
        return matrices


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[tuple[str, str], Trained] = {}

    def make(name: str, family: str = "llama") -> Trained:
        if (name, family) not in known:
            known[name, family] = Trained(tmp_path_factory.mktemp("trained"), name, family)
        return known[name, family]

    return make


def session(model: onnx.ModelProto, level: int = 0) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def products(path: Path, kind: str, level: int = 0) -> list[Array]:
    """What each product of the file makes of the identity matrix, [K, N]: each node alone, with its own constants.

    `kind`: the operator; "MatMul" stands for one whose weight comes from a DequantizeLinear.
    """
    model = onnx.load(path)
    constants = {i.name: i for i in model.graph.initializer}
    dequantized = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    found = []
    for node in model.graph.node:
        if node.op_type != kind or (kind == "MatMul" and node.input[1] not in dequantized):
            continue
        if kind == "MatMul":
            nodes = [dequantized[node.input[1]], node]
            inputs = numpy_helper.to_array(constants[nodes[0].input[0]]).shape[0]
        else:
            nodes, inputs = [node], next(a.i for a in node.attribute if a.name == "K")
        used = [constants[name] for one in nodes for name in one.input if name in constants]
        feed = helper.make_tensor_value_info(node.input[0], onnx.TensorProto.FLOAT, [inputs, inputs])
        out = helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
        graph = helper.make_graph(nodes, "one", [feed], [out], initializer=used)
        alone = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
        found.append(session(alone, level).run(None, {node.input[0]: np.eye(inputs, dtype=np.float32)})[0])
    return found


def assert_same_set(ours: list[Array], theirs: list[Array]) -> None:
    """Each matrix is found once, equal in value."""
    assert len(ours) == len(theirs)
    left = list(ours)
    for matrix in theirs:
        left.pop(next(i for i, other in enumerate(left) if np.array_equal(other, matrix)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", SPECS)
def test_the_identity_through_the_operator_is_the_trained_weight(name: str, family: str, trained: Any) -> None:
    case = trained(name, family)
    table = case.student.get_input_embeddings()
    ours = products(case.path, OPERATOR[case.spec.scheme])
    theirs = case.values()
    if table.weight.shape[0] == case.student.get_output_embeddings().weight.shape[0]:  # tied: the head is the product
        theirs = [m for i, m in enumerate(theirs) if i != 0]
    assert_same_set(ours, theirs)


@pytest.mark.parametrize("name", SPECS)
def test_packed_bytes_and_scales_in_the_file_are_the_trained_ones(name: str, trained: Any) -> None:
    case = trained(name)
    constants = {i.name: numpy_helper.to_array(i) for i in onnx.load(case.path).graph.initializer}
    codes = [a for n, a in constants.items() if n.endswith("_codes")]
    scales = [a for n, a in constants.items() if n.endswith("_scales")]
    assert len(codes) == len(case.shipped.arrays)
    for arrays in case.shipped.arrays.values():
        if case.spec.scheme == "int8":  # the kernel's layout: unsigned, a scale per block
            trained_codes, trained_scale = arrays["codes"].numpy(), arrays["scales"].numpy()
            wide = [c for c in codes if c.reshape(len(c), -1).shape == trained_codes.shape]
            assert any(
                np.array_equal(c.reshape(trained_codes.shape).astype(np.int16) - 128, trained_codes) for c in wide
            )
            assert any(len(s) == len(trained_scale) and (s == trained_scale[:, None]).all() for s in scales)
        else:
            assert any(c.tobytes() == arrays["codes"].numpy().tobytes() for c in codes)
            assert any(s.tobytes() == arrays["scales"].numpy().tobytes() for s in scales)


@pytest.mark.parametrize("name", ["int4", "int4 asymmetric", "int8"])
def test_the_standard_form_multiplies_the_same_weights(name: str, trained: Any, tmp_path: Path) -> None:
    case = trained(name)
    given = trained_weights(case.checkpoint, case.precision)
    quantize_graph(case.export.path, tmp_path / "model.onnx", case.precision, given=given, standard=True)
    model = onnx.load(tmp_path / "model.onnx")
    assert all(node.domain == "" for node in model.graph.node)
    assert_same_set(products(tmp_path / "model.onnx", "MatMul"), case.values()[1:])
    ids = np.arange(1, 25).reshape(2, 12)
    dequantize_graph(tmp_path / "model.onnx", tmp_path / "float.onnx")
    theirs = ort_logits(tmp_path / "float.onnx", case.export.facts, case.export.graph, ids)
    np.testing.assert_allclose(
        ort_logits(case.path, case.export.facts, case.export.graph, ids),
        theirs,
        rtol=0,
        atol=1e-5 * np.abs(theirs).max(),
    )


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_level_4_stays_near_on_the_weights(name: str, trained: Any, tmp_path: Path) -> None:
    case = trained(name)
    level4 = case.precision.model_copy(update={"accuracy_level": 4})
    quantize_graph(case.export.path, tmp_path / "model.onnx", level4, given=trained_weights(case.checkpoint, level4))
    ours, theirs = products(tmp_path / "model.onnx", "MatMulNBits"), products(case.path, "MatMulNBits")
    for one, other in zip(ours, theirs, strict=True):
        noise = float(np.square(one - other).sum())
        assert noise == 0 or 10 * np.log10(float(np.square(other).sum()) / noise) >= 40


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("name", SPECS)
def test_logits_are_those_of_the_trained_forward_and_so_is_every_greedy_token(
    name: str, family: str, trained: Any
) -> None:
    case = trained(name, family)
    assert_as_trained(case, case.path, case.export)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["int4", "int8", "nf4"])
def test_so_are_those_of_the_graph_that_ships(name: str, family: str, trained: Any, tmp_path: Path) -> None:
    """Attention fused with its cache, weights joined last."""
    case = trained(name, family)
    fused, _ = export_fused(case.checkpoint, case.export, tmp_path / "fused")
    path = tmp_path / "model.onnx"
    quantize_graph(fused.path, path, case.precision, given=trained_weights(case.checkpoint, case.precision))
    join_weights(path)
    assert fused.graph.cache == "shared"
    assert_as_trained(case, path, fused)


def assert_as_trained(case: Trained, path: Path, exported: ExportedGraph) -> None:
    """Logits within 1e-5, and 256 greedy tokens through the cache, of the student as it was trained."""
    facts, graph = exported.facts, exported.graph
    ids = np.random.default_rng(0).integers(1, 263, (2, 24))
    with torch.no_grad():
        theirs = case.student(torch.from_numpy(ids)).logits.numpy()
        again = load_shipped_student(case.checkpoint)(torch.from_numpy(ids)).logits.numpy()
    assert np.array_equal(theirs, again)
    ours = ort_logits(path, facts, graph, ids)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    with torch.no_grad():
        expected = case.student.generate(
            torch.from_numpy(ids[:1, :4]),
            do_sample=False,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            pad_token_id=0,
            bad_words_ids=[[0]],
        )[0, 4:].tolist()
    backend = OrtBackend(path, facts, graph)
    state, token, found = backend.new_state(1, STEPS + 4), ids[:1, :4].astype(np.int64), []
    for _ in range(STEPS):
        logits = backend.step(state, token)[0, -1].copy()
        logits[0] = -np.inf
        found.append(int(logits.argmax()))
        token = np.array([[found[-1]]], np.int64)
    assert found == expected


def test_what_was_left_off_the_grid_stays_float(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "checkpoint")
    student = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    spec = QuantizeSpec(scheme="int4", embeddings=False, head=False)
    fake = FakeQuant(spec, student)
    ShippedWeights.of(spec, fake.encoded({n: p.detach() for n, p in student.named_parameters()})).save(checkpoint)
    export = export_onnx(checkpoint, tmp_path / "onnx")
    precision = PrecisionSpec(weights="int4")
    given = trained_weights(checkpoint, precision)
    report = quantize_graph(export.path, tmp_path / "model.onnx", precision, given=given)
    assert [(n.operator, n.reason) for n in report.left_float] == [("Gather", NOT_TRAINED), ("MatMul", NOT_TRAINED)]


def test_a_table_that_cannot_be_looked_up_in_codes_keeps_the_trained_values(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows stay float32, but they are the rows that the student was trained with."""
    case = trained("int4")
    monkeypatch.setattr(stored, "lookup_runs", lambda *_: False)
    given = trained_weights(case.checkpoint, case.precision)
    report = quantize_graph(case.export.path, tmp_path / "model.onnx", case.precision, given=given)
    assert [node.operator for node in report.left_float] == ["Gather"]
    ids = torch.arange(1, 13).view(1, -1)
    with torch.no_grad():
        expected = load_shipped_student(case.checkpoint)(ids).logits.numpy()
    facts, graph = case.export.facts, case.export.graph
    backend = OrtBackend(tmp_path / "model.onnx", facts, graph)
    ours = backend.step(backend.new_state(1, 12), ids.numpy().astype(np.int64))
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


def test_trained_bytes_that_the_graph_has_not_are_no_silent_loss(trained: Any, tmp_path: Path) -> None:
    """The float weights beside the bytes are others than those that were exported."""
    case = trained("int4")
    other = write_model(tmp_path / "other", seed=5, max_tokens=STEPS + 4)
    case.shipped.save(other)
    given = trained_weights(other, case.precision)
    with pytest.raises(BadInput, match=r"\d+ of \d+ weights that were trained on a grid are not in this graph"):
        quantize_graph(case.export.path, tmp_path / "model.onnx", case.precision, given=given)
    assert not (tmp_path / "model.onnx").exists()


def test_another_grid_is_not_copied(trained: Any) -> None:
    case = trained("int4")
    for words, why in {
        "int8": "weights int4, and the profile wants int8",
        "block": "block_size 32, and the profile wants 64",
        "zero": "symmetric True, and the profile wants False",
    }.items():
        precision = {
            "int8": PrecisionSpec(weights="int8"),
            "block": PrecisionSpec(weights="int4", block_size=64),
            "zero": PrecisionSpec(weights="int4", symmetric=False),
        }[words]
        assert why in (why_not(case.shipped, precision) or "")
        assert trained_weights(case.checkpoint, precision) is None
    assert trained_weights(write_model(case.checkpoint.parent / "plain"), case.precision) is None
