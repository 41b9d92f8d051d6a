"""Whole graphs of every family: nothing linear stays float32, and what ships is the checkpoint's weight rounded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from export_helpers import F32, Export, rtn4, rtn8
from onnx import numpy_helper
from tiny import SIZES, write_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from edgestill.export.onnx_export import export_onnx
from edgestill.export.parity import ort_logits
from edgestill.export.quantize import QuantizationReport, dequantize_graph, graph_bytes, quantize_graph
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.errors import BadInput

SPECS = {
    "int4": PrecisionSpec(weights="int4"),
    "int4 asymmetric": PrecisionSpec(weights="int4", symmetric=False, accuracy_level=0),
    "int8": PrecisionSpec(weights="int8", block_size=64),
}
FLOOR_DB = {"int4": 19.0, "int4 asymmetric": 20.0, "int8": 40.0}
"""Measured on random normal weights: 20.8, 21.5 and 43.8 dB at the least."""


def _rounded(weight: F32, precision: str) -> F32:
    """[K, N] as it should ship, by the independent quantizer of test_blockwise."""
    if precision == "int8":
        return rtn8(weight)
    return rtn4(weight, SPECS[precision].block_size, SPECS[precision].symmetric)


def _linear_weights(checkpoint: Path) -> list[F32]:
    """[K, N] of every linear module of the checkpoint, by torch."""
    found = []
    for module in AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).modules():
        if isinstance(module, torch.nn.Linear):
            found.append(module.weight.detach().numpy().T)
        elif isinstance(module, Conv1D):
            found.append(module.weight.detach().numpy())
    return found


def _quantize(exported: Export, family: str, precision: str, folder: Path) -> tuple[Path, QuantizationReport]:
    _, export = exported(family)
    report = quantize_graph(export.path, folder / "model.onnx", SPECS[precision])
    return folder / "model.onnx", report


def _constants(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    return {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("precision", SPECS)
@pytest.mark.parametrize("family", SIZES)
def test_every_linear_layer_ships_as_the_rounded_checkpoint(
    family: str, precision: str, exported: Export, tmp_path: Path
) -> None:
    checkpoint, _ = exported(family)
    path, report = _quantize(exported, family, precision, tmp_path)
    theirs = [_rounded(weight, precision) for weight in _linear_weights(checkpoint)]

    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("MatMulNBits") == len(theirs)
    assert "Gemm" not in operators
    dequantize_graph(path, tmp_path / "float.onnx")
    constants = _constants(tmp_path / "float.onnx")
    products = [node for node in onnx.load(tmp_path / "float.onnx").graph.node if node.op_type == "MatMul"]
    ours = [constants[node.input[1]] for node in products if node.input[1] in constants]
    assert len(ours) == len(theirs)
    for weight in theirs:  # each is found once; -0 equals 0
        match = next(i for i, other in enumerate(ours) if np.array_equal(other, weight))
        ours.pop(match)
    assert min(node.sqnr_db or 0 for node in report.quantized) >= FLOOR_DB[precision]


@pytest.mark.parametrize("precision", SPECS)
@pytest.mark.parametrize("family", SIZES)
def test_no_float_matrix_is_left_but_the_position_table(
    family: str, precision: str, exported: Export, tmp_path: Path
) -> None:
    path, report = _quantize(exported, family, precision, tmp_path)
    floats = [
        name
        for name, array in _constants(path).items()
        if array.dtype == np.float32 and array.ndim > 1 and min(array.shape) > 1 and "scales" not in name
    ]
    assert floats == (["transformer.wpe.weight"] if family == "gpt2" else [])
    assert [(node.operator, node.shape) for node in report.left_float] == (
        [("Gather", (128, 64))] if family == "gpt2" else []
    )
    assert all("table of positions" in node.reason for node in report.left_float)


@pytest.mark.parametrize("precision", SPECS)
def test_the_embedding_is_looked_up_in_the_matrix_of_the_tied_head(
    precision: str, exported: Export, tmp_path: Path
) -> None:
    checkpoint, _ = exported("llama")
    path, report = _quantize(exported, "llama", precision, tmp_path)
    graph = onnx.load(path).graph
    (lookup,) = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    (reshape,) = [node for node in graph.node if lookup.input[0] in node.output]
    (head,) = [node for node in graph.node if node.output[0] == "logits"]
    assert (head.input[1], head.input[2]) == (reshape.input[0], lookup.input[2])
    assert sum(320 * 64 // 2 <= i.ByteSize() < 320 * 64 * 2 for i in graph.initializer) == 1

    table = AutoModelForCausalLM.from_pretrained(checkpoint).get_input_embeddings().weight.detach().numpy()
    rows = _rounded(table.T, precision).T
    dequantize_graph(path, tmp_path / "float.onnx")
    (ours,) = [array for name, array in _constants(tmp_path / "float.onnx").items() if array.shape == table.shape]
    assert np.array_equal(ours, rows)
    assert {node.operator for node in report.quantized} == {"MatMul", "Gather"}


def test_widths_that_no_block_divides(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "checkpoint", width=48)
    export = export_onnx(checkpoint, tmp_path / "onnx")
    path = tmp_path / "model.onnx"
    report = quantize_graph(export.path, path, PrecisionSpec(accuracy_level=0))
    assert report.left_float == ()
    dequantize_graph(path, tmp_path / "float.onnx")
    ids = np.arange(1, 25).reshape(2, 12)
    theirs = ort_logits(tmp_path / "float.onnx", export.facts, export.graph, ids)
    np.testing.assert_allclose(ort_logits(path, export.facts, export.graph, ids), theirs, rtol=0, atol=1e-5)
    table = AutoModelForCausalLM.from_pretrained(checkpoint).get_input_embeddings().weight.detach().numpy()
    (ours,) = [array for array in _constants(tmp_path / "float.onnx").values() if array.shape == (320, 64)]
    assert np.array_equal(ours[:, :48], rtn4(table.T, 32, symmetric=True).T)
    graph = onnx.load(path).graph
    codes = 320 * 64 // 2  # head and table share them, padding included
    assert sum(numpy_helper.to_array(i).nbytes == codes for i in graph.initializer) == 1


def test_accuracy_level_is_written_where_it_is_not_the_default(exported: Export, tmp_path: Path) -> None:
    def levels(path: Path) -> set[int | None]:
        nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
        return {next((a.i for a in node.attribute if a.name == "accuracy_level"), None) for node in nodes}

    assert levels(_quantize(exported, "llama", "int4", tmp_path)[0]) == {4}
    assert levels(_quantize(exported, "llama", "int4 asymmetric", tmp_path)[0]) == {None}


def test_effective_bits_count_the_whole_file(exported: Export, tmp_path: Path) -> None:
    path, report = _quantize(exported, "llama", "int4", tmp_path)
    assert report.graph_bytes == graph_bytes(path) == path.stat().st_size
    assert QuantizationReport((), (), 1_000_000).bits_per_weight(2_000_000) == 4.0
    (tmp_path / "model.onnx.data").write_bytes(b"0123456789")
    assert graph_bytes(path) == path.stat().st_size + 10


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (PrecisionSpec(weights="float32"), "float32 has no blocks"),
        (PrecisionSpec(weights="float16"), "float16 has no blocks"),
        (PrecisionSpec(weights="int8", symmetric=False), "int8 has no zero point"),
    ],
)
def test_precisions_without_integer_blocks_are_refused(
    precision: PrecisionSpec, message: str, exported: Export, tmp_path: Path
) -> None:
    _, export = exported("llama")
    with pytest.raises(BadInput, match=message):
        quantize_graph(export.path, tmp_path / "model.onnx", precision)
    assert list(tmp_path.iterdir()) == []
