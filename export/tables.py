"""Weights in bitsandbytes' 4-bit types, nf4 and fp4, and the operators that read them.

    packed   uint8   [N K / 2]            two codes to a byte, the lower k in the high nibble: bitsandbytes' own layout
    scales   float32 [N K / block_size]   the largest magnitude of each block, blocks along the flat [N, K]

    com.microsoft.MatMulBnb4(x, packed, scales)     y [.., N] = x [.., K] W; it stores what bitsandbytes stores
    rows of an embedding                            plain ONNX operators: no kernel looks rows of these types up

value = table[code] * scale, one float32 product, on both ways. onnxruntime swaps the two zeros of fp4 (-0 and 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from edgestill.compress.quantize.grids import grid_of
from edgestill.export.nodes import add_constant, constant_array
from edgestill.export.quantized_ops import CONTRIB

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
TableScheme = Literal["nf4", "fp4"]
QUANT_TYPES: dict[TableScheme, int] = {"fp4": 0, "nf4": 1}
"""The operator's numbers."""


@dataclass(frozen=True)
class TableWeight:
    """A quantized [K, N] weight. Shapes: see the module's docstring."""

    packed: U8
    scales: F32
    scheme: TableScheme
    block_size: int
    inputs: int
    outputs: int

    bits = 4

    def values(self) -> F32:
        """The float32 [K, N] that the codes stand for, by bitsandbytes."""
        # copies: what is mapped from a file is read-only
        arrays = {"codes": torch.tensor(self.packed), "scales": torch.tensor(self.scales)}
        return np.ascontiguousarray(
            grid_of(self.scheme, self.block_size).decode(arrays, (self.outputs, self.inputs)).T.numpy()
        )


def quantize_table(weight: F32, scheme: TableScheme, block_size: int) -> TableWeight:
    """Round float32 [K, N], K whole blocks, to the nearest values as bitsandbytes does."""
    grid, matrix = grid_of(scheme, block_size), torch.tensor(weight.T)
    arrays = grid.encode(matrix, grid.scales(matrix))
    return TableWeight(
        arrays["codes"].numpy(), arrays["scales"].numpy(), scheme, block_size, weight.shape[0], weight.shape[1]
    )


def table_constants(graph: ir.Graph, table: TableWeight, prefix: str) -> list[ir.Value]:
    """Initializers of codes and scales."""
    return [
        add_constant(graph, f"{prefix}_codes", table.packed),
        add_constant(graph, f"{prefix}_scales", table.scales),
    ]


def table_product(x: ir.Value, table: TableWeight, constants: list[ir.Value], name: str) -> ir.Node:
    """`x` times the weight whose arrays are `constants`."""
    attributes = {
        "K": table.inputs,
        "N": table.outputs,
        "block_size": table.block_size,
        "quant_type": QUANT_TYPES[table.scheme],
    }
    return ir.node("MatMulBnb4", [x, *constants], attributes, domain=CONTRIB, name=name)


def table_lookup(
    graph: ir.Graph, ids: ir.Value, table: TableWeight, constants: list[ir.Value], name: str
) -> tuple[ir.Node, ...]:
    """Row `ids` of W': gather the bytes of the rows, take them apart, look the codes up, multiply; the last node gives it."""
    from bitsandbytes.functional import get_4bit_type

    per_row = table.inputs // table.block_size
    values = get_4bit_type(table.scheme, device="cpu").numpy()  # type: ignore[no-untyped-call]

    def constant(what: str, array: npt.NDArray[np.generic]) -> ir.Value:
        return add_constant(graph, f"{name}_{what}", array)

    def node(operator: str, *inputs: ir.Value, **attributes: int | str) -> ir.Node:
        made = ir.node(operator, list(inputs), attributes, name=f"{name}_{operator}_{len(nodes)}")
        nodes.append(made)
        return made

    nodes: list[ir.Node] = []
    rows = node("Reshape", constants[0], constant("rows", np.array([table.outputs, table.inputs // 2], np.int64)))
    scale_rows = node("Reshape", constants[1], constant("scale_rows", np.array([table.outputs, per_row], np.int64)))
    picked = node("Gather", rows.outputs[0], ids, axis=0)
    high = node("BitShift", picked.outputs[0], constant("four", np.array(4, np.uint8)), direction="RIGHT")
    low = node("BitwiseAnd", picked.outputs[0], constant("fifteen", np.array(15, np.uint8)))
    last = constant("last", np.array([-1], np.int64))
    pair = node(
        "Concat",
        node("Unsqueeze", high.outputs[0], last).outputs[0],
        node("Unsqueeze", low.outputs[0], last).outputs[0],
        axis=-1,
    )
    codes = node("Cast", pair.outputs[0], to=ir.DataType.INT32.value)
    found = node("Gather", constant("values", values), codes.outputs[0], axis=0)
    blocks = constant("blocks", np.array([0, 0, per_row, table.block_size], np.int64))
    scales = node("Unsqueeze", node("Gather", scale_rows.outputs[0], ids, axis=0).outputs[0], last)
    scaled = node("Mul", node("Reshape", found.outputs[0], blocks).outputs[0], scales.outputs[0])
    node("Reshape", scaled.outputs[0], constant("flat", np.array([0, 0, table.inputs], np.int64)))
    return tuple(nodes)


def read_table(node: ir.Node) -> tuple[str, TableWeight]:
    """(name of the codes, weight) that a MatMulBnb4 reads."""
    source = node.inputs[1]
    schemes = {number: scheme for scheme, number in QUANT_TYPES.items()}
    return str(source.name if source is not None else ""), TableWeight(
        packed=constant_array(source),
        scales=constant_array(node.inputs[2]),
        scheme=schemes[node.attributes["quant_type"].as_int()],
        block_size=node.attributes["block_size"].as_int(),
        inputs=node.attributes["K"].as_int(),
        outputs=node.attributes["N"].as_int(),
    )
