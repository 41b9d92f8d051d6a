"""A weight that is read in two shapes: two initializers, whose bytes stand in the external file once.

    Reshape(W, shape)    ->    W' of that shape

onnxruntime would compute the Reshape when it opens the graph and keep the copy: for an int4 embedding that its head shares, as
much memory as the embedding. Only for graphs whose weights lie outside: inside, the bytes would stand twice.
"""

from __future__ import annotations

import onnx_ir as ir

from edgestill.export.nodes import add_constant, constant_array
from edgestill.export.rewrite.outcome import Outcome


def constant_reshape(model: ir.Model) -> Outcome:
    """Replace every Reshape of an initializer to a constant shape."""
    done = 0
    for node in [node for node in model.graph if node.op_type == "Reshape"]:
        data, shape = node.inputs
        if data is None or shape is None or not data.is_initializer() or not shape.is_initializer():
            continue
        view = constant_array(data).reshape(constant_array(shape))
        reshaped = add_constant(model.graph, f"{data.name}_as_{node.name}", view)
        ir.convenience.replace_all_uses_with(node.outputs[0], reshaped)
        done += 1
    return Outcome("constant reshape", done)
