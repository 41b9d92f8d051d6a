"""Attention without a change of layout: what the trace wraps around the fused operator is taken away.

    query, key, value    [B, n, H D] -> Reshape [B, n, H, D] -> Transpose [B, H, n, D] -> (cut and joined by a partial rotation)
                         -> Transpose -> Reshape [B, n, H D]
    output               the same backwards

The models think in heads, the operator reads rows. Both are the same memory, so the operator reads the product itself; a
per-head norm in between stays, and one Reshape with it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgestill.export.nodes import made_by, readers_of, scalar_of, shared_constant
from edgestill.export.rewrite.outcome import Outcome

SWAP = (0, 2, 1, 3)
LONGEST_HEAD = 1 << 16
"""A slice that ends beyond it takes all that is left."""


def attention_layout(model: ir.Model) -> Outcome:
    """Connect each GroupQueryAttention straight to what makes its heads and what reads its output."""
    done, left = 0, []
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for node in nodes:
        for index in range(3):
            why = _connect_input(model.graph, node, index)
            if why is None:
                done += 1
            else:
                left.append(f"{node.name}: input {index}: {why}")
        done += _connect_output(node)
    return Outcome("attention layout", done, tuple(left))


def _connect_input(graph: ir.Graph, node: ir.Node, index: int) -> str | None:
    """None when done, else why not."""
    reached, swapped = node.inputs[index], False
    rows = reached
    while (maker := made_by(reached, "Reshape", "Transpose", "Concat")) is not None:
        if maker.op_type == "Transpose":
            if tuple(maker.attributes.get_ints("perm", ())) != SWAP:
                break
            swapped = not swapped
        reached = _whole_of(maker) if maker.op_type == "Concat" else maker.inputs[0]
        if reached is None:
            break
        if not swapped:
            rows = reached
    if rows is None or rows is node.inputs[index] or swapped:
        return "its heads are made in another layout"
    if rows.shape is None or len(rows.shape) != 3:
        shape = shared_constant(graph, "rows_of_heads", np.array([0, 0, -1], np.int64))
        flat = ir.node("Reshape", [rows, shape], name=f"{node.name}_rows_{index}")
        graph.insert_before(node, flat)
        rows = flat.outputs[0]
    node.replace_input_with(index, rows)
    return None


def _whole_of(concat: ir.Node) -> ir.Value | None:
    """What the pieces were cut from, when `concat` joins them in order along the last axis; else None."""
    pieces = [made_by(value, "Slice") for value in concat.inputs]
    end = 0.0
    for piece in pieces:
        if piece is None or piece.inputs[0] is not pieces[0].inputs[0]:  # type: ignore[union-attr]  # the first one is checked first
            return None
        if scalar_of(piece.inputs[1]) != end:
            return None
        end = scalar_of(piece.inputs[2]) or 0.0
    return pieces[0].inputs[0] if pieces[0] is not None and end > LONGEST_HEAD else None


def _connect_output(node: ir.Node) -> bool:
    """Whether a product reads the rows now."""
    output = node.outputs[0]
    value, readers = output, _readers_of_values(output)
    while len(readers) == 1 and readers[0].op_type in ("Reshape", "Transpose"):
        value = readers[0].outputs[0]
        readers = _readers_of_values(value)
    if value is output or not readers or any(reader.op_type != "MatMul" for reader in readers):
        return False
    ir.convenience.replace_all_uses_with(value, output)
    return True


def _readers_of_values(value: ir.Value) -> list[ir.Node]:
    """Those that read more than the shape, which is needed only for the layout that goes."""
    return [node for node in readers_of(value) if node.op_type != "Shape"]
