"""Products that read the same activation become one: query, key and value; gate and up.

    MatMulNBits(x, A), MatMulNBits(x, B), ..    ->    Split(MatMulNBits(x, [A B ..]))

Codes and scales of an output stand in a row of their own, so joining weights copies rows: the integers stay what they were.
Float products are joined by columns. Where the parts are query, key and value of one GroupQueryAttention, it reads them
joined and nothing is split; and where a model splits one product into the three (GPT-2), that Split goes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgestill.export.nodes import add_constant, constant_array, made_by, readers_of
from edgestill.export.quantized_ops import CONTRIB
from edgestill.export.rewrite.outcome import Outcome

PRODUCTS = ("MatMul", "MatMulNBits")


def pack_projections(model: ir.Model) -> Outcome:
    """Join every group of products that read the same activation."""
    groups: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        if node.op_type in PRODUCTS and node.inputs[0] is not None and not node.inputs[0].is_initializer():
            groups[node.inputs[0]].append(node)
    done, left = _unsplit(model.graph), []
    for nodes in groups.values():
        if len(nodes) < 2:
            continue
        why = _why_apart(nodes)
        if why is None:
            _join(model.graph, nodes)
            done += 1
        else:
            left.append(f"{nodes[0].name}: {why}")
    return Outcome("pack projections", done, tuple(left))


def _unsplit(graph: ir.Graph) -> int:
    """Let attention read what was split into its query, key and value; returns how many did not."""
    done = 0
    for node in graph:
        if node.op_type != "GroupQueryAttention":
            continue
        split = made_by(node.inputs[0], "Split")
        if split is None or split.attributes.get_int("axis", 0) not in (-1, 2) or split.inputs[0] is None:
            continue
        if list(node.inputs[:3]) == list(split.outputs):
            _read_joined(node, split.inputs[0])
            done += 1
    return done


def _read_joined(attention: ir.Node, joined: ir.Value) -> None:
    attention.replace_input_with(0, joined)
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)


def _why_apart(nodes: Sequence[ir.Node]) -> str | None:
    first = nodes[0]
    for node in nodes:
        weights = node.inputs[1:]
        if any(value is None or not value.is_initializer() for value in weights):
            return "a weight is no constant"
        if any(value is not None and len(value.uses()) > 1 for value in weights):
            return "a weight is read elsewhere too"
        if (node.op_type, len(node.inputs)) != (first.op_type, len(first.inputs)):
            return "they are stored differently"
        for name in ("bits", "block_size", "accuracy_level"):
            if node.attributes.get_int(name, 0) != first.attributes.get_int(name, 0):
                return f"they differ in {name}"
    return None


def _join(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    attention = _attention_of(nodes)
    if attention is not None:  # in the order of its inputs
        order = [_through_bias(value) for value in attention.inputs[:3]]
        nodes = sorted(nodes, key=lambda node: order.index(node.outputs[0]))
    biases = [_bias_of(node) for node in nodes]
    if not all(biases):
        biases = []
    product = _product(graph, nodes)
    last = product
    if biases:
        together = np.concatenate([constant_array(_constant_input(add)) for add in biases if add is not None])
        bias = add_constant(graph, f"{nodes[0].name}_joined_bias", together)
        last = ir.node("Add", [product.outputs[0], bias], name=f"{product.name}_bias")
    ends = [add if add is not None else node for add, node in zip(biases or [None] * len(nodes), nodes, strict=True)]
    first = next(node for node in graph if node in nodes)
    graph.insert_before(first, [product] if last is product else [product, last])
    if attention is not None and all(_only_read_by(end, attention) for end in ends):
        _read_joined(attention, last.outputs[0])
        return
    sizes = add_constant(graph, f"{product.name}_sizes", np.array([_outputs(node) for node in nodes], np.int64))
    split = ir.node(
        "Split", [last.outputs[0], sizes], {"axis": -1}, num_outputs=len(nodes), name=f"{product.name}_split"
    )
    graph.insert_after(last, split)
    for part, end in zip(split.outputs, ends, strict=True):
        part.shape, part.type = end.outputs[0].shape, end.outputs[0].type
        ir.convenience.replace_all_uses_with(end.outputs[0], part)


def _product(graph: ir.Graph, nodes: list[ir.Node]) -> ir.Node:
    name = f"{nodes[0].name}_joined"
    axis = 1 if nodes[0].op_type == "MatMul" else 0
    constants = []
    for index in range(1, len(nodes[0].inputs)):
        arrays = [constant_array(node.inputs[index]) for node in nodes]
        constants.append(add_constant(graph, f"{name}_{index}", np.concatenate(arrays, axis=axis)))
    attributes = {key: attribute.value for key, attribute in nodes[0].attributes.items()}
    if axis == 0:
        attributes["N"] = sum(_outputs(node) for node in nodes)
    domain = CONTRIB if axis == 0 else ""
    return ir.node(nodes[0].op_type, [nodes[0].inputs[0], *constants], attributes, domain=domain, name=name)


def _outputs(node: ir.Node) -> int:
    """N of y [.., N] = x W."""
    if node.op_type == "MatMulNBits":
        return node.attributes["N"].as_int()
    return int(constant_array(node.inputs[1]).shape[1])


def _attention_of(nodes: list[ir.Node]) -> ir.Node | None:
    """The operator whose query, key and value `nodes` make, bias or not."""
    if len(nodes) != 3:
        return None
    ends = [_bias_of(node) or node for node in nodes]
    readers = [reader for end in ends for reader in readers_of(end.outputs[0])]
    if len(readers) != 3 or any(r is not readers[0] or r.op_type != "GroupQueryAttention" for r in readers):
        return None
    return readers[0]


def _bias_of(node: ir.Node) -> ir.Node | None:
    """The Add of a constant that alone reads the product `node`."""
    readers = readers_of(node.outputs[0])
    if len(readers) != 1 or readers[0].op_type != "Add" or _constant_input(readers[0]) is None:
        return None
    return readers[0]


def _constant_input(add: ir.Node) -> ir.Value | None:
    found = [value for value in add.inputs if value is not None and value.is_initializer()]
    return found[0] if len(found) == 1 and found[0].shape is not None and len(found[0].shape) == 1 else None


def _through_bias(value: ir.Value | None) -> ir.Value | None:
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Add":
        return value
    return next((v for v in node.inputs if v is not None and not v.is_initializer()), None)


def _only_read_by(node: ir.Node, reader: ir.Node) -> bool:
    return all(found is reader for found in readers_of(node.outputs[0]))
