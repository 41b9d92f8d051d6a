"""Logits of the last positions only, for who asks: an input `logits_to_keep` int64 [1] with transformers' meaning.

    0 (the default)   logits of every position
    k                 of the last k positions of this step

The input has a default, so runtimes that do not know it run the graph as before. A head of 49,152 outputs is a fifth of a
small model's prefill, and a prompt needs its last row.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgestill.export.nodes import add_constant, input_of, scalar_of, shared_constant
from edgestill.export.rewrite.outcome import Outcome

NAME = "logits_to_keep"
POINTWISE = ("Add", "Mul", "Div", "Tanh")


def logits_to_keep(model: ir.Model) -> Outcome:
    """Cut what the head reads."""
    graph = model.graph
    head = next(output for output in graph.outputs if output.name == "logits").producer()
    while head is not None and head.op_type in POINTWISE:  # a bias, a soft cap
        activations = [value for value in head.inputs if value is not None and scalar_of(value) is None]
        activations = [value for value in activations if not value.is_initializer()]
        head = activations[0].producer() if len(activations) == 1 else None
    if head is None or head.op_type != "MatMul":
        return Outcome(NAME, 0, (f"logits: made by {head.op_type if head else 'several nodes'}, not by a product",))
    keep = add_constant(graph, NAME, np.zeros(1, np.int64))
    graph.inputs.append(keep)
    start = ir.node("Neg", [keep], name=f"{NAME}_start")
    end = shared_constant(graph, f"{NAME}_end", np.array([np.iinfo(np.int64).max], np.int64))
    axis = shared_constant(graph, f"{NAME}_axis", np.array([1], np.int64))
    hidden = input_of(head, 0)
    cut = ir.node("Slice", [hidden, start.outputs[0], end, axis], name=f"{NAME}_rows")
    graph.insert_before(head, [start, cut])
    head.replace_input_with(0, cut.outputs[0])
    return Outcome(NAME, 1)
