"""GroupQueryAttention in standard operators: rotate, write into the cache in place, attend to what is not later."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgestill.export.nodes import constant_array, input_of, shared_constant
from edgestill.runtime.errors import BadInput


@dataclass
class Places:
    """Where the tokens of a step are, and the masks made of it: one for each kind of layer, shared by all of the kind."""

    graph: ir.Graph
    position_ids: ir.Value
    write_indices: ir.Value
    key_positions: ir.Value
    logit_positions: ir.Value
    _masks: dict[int, ir.Value] = field(default_factory=dict)
    _attended: ir.Value | None = None

    def attended(self, before: ir.Node) -> ir.Value:
        """int64 [1]: how many slots of the cache are looked at."""
        if self._attended is None:
            node = ir.node("Shape", [self.key_positions], name="attended")
            self.graph.insert_before(before, node)
            self._attended = node.outputs[0]
        return self._attended

    def mask(self, window: int, before: ir.Node) -> ir.Value:
        """bool [batch, 1, new, attended]: keys no later than the query, and less than `window` earlier (0: all)."""
        if window not in self._masks:
            last_two = shared_constant(self.graph, "axes_1_3", np.array([1, 3], np.int64))
            first_three = shared_constant(self.graph, "axes_0_1_2", np.array([0, 1, 2], np.int64))
            query = ir.node("Unsqueeze", [self.position_ids, last_two], name=f"mask_query_{window}")
            key = ir.node("Unsqueeze", [self.key_positions, first_three], name=f"mask_key_{window}")
            nodes = [
                query,
                key,
                ir.node("LessOrEqual", [key.outputs[0], query.outputs[0]], name=f"mask_causal_{window}"),
            ]
            if window:
                reach = shared_constant(self.graph, f"window_{window}", np.array(window, np.int64))
                end = ir.node("Add", [key.outputs[0], reach], name=f"mask_end_{window}")
                near = ir.node("Greater", [end.outputs[0], query.outputs[0]], name=f"mask_near_{window}")
                both = [nodes[-1].outputs[0], near.outputs[0]]
                nodes += [end, near, ir.node("And", both, name=f"mask_window_{window}")]
            self.graph.insert_before(before, nodes)
            self._masks[window] = nodes[-1].outputs[0]
        return self._masks[window]


def lower_attention(graph: ir.Graph, node: ir.Node, places: Places, capacity: int) -> None:
    """Replace one GroupQueryAttention (see attention_op.py for its inputs)."""
    query, key, value, past_key, past_value = (input_of(node, i) for i in range(5))
    attributes = node.attributes
    heads, kv_heads = attributes["num_heads"].as_int(), attributes["kv_num_heads"].as_int()
    shape = past_key.shape
    if shape is None or not isinstance(shape[3], int):
        raise BadInput(f"attention {node.name!r}: the cache has no known head size; export the checkpoint again")
    size = shape[3]
    nodes: list[ir.Node] = []

    def add(operator: str, inputs: list[ir.Value | None], suffix: str, **words: object) -> ir.Value:
        nodes.append(ir.node(operator, inputs, words, name=f"{node.name}_{suffix}"))  # type: ignore[arg-type]
        return nodes[-1].outputs[0]

    def by_head(flat: ir.Value, count: int, what: str) -> ir.Value:
        """[batch, new, count * size] -> [batch, count, new, size]."""
        target = shared_constant(graph, f"heads_{count}_{size}", np.array([0, 0, count, size], np.int64))
        split = add("Reshape", [flat, target], f"{what}_heads")
        return add("Transpose", [split], f"{what}_by_head", perm=[0, 2, 1, 3])

    def rotated(by_heads: ir.Value, what: str) -> ir.Value:
        if not attributes.get_int("do_rotary", 0):
            return by_heads
        cos, sin = input_of(node, 7), input_of(node, 8)
        turned = 2 * constant_array(cos).shape[1]
        partly = {} if turned == size else {"rotary_embedding_dim": turned}
        return add("RotaryEmbedding", [by_heads, cos, sin, places.position_ids], f"{what}_rotated", **partly)

    q = rotated(by_head(query, heads, "query"), "query")
    k = rotated(by_head(key, kv_heads, "key"), "key")
    v = by_head(value, kv_heads, "value")
    seen = []
    for what, new, past, index in (("key", k, past_key, 1), ("value", v, past_value, 2)):
        past.shape = ir.Shape(("batch_size", kv_heads, capacity, size))
        present = add("TensorScatter", [past, new, places.write_indices], f"present_{what}", axis=2)
        old = node.outputs[index]
        present.type, present.shape = past.type, past.shape
        ir.convenience.replace_all_uses_with(old, present, replace_graph_outputs=True)
        present.name, old.name = old.name, f"{old.name}_grown"
        start = shared_constant(graph, "slot_0", np.array([0], np.int64))
        axis = shared_constant(graph, "slot_axis", np.array([2], np.int64))
        seen.append(add("Slice", [present, start, places.attended(node), axis], f"seen_{what}"))
    words: dict[str, object] = {"scale": attributes.get_float("scale", float(size) ** -0.5)}
    if cap := attributes.get_float("softcap", 0.0):
        words["softcap"] = cap
    window = max(0, attributes.get_int("local_window_size", 0))
    out = add("Attention", [q, *seen, places.mask(window, node)], "attention", **words)
    joined = add("Transpose", [out], "by_token", perm=[0, 2, 1, 3])
    flat = shared_constant(graph, f"flat_{heads * size}", np.array([0, 0, heads * size], np.int64))
    result = add("Reshape", [joined, flat], "output")
    result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(node.outputs[0], result)
    graph.remove(node, safe=True)
