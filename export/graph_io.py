"""Reading and writing ONNX files: data outside the file only beside it, never a half-written graph.

An ONNX file may name other files that hold its weights. A crafted name (`../../etc/passwd`, an absolute path, a link) makes
a reader map foreign files (CVE-2026-27489, CVE-2026-34445), so a name must be a plain one and the file a real one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from edgestill.runtime.errors import BadInput

EXTERNAL_OVER_BYTES = 16 << 20
"""Weights above this leave the .onnx file for one that is mapped: a protobuf is read whole into memory, and none exceeds 2 GiB."""
OUTSIDE_FROM_BYTES = 1024
"""Smaller initializers stay in the file: shapes and scalars, which shape inference reads."""
PAGE = 4096
"""Weights begin on a page of their own, so that they can be mapped."""


def load_graph(path: Path) -> ir.Model:
    """The graph in `path`; weights in external files are mapped, not read.

    Raises:
        BadInput: no such file, not ONNX, or external data that is not a plain file beside it.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

    try:
        model = ir.load(path)
    except FileNotFoundError as missing:
        raise BadInput(f"{path}: no such file; export the checkpoint first") from missing
    except (DecodeError, ValueError) as broken:
        why = str(broken)[:120]
        raise BadInput(f"{path} is not a readable ONNX file ({why}); export the checkpoint again") from broken
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            _check_location(path, os.fspath(tensor.location))
    return model


def external_files(path: Path) -> tuple[str, ...]:
    """Names of the files beside `path` that hold its weights, sorted; () for a self-contained graph."""
    names = {os.fspath(t.location) for t in _tensors(load_graph(path)) if isinstance(t, ir.ExternalTensor)}
    return tuple(sorted(names))


def save_graph(model: ir.Model, path: Path, *, external_over_bytes: int = EXTERNAL_OVER_BYTES) -> None:
    """Write `path`, and `<path>.data` beside it when the weights exceed `external_over_bytes`.

    Equal bytes stand in the data once, whatever shapes they are read in. Both files are written in a folder beside and
    renamed, the data first, so that an interrupted write leaves no graph.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.tmp-", dir=path.parent) as folder:
        if weight_bytes(model) > external_over_bytes:
            data = f"{path.name}.data"
            with _weights_outside(model, Path(folder) / data):
                ir.save(model, Path(folder) / path.name)
            (Path(folder) / data).replace(path.parent / data)
            (Path(folder) / path.name).replace(path)
        else:
            ir.external_data.load_to_model(model)  # weights that came from a file beside another graph
            ir.save(model, Path(folder) / path.name)
            (Path(folder) / path.name).replace(path)
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


@contextmanager
def _weights_outside(model: ir.Model, data: Path) -> Iterator[None]:
    """Write the large initializers of `model` to `data`; meanwhile they refer to it."""
    inside: list[tuple[ir.Value, ir.TensorProtocol]] = []
    offsets: dict[bytes, int] = {}
    with data.open("wb") as handle:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < OUTSIDE_FROM_BYTES:
                continue
            content = tensor.tobytes()
            key = hashlib.sha256(content).digest()
            if key not in offsets:
                handle.write(b"\0" * (-handle.tell() % PAGE))
                offsets[key] = handle.tell()
                handle.write(content)
            inside.append((value, tensor))
            value.const_value = ir.ExternalTensor(
                data.name,
                offsets[key],
                len(content),
                tensor.dtype,
                shape=ir.Shape(tensor.numpy().shape),
                name=str(value.name),
                base_dir=data.parent,
            )
    try:
        yield
    finally:
        for value, tensor in inside:
            value.const_value = tensor


def copy_graph(source: Path, target: Path) -> None:
    """Copy `source` and the files that hold its weights to `target`'s folder, as real files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for name in external_files(source):
        shutil.copyfile(source.with_name(name), target.with_name(name))
    shutil.copyfile(source, target)


def validate_graph(path: Path) -> None:
    """Run onnx.checker over `path` and let onnxruntime build a session of it (kernels exist, shapes agree).

    Raises:
        BadInput: what the checker or onnxruntime says.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    refusals = (
        onnx.checker.ValidationError,
        states.Fail,
        states.InvalidGraph,
        states.InvalidArgument,
        states.NotImplemented,
    )
    try:
        onnx.checker.check_model(os.fspath(path))
        onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except refusals as invalid:
        raise BadInput(f"{path} is not a graph that runs ({str(invalid)[:200]}); export it again") from invalid


def _tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    """Every tensor of the graph: initializers, and those in attributes, subgraphs included."""
    found = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.TENSOR:
                found.append(attribute.as_tensor())
            elif attribute.type is ir.AttributeType.GRAPH:
                graph = attribute.as_graph()
                found += [v.const_value for v in graph.initializers.values() if v.const_value is not None]
    return found


def _check_location(path: Path, location: str) -> None:
    beside = path.parent / location
    plain = location not in ("", ".", "..") and Path(location).name == location and "\\" not in location
    if not plain or beside.is_symlink() or not beside.is_file():
        raise BadInput(
            f"{path} keeps weights in {location!r}, which is not a plain file beside it; export the checkpoint again"
        )
