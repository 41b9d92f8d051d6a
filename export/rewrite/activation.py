"""The activation of an MLP in one pass over memory, however the trace wrote it.

    x sigmoid(x)                     QuickGelu, alpha 1        SiLU
    x sigmoid(1.702 x)               QuickGelu, alpha 1.702
    x Phi(x)                         Gelu                      by erf
    x (1 + tanh(..)) / 2             FastGelu                  the tanh form of GELU

Tracers write one function in many ways (x^3 as Pow or as two products, halves before or after), so the function itself is
compared: elementwise nodes of one activation and constants are evaluated on a grid, and the first that agrees is the match.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgestill.export.nodes import readers_of, scalar_of, substitute
from edgestill.export.quantized_ops import CONTRIB
from edgestill.export.rewrite.outcome import Outcome

F64 = npt.NDArray[np.float64]
GRID: F64 = np.concatenate([np.linspace(-12, 12, 481), np.linspace(-0.5, 0.5, 41)])
AGREES = 1e-6
"""Largest difference: constants of a float32 graph are rounded."""
LARGEST_CONE = 16
HEARTS = ("Sigmoid", "Tanh", "Erf")
"""The operator in the middle of every activation here."""

_erf = np.vectorize(math.erf, otypes=[np.float64])
ELEMENTWISE: dict[str, Callable[..., F64]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Tanh": np.tanh,
    "Erf": _erf,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}
FUSED: tuple[tuple[str, dict[str, Any], Callable[[F64], F64]], ...] = (
    ("QuickGelu", {"alpha": 1.0}, lambda x: x / (1 + np.exp(-x))),
    ("QuickGelu", {"alpha": 1.702}, lambda x: x / (1 + np.exp(-1.702 * x))),
    ("Gelu", {}, lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2),
    ("FastGelu", {}, lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2),
)


def activation(model: ir.Model) -> Outcome:
    """Fuse every activation that is one of FUSED."""
    hearts = [node for node in model.graph if node.op_type in HEARTS]
    unknown = "{} in no activation that has an operator of its own"
    places = ((str(heart.name), None if _fuse(heart) else unknown.format(heart.op_type)) for heart in hearts)
    return Outcome.of("activation", places)


def _fuse(heart: ir.Node) -> bool:
    """Whether one of the nodes behind `heart` ends an activation, which is then one node."""
    node: ir.Node | None = heart
    while node is not None:
        for source in _cone(node):
            values = _evaluate(node.outputs[0], source)
            if values is None:
                continue
            for operator, attributes, function in FUSED:
                if np.abs(values - function(GRID)).max() < AGREES:
                    substitute(node, ir.node(operator, [source], attributes, domain=CONTRIB, name=node.name))
                    return True
        readers = readers_of(node.outputs[0])
        node = readers[0] if len(readers) == 1 and readers[0].op_type in ELEMENTWISE else None
    return False


def _cone(node: ir.Node) -> list[ir.Value]:
    """The activations that `node` depends on through elementwise nodes, nearest first, each of which may be its x."""
    found: list[ir.Value] = []
    waiting = [node]
    while waiting and len(found) < LARGEST_CONE:
        for value in waiting.pop(0).inputs:
            if value is None or value in found or value.is_initializer() or scalar_of(value) is not None:
                continue
            found.append(value)
            maker = value.producer()
            if maker is not None and maker.op_type in ELEMENTWISE:
                waiting.append(maker)
    return found


def _evaluate(value: ir.Value | None, source: ir.Value) -> F64 | None:
    """`value` where `source` runs over GRID; None when it depends on anything else."""
    if value is source:
        return GRID
    if (constant := scalar_of(value)) is not None:
        return np.full_like(GRID, constant)
    node = None if value is None else value.producer()
    if node is None or node.op_type not in ELEMENTWISE:
        return None
    inputs = [_evaluate(part, source) for part in node.inputs]
    if any(part is None for part in inputs):
        return None
    with np.errstate(all="ignore"):
        return np.asarray(ELEMENTWISE[node.op_type](*inputs), np.float64)
