"""Graph files: weights outside the file, crafted names, interrupted writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from export_helpers import Export
from onnx import TensorProto, helper

from edgestill.export.graph_io import copy_graph, external_files, load_graph, save_graph, validate_graph
from edgestill.export.parity import ort_logits
from edgestill.runtime.errors import BadInput

WEIGHT = np.arange(64, dtype=np.float32).reshape(8, 8)


def _graph_with_location(folder: Path, location: str) -> Path:
    """y = x W with W said to lie in the file `location`."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8, 8], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    path = folder / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def test_large_weights_lie_beside_the_graph_and_compute_the_same(exported: Export, tmp_path: Path) -> None:
    _, export = exported("qwen2")
    path = tmp_path / "model.onnx"
    save_graph(load_graph(export.path), path, external_over_bytes=1000)
    assert external_files(path) == ("model.onnx.data",)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    validate_graph(path)
    ids = np.arange(1, 25).reshape(2, 12)
    theirs = ort_logits(export.path, export.facts, export.graph, ids)
    assert np.array_equal(ort_logits(path, export.facts, export.graph, ids), theirs)
    copy_graph(path, tmp_path / "copy" / "model.onnx")
    assert np.array_equal(ort_logits(tmp_path / "copy" / "model.onnx", export.facts, export.graph, ids), theirs)


def test_a_graph_that_became_small_leaves_no_data_behind(exported: Export, tmp_path: Path) -> None:
    _, export = exported("llama")
    path = tmp_path / "model.onnx"
    save_graph(load_graph(export.path), path, external_over_bytes=1000)
    save_graph(load_graph(export.path), path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert external_files(path) == ()


def test_a_plain_file_beside_the_graph_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(WEIGHT.tobytes())
    model = load_graph(_graph_with_location(tmp_path, "weights.bin"))
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    assert np.array_equal(tensor.numpy(), WEIGHT)


@pytest.mark.parametrize(
    "location", ["../secret.bin", "sub/secret.bin", "..", "..\\secret.bin", "absent.bin", "link.bin", "sub"]
)
def test_external_data_elsewhere_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "secret.bin").write_bytes(WEIGHT.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(BadInput, match="plain file beside it"):
        load_graph(_graph_with_location(folder, location))


def test_an_absolute_location_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())
    with pytest.raises(BadInput):
        load_graph(_graph_with_location(tmp_path, os.fspath(tmp_path / "secret.bin")))


def test_files_that_are_no_graph_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        load_graph(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(BadInput, match="not a readable ONNX file"):
        load_graph(tmp_path / "model.onnx")


def test_validate_refuses_a_graph_whose_shapes_disagree(exported: Export, tmp_path: Path) -> None:
    _, export = exported("llama")
    model = onnx.load(export.path)
    weight = next(i for i in model.graph.initializer if list(i.dims) == [64, 32])
    weight.CopyFrom(onnx.numpy_helper.from_array(np.zeros((63, 32), np.float32), weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BadInput, match="not a graph that runs"):
        validate_graph(tmp_path / "model.onnx")


def test_a_full_disk_leaves_the_old_graph(exported: Export, tmp_path: Path) -> None:
    _, export = exported("llama")
    old = tmp_path / "model.onnx"
    old.write_bytes(b"old")
    script = (
        "import resource, sys; from pathlib import Path; from edgestill.export.graph_io import load_graph, save_graph\n"
        "model = load_graph(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n    save_graph(model, Path(sys.argv[2]))\nexcept OSError as full:\n    print('errno', full.errno)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, export.path, old], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("errno"), run.stderr
    assert old.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_equal_weights_stand_outside_once_and_come_back_inside(tmp_path: Path) -> None:
    """Two initializers of one content, in two shapes; then the same graph as one file elsewhere."""
    import onnxruntime

    rows = np.arange(4096, dtype=np.float32).reshape(64, 64)
    x = ir.Value(name="x", shape=ir.Shape([1, 64]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = [
        ir.Value(name=n, const_value=ir.Tensor(a, name=n)) for n, a in (("w", rows), ("v", rows.reshape(64, 8, 8)))
    ]
    product = ir.node("MatMul", [x, weights[0]])
    flat = ir.Value(name="shape", const_value=ir.Tensor(np.array([64, 64]), name="shape"))
    again = ir.node("Reshape", [weights[1], flat])
    last = ir.node("MatMul", [product.outputs[0], again.outputs[0]])
    last.outputs[0].name, last.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x], last.outputs, nodes=[product, again, last], initializers=[*weights, flat], opset_imports={"": 18}, name="g"
    )
    model = ir.Model(graph, ir_version=9)
    save_graph(model, tmp_path / "outside" / "g.onnx", external_over_bytes=0)
    assert (tmp_path / "outside" / "g.onnx.data").stat().st_size == rows.nbytes
    save_graph(load_graph(tmp_path / "outside" / "g.onnx"), tmp_path / "inside" / "g.onnx")
    assert [path.name for path in (tmp_path / "inside").iterdir()] == ["g.onnx"]
    feed = {"x": np.ones((1, 64), np.float32)}
    results = [
        onnxruntime.InferenceSession(tmp_path / place / "g.onnx", providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for place in ("outside", "inside")
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_allclose(results[0], feed["x"] @ rows @ rows, rtol=1e-5)
