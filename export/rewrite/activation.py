"""The activation of an MLP in one pass over memory.

x sigmoid(x)    Mul(x, Sigmoid(x))    QuickGelu with alpha 1 (SiLU)
"""

from __future__ import annotations

import onnx_ir as ir

from edgestill.export.nodes import readers_of, substitute
from edgestill.export.quantized_ops import CONTRIB
from edgestill.export.rewrite.outcome import Outcome


def activation(model: ir.Model) -> Outcome:
    """Fuse every SiLU."""
    done, left = 0, []
    for node in [node for node in model.graph if node.op_type == "Sigmoid"]:
        readers = readers_of(node.outputs[0])
        if len(readers) != 1 or readers[0].op_type != "Mul" or node.inputs[0] not in readers[0].inputs:
            left.append(f"{node.name}: a sigmoid that does not multiply its own input")
            continue
        substitute(readers[0], ir.node("QuickGelu", [node.inputs[0]], {"alpha": 1.0}, domain=CONTRIB, name=node.name))
        done += 1
    return Outcome("activation", done, tuple(left))
