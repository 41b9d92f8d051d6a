"""GPTQ and HQQ against round-to-nearest, a naive solver and torch; moments against torch hooks; keys against the graph."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from export_helpers import F32, Export, rtn4
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from edgestill.export.blockwise import BlockWeight, dequantize, quantize_int4
from edgestill.export.graph_io import load_graph
from edgestill.export.input_moments import (
    F64,
    input_moments,
    linear_layers,
    looked_up_moment,
    moment_groups,
    window_feeds,
)
from edgestill.export.linear_layers import Table, find_weights
from edgestill.export.nodes import add_constant, constant_array
from edgestill.export.post_training import by_values, gptq, hqq, matrix_names, quantize_weights
from edgestill.export.quantized_ops import product_node
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import Progress

SHAPES = [(64, 32), (128, 128), (100, 64), (48, 32), (33, 16), (100, 32)]
"""(inputs, block); the last four end with a part of a block."""
FAMILIES = ["llama", "gpt2", "gpt_neox"]
"""Tied head, Gemm with biases, untied head."""
TOKENS = np.random.default_rng(5).integers(1, 300, (4, 16))


def _weight(inputs: int, outputs: int = 12, seed: int = 0) -> F32:
    """Normal values with a zero column, a zero block, a column of one sign and an outlier."""
    weight = np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)
    weight[:, 0] = 0
    weight[:32, 1] = 0
    weight[:, 2] = np.abs(weight[:, 2])
    weight[3, 3] = 40
    return weight


def _moment(inputs: int, seed: int = 0) -> F64:
    """Of correlated inputs whose powers differ, as activations are."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((512, inputs)) @ (rng.standard_normal((inputs, inputs)) / np.arange(1, inputs + 1)[:, None])
    return x.T @ x / len(x)


def _output_error(weight: F32, shipped: F32, moment: F64) -> float:
    """E |x W - x W'|^2, summed over outputs."""
    difference = weight.astype(np.float64) - shipped
    return float(np.einsum("kn,kl,ln->", difference, moment, difference))


def _lp(weight: F32, shipped: F32) -> float:
    return float((np.abs(weight.astype(np.float64) - shipped) ** 0.7).sum())


def _same_within_inputs(ours: BlockWeight, theirs: BlockWeight) -> None:
    """Codes, scales and zero points byte for byte; the codes behind the last input are nobody's."""
    for block in (ours, theirs):
        assert block.packed.dtype == np.uint8
    codes = [
        np.stack([b.packed & 15, b.packed >> 4], axis=-1).reshape(b.outputs, -1)[:, : b.inputs] for b in (ours, theirs)
    ]
    assert np.array_equal(*codes)
    assert ours.packed.shape == theirs.packed.shape
    assert np.array_equal(ours.scales, theirs.scales)
    assert ours.scales.dtype == np.float32
    if theirs.zero_points is None:
        assert ours.zero_points is None
    else:
        assert ours.zero_points is not None
        assert np.array_equal(ours.zero_points, theirs.zero_points)
    assert (ours.bits, ours.block_size, ours.inputs) == (theirs.bits, theirs.block_size, theirs.inputs)


def _naive_gptq(weight: F32, moment: F64, block_size: int, symmetric: bool, damping: float) -> F32:
    """One input at a time: round it, then solve the normal equations of all inputs left for the best compensation.

    Within a block the least and the greatest weight keep their value, so that its scale stays, and the others stay between them.
    """
    hessian = moment + damping * np.diag(moment).mean() * np.eye(len(moment))
    work = weight.astype(np.float64)
    out = np.zeros_like(weight)
    for k in range(len(weight)):
        if k % block_size == 0:
            rows = work[k : k + block_size].astype(np.float32)
            least, most = rows.min(axis=0), rows.max(axis=0)
            low, high = np.minimum(least, 0), np.maximum(most, 0)
            extreme = rows[np.abs(rows).argmax(axis=0), np.arange(rows.shape[1])]
            scale = extreme / np.float32(-8) if symmetric else (high - low) / np.float32(15)
            divisor = np.where(scale == 0, np.float32(1), scale)
            zero = np.full(scale.shape, 8.0) if symmetric else np.floor(-low / divisor + 0.5)
        first = rows[k % block_size]
        kept = np.where((first == least) | (first == most), first, work[k].astype(np.float32).clip(least, most))
        codes = np.floor(kept * (np.float32(1) / divisor) + zero + 0.5).clip(0, 15)
        out[k] = np.where(scale == 0, 0, (codes - zero) * scale)
        left = slice(k + 1, len(weight))
        if k + 1 < len(weight):
            share = np.linalg.solve(hessian[left, left], hessian[left, k])
            work[left] -= np.outer(share, out[k] - work[k])
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "block"), SHAPES)
@pytest.mark.parametrize("power", [0.0, 1.0, 3e-7, 2e5])
def test_gptq_of_independent_inputs_is_round_to_nearest(inputs: int, block: int, symmetric: bool, power: float) -> None:
    weight = _weight(inputs)
    _same_within_inputs(gptq(weight, power * np.eye(inputs), block, symmetric), quantize_int4(weight, block, symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "block"), SHAPES)
def test_gptq_equals_the_naive_solver(inputs: int, block: int, symmetric: bool) -> None:
    weight, moment = _weight(inputs), _moment(inputs)
    ours = dequantize(gptq(weight, moment, block, symmetric, damping=0.02))
    naive = _naive_gptq(weight, moment, block, symmetric, damping=0.02)
    np.testing.assert_allclose(ours, naive, rtol=2e-6, atol=0)
    assert not np.array_equal(ours, rtn4(weight, block, symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_gptq_has_less_output_error_than_round_to_nearest(seed: int, symmetric: bool) -> None:
    weight, moment = _weight(100, seed=seed), _moment(100, seed=seed + 50)
    ours = _output_error(weight, dequantize(gptq(weight, moment, 32, symmetric)), moment)
    assert ours < 0.2 * _output_error(weight, rtn4(weight, 32, symmetric), moment)  # measured: 0.01 to 0.05


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_rounds_dead_inputs_to_nearest_and_keeps_zeros(symmetric: bool) -> None:
    weight, moment = _weight(64), _moment(64)
    dead = np.r_[5, 32:64]
    moment[dead] = 0
    moment[:, dead] = 0
    shipped = dequantize(gptq(weight, moment, 32, symmetric))
    assert np.array_equal(shipped[32:], rtn4(weight, 32, symmetric)[32:])
    assert not np.array_equal(shipped[:32], rtn4(weight, 32, symmetric)[:32])
    assert not shipped[:, 0].any()
    assert not dequantize(gptq(np.zeros_like(weight), moment, 32, symmetric)).any()


def test_gptq_refuses_what_is_no_moment() -> None:
    weight = _weight(32)
    with pytest.raises(ValueError, match="shape"):
        gptq(weight, np.eye(31), 32, True)
    with pytest.raises(ValueError, match="damping"):
        gptq(weight, np.eye(32), 32, True, damping=0.0)
    with pytest.raises(torch.linalg.LinAlgError):
        gptq(weight, _moment(32) - 9 * np.eye(32), 32, True)
    with pytest.raises((ValueError, torch.linalg.LinAlgError)):
        gptq(weight, np.full((32, 32), np.nan), 32, True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "block"), SHAPES)
def test_hqq_is_no_worse_than_round_to_nearest_in_any_block(inputs: int, block: int, symmetric: bool) -> None:
    weight = _weight(inputs)
    shipped, nearest = dequantize(hqq(weight, block, symmetric)), rtn4(weight, block, symmetric)
    for n in range(weight.shape[1]):
        for k in range(0, inputs, block):
            part = np.s_[k : k + block, n : n + 1]
            assert _lp(weight[part], shipped[part]) <= _lp(weight[part], nearest[part])
    assert not shipped[:, 0].any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 128])
def test_hqq_gains_on_normal_and_on_heavy_tails(block: int, symmetric: bool) -> None:
    rng = np.random.default_rng(1)
    for weight in (rng.standard_normal((256, 64)), rng.standard_t(4, (256, 64))):
        weight = weight.astype(np.float32) * np.float32(0.02)
        shipped, nearest = dequantize(hqq(weight, block, symmetric)), rtn4(weight, block, symmetric)
        assert _lp(weight, shipped) < 0.99 * _lp(weight, nearest)  # measured: 0.94 to 0.984


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_does_not_depend_on_the_unit_of_the_weight(symmetric: bool) -> None:
    weight = _weight(100)
    once, large = hqq(weight, 32, symmetric), hqq(weight * np.float32(2**12), 32, symmetric)
    assert np.array_equal(once.packed, large.packed)
    assert np.array_equal(once.scales * np.float32(2**12), large.scales)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_on_the_grid_stays_there(symmetric: bool) -> None:
    weight = rtn4(_weight(64), 32, True)
    _same_within_inputs(hqq(weight, 32, symmetric=True), quantize_int4(weight, 32, True))
    codes = np.random.default_rng(0).integers(0, 16, (64, 5))
    codes[[0, 1, 32, 33]] = [[0], [15], [0], [15]]
    full = ((codes - 7) * 0.25).astype(np.float32) if not symmetric else weight
    assert np.array_equal(dequantize(gptq(full, _moment(64), 32, symmetric)), full)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "block"), SHAPES)
@pytest.mark.parametrize("method", ["gptq", "hqq"])
def test_onnxruntime_multiplies_exactly_the_dequantized_weight(
    method: str, inputs: int, block: int, symmetric: bool
) -> None:
    weight = _weight(inputs)
    made = gptq(weight, _moment(inputs), block, symmetric) if method == "gptq" else hqq(weight, block, symmetric)
    x = ir.Value(name="x", shape=ir.Shape([inputs, inputs]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 18, "com.microsoft": 1}, name="g")
    arrays: list[tuple[str, npt.NDArray[Any]]] = [("codes", made.packed), ("scales", made.scales)]
    if made.zero_points is not None:
        arrays.append(("zeros", made.zero_points))
    node = product_node(x, made, [add_constant(graph, name, array) for name, array in arrays], 0, "product")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    proto = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"x": np.eye(inputs, dtype=np.float32)})[0], dequantize(made))


def _torch_moments(checkpoint: Path) -> list[tuple[F32, F64]]:
    """([K, N], mean of x x') of each linear module of the checkpoint over TOKENS, by hooks."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    modules = [m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    rows: dict[int, list[torch.Tensor]] = {id(m): [] for m in modules}
    for module in modules:
        module.register_forward_pre_hook(lambda m, args: rows[id(m)].append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        model(torch.from_numpy(TOKENS), use_cache=False)
    found = []
    for module in modules:
        x = torch.cat(rows[id(module)]).numpy()
        weight = module.weight.detach().numpy()
        found.append((weight if isinstance(module, Conv1D) else weight.T, x.T @ x / len(x)))
    return found


def _matrices(path: Path) -> dict[str, F32]:
    layers = linear_layers(load_graph(path).graph)
    arrays = {name: (constant_array(own[0].weight), own[0].transposed) for name, own in layers.items()}
    return {name: array.T if transposed else array for name, (array, transposed) in arrays.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_torch_modules(family: str, exported: Export) -> None:
    checkpoint, export = exported(family)
    theirs = _torch_moments(checkpoint)
    matrices = _matrices(export.path)
    assert matrix_names(export.path) == tuple(matrices)
    ours = input_moments(export.path, window_feeds(export.graph, TOKENS), list(matrices))
    assert len(ours) == len(theirs)
    for weight, moment in theirs:
        name = next(n for n, matrix in matrices.items() if np.array_equal(matrix, weight))
        assert ours[name].dtype == np.float64
        np.testing.assert_allclose(ours[name], moment, rtol=0, atol=1e-5 * np.diag(moment).max())
    assert len({id(moment) for moment in ours.values()}) == 2 * 4 + 1  # q, k and v share theirs, as gate and up do


def test_groups_hold_what_fits(exported: Export) -> None:
    path = exported("llama")[1].path
    layers = linear_layers(load_graph(path).graph)
    own = {name: 8 * len(matrix) ** 2 for name, matrix in _matrices(path).items()}
    assert moment_groups(layers) == [list(layers)]
    assert moment_groups(layers, 0) == [[name] for name in layers]
    limit = 8 * 64**2 + 8 * 96**2
    groups = moment_groups(layers, limit)
    assert [name for group in groups for name in group] == list(layers)
    assert 1 < len(groups) < len(layers)
    for group in groups:
        distinct = {str(layers[name][0].node.inputs[0].name): own[name] for name in group}  # type: ignore[union-attr]
        assert sum(distinct.values()) <= limit


@pytest.mark.parametrize("method", ["gptq", "hqq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_weight_of_a_graph_gets_its_blocks(family: str, method: Any, exported: Export) -> None:
    checkpoint, export = exported(family)
    precision = PrecisionSpec(block_size=32, symmetric=family == "llama")
    stream = io.StringIO()
    with Progress(stream).task(method, len(matrix_names(export.path)), "weights") as task:
        blocks = quantize_weights(export.path, precision, method, window_feeds(export.graph, TOKENS), task)
    assert task.done == len(blocks)
    assert f"{len(blocks)} weights" in stream.getvalue()

    matrices = _matrices(export.path)
    assert list(blocks) == list(matrices)
    tables = {str(w.weight.name) for w in find_weights(load_graph(export.path).graph) if isinstance(w, Table)}
    assert bool(tables & set(blocks)) == (family != "gpt_neox")  # tied to the head in the others
    for weight, moment in _torch_moments(checkpoint):
        name = next(n for n, matrix in matrices.items() if np.array_equal(matrix, weight))
        shipped, nearest = dequantize(blocks[name]), rtn4(weight, 32, precision.symmetric)
        if method == "gptq":
            assert _output_error(weight, shipped, moment) < _output_error(weight, nearest, moment)
        else:
            assert _lp(weight, shipped) < _lp(weight, nearest)


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_minds_what_an_embedding_is_looked_up_for(family: str, exported: Export) -> None:
    """With the moment of lookups a tied matrix costs less as a table, and one of its own is there and better than rounded."""
    checkpoint, export = exported(family)
    felt = looked_up_moment(checkpoint, TOKENS)
    feeds = list(window_feeds(export.graph, TOKENS))
    blind = quantize_weights(export.path, PrecisionSpec(), "gptq", feeds)
    minding = quantize_weights(export.path, PrecisionSpec(), "gptq", feeds, looked_up=felt)
    tables = {
        str(w.weight.name): np.ascontiguousarray(constant_array(w.weight).T)
        for w in find_weights(load_graph(export.path).graph)
        if isinstance(w, Table)
    }
    assert tables and set(minding) == set(blind) | set(tables)
    given = by_values(export.path, minding)
    for name, matrix in tables.items():
        before = dequantize(blind[name]) if name in blind else rtn4(matrix, 32, True)
        assert _output_error(matrix, dequantize(minding[name]), felt) < _output_error(matrix, before, felt)
        assert given(name, matrix) is minding[name]
    for name in blind.keys() - tables.keys():
        assert np.array_equal(blind[name].packed, minding[name].packed)


def test_groups_change_no_byte(exported: Export) -> None:
    _, export = exported("llama")
    feeds = list(window_feeds(export.graph, TOKENS))
    together = quantize_weights(export.path, PrecisionSpec(), "gptq", feeds)
    apart = quantize_weights(export.path, PrecisionSpec(), "gptq", iter(feeds), moment_bytes=4 * 8 * 64**2)
    for name, block in together.items():
        assert np.array_equal(block.packed, apart[name].packed)
        assert np.array_equal(block.scales, apart[name].scales)


def _toy(folder: Path, nodes: list[onnx.NodeProto], **constants: F32) -> Path:
    """A graph from x float [n, 8] to y."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, folder / "toy.onnx")
    return folder / "toy.onnx"


def test_a_weight_used_twice_pools_its_inputs(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    path = _toy(tmp_path, nodes, w=w)
    x = np.random.default_rng(1).standard_normal((2, 5, 8)).astype(np.float32)
    moments = input_moments(path, [{"x": batch} for batch in x], ["w"])
    rows = np.concatenate([x.reshape(-1, 8), x.reshape(-1, 8) @ w]).astype(np.float64)
    np.testing.assert_allclose(moments["w"], rows.T @ rows / len(rows), rtol=0, atol=1e-5)


def test_calibration_refuses_what_it_cannot_use(tmp_path: Path, exported: Export) -> None:
    _, export = exported("llama")
    with pytest.raises(BadInput, match="at least one window"):
        quantize_weights(export.path, PrecisionSpec(), "gptq", [])
    with pytest.raises(BadInput, match="int4"):
        quantize_weights(export.path, PrecisionSpec(weights="int8"), "hqq", [])
    with pytest.raises(BadInput, match="no linear layer with the weight 'nobody'"):
        input_moments(export.path, window_feeds(export.graph, TOKENS), ["nobody"])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = _toy(tmp_path, nodes, w=np.eye(8, dtype=np.float32))
    with pytest.raises(BadInput, match="not finite"):
        input_moments(path, [{"x": np.full((1, 8), np.inf, np.float32)}], ["w"])


def test_a_weight_read_both_ways_has_no_one_set_of_blocks(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "wt"], ["y"]),
    ]
    path = _toy(tmp_path, nodes, w=np.eye(8, dtype=np.float32))
    with pytest.raises(BadInput, match="both as stored and transposed"):
        quantize_weights(path, PrecisionSpec(), "hqq", [])
