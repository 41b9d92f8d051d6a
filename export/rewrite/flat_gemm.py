"""Conv1D of GPT-2 as a product over the last axis: no detour through a matrix of all tokens.

x [B, n, K] -> Reshape [B n, K] -> Gemm(W [K, N], b) -> Reshape [B, n, N]    ->    MatMul(x, W) + b
"""

from __future__ import annotations

import onnx_ir as ir

from edgestill.export.nodes import made_by, readers_of, substitute
from edgestill.export.rewrite.outcome import Outcome


def flat_gemm(model: ir.Model) -> Outcome:
    """Take the Reshapes around every such Gemm away."""
    nodes = [node for node in model.graph if node.op_type == "Gemm"]
    return Outcome.of("flat gemm", ((str(node.name), _rewrite(node)) for node in nodes))


def _rewrite(node: ir.Node) -> str | None:
    """None when done, else why not."""
    flat, readers = made_by(node.inputs[0], "Reshape"), readers_of(node.outputs[0])
    if flat is None or len(readers) != 1 or readers[0].op_type != "Reshape":
        return "no Reshape before and behind it"
    x, weight = flat.inputs[0], node.inputs[1]
    numbers = {name: attribute.value for name, attribute in node.attributes.items()}
    if any(
        numbers.get(name, plain) != plain for name, plain in (("alpha", 1), ("beta", 1), ("transA", 0), ("transB", 0))
    ):
        return "it scales or transposes"
    if x is None or x.shape is None or weight is None or weight.shape is None or len(x.shape) != 3:
        return "its input has not three dimensions"
    if isinstance(x.shape[2], int) and x.shape[2] != weight.shape[0]:
        return "its input is not cut along the last axis"
    product = ir.node("MatMul", [x, weight], name=node.name)
    if len(node.inputs) < 3 or node.inputs[2] is None:
        substitute(readers[0], product)
    else:
        substitute(readers[0], product, ir.node("Add", [product.outputs[0], node.inputs[2]], name=f"{node.name}_bias"))
    return None
