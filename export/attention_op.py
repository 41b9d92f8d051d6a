"""Attention as one operator: while a model is traced inside `as_one_operator`, each attention layer becomes one node of

    com.microsoft.GroupQueryAttention(query, key, value, past_key, past_value, seqlens_k, total_sequence_length[, cos, sin])
        -> output, present_key, present_value

which rotates, writes the cache in place and attends. transformers lets a model's attention and its mask be replaced by name;
the cache hands back the new keys and values alone, and rotary embedding does nothing, since the operator does both.
Contract of the operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

`why_plain` says before any work which models keep the traced form of their attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

NAME = "edgestill_fused"
"""Under which transformers knows the attention and the mask function; each `as_one_operator` registers its own."""
HEAD_MULTIPLE = 16
"""onnxruntime's CPU kernel refuses other head sizes where it rotates."""
ROTATION = "apply_rotary_pos_emb"
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds whose angles depend on the position alone, so that a table holds them."""


@torch.library.custom_op("edgestill::fused_attention", mutates_args=())
def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    seqlens: torch.Tensor,
    total: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tensors of the shapes that the operator gives: the trace records the call, nobody reads its result."""
    batch, new, _ = query.shape
    present = (batch, kv_heads, past_key.shape[2] + new, past_key.shape[3])
    return torch.zeros_like(query), query.new_zeros(present), query.new_zeros(present)


def _symbolic(graph: Any, *arguments: Any) -> Any:
    """The node for one call of `_fused_attention`."""
    from torch.onnx import symbolic_helper

    get: Any = symbolic_helper._get_const

    tensors, (heads, kv_heads, scale, softcap, window) = arguments[:9], arguments[9:]
    rotates = not symbolic_helper._is_none(tensors[7])
    attributes = {
        "num_heads_i": get(heads, "i", "heads"),
        "kv_num_heads_i": get(kv_heads, "i", "kv_heads"),
        "scale_f": get(scale, "f", "scale"),
        "do_rotary_i": int(rotates),
    }
    if (cap := get(softcap, "f", "softcap")) > 0:
        attributes["softcap_f"] = cap
    if (local := get(window, "i", "window")) > 0:
        attributes["local_window_size_i"] = local
    inputs = tensors if rotates else tensors[:7]
    output, *present = graph.op("com.microsoft::GroupQueryAttention", *inputs, **attributes, outputs=3)
    output.setType(tensors[0].type())
    for made, past in zip(present, tensors[3:5], strict=True):
        made.setType(past.type().with_sizes([None] * 4))
    return output, *present


@dataclass
class _Call:
    """What the parts of one forward pass tell each other."""

    cos: torch.Tensor | None
    sin: torch.Tensor | None
    cache: Any = None
    seqlens: torch.Tensor | None = None
    """int32 [batch]: cached and new tokens of each row, less one."""
    total: torch.Tensor | None = None
    """int32: the largest number of cached and new tokens."""

    def take_mask(self, *_: Any, attention_mask: torch.Tensor, **__: Any) -> torch.Tensor:
        """In place of a mask function: the operator wants lengths."""
        self.seqlens = (attention_mask.sum(-1) - 1).to(torch.int32)
        self.total = torch.as_tensor(attention_mask.shape[1]).to(torch.int32)
        return attention_mask

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """In place of an attention function: heads [B, H, n, D] in, [B, n, H, D] out."""
        layer = self.cache.layers[module.layer_idx]
        batch, heads, new, size = query.shape
        flat = [tensor.transpose(1, 2).reshape(batch, new, -1) for tensor in (query, key, value)]
        scale = float(size) ** -0.5 if scaling is None else float(scaling)
        window = int(sliding_window or 0)
        output, layer.keys, layer.values = torch.ops.edgestill.fused_attention(
            *flat,
            layer.keys,
            layer.values,
            self.seqlens,
            self.total,
            self.cos,
            self.sin,
            int(heads),
            int(key.shape[1]),
            scale,
            float(softcap or 0.0),
            window,
        )
        return output.reshape(batch, new, heads, size), None


@contextmanager
def as_one_operator(model: Any) -> Iterator[None]:
    """Trace `model` (`why_plain` found nothing) with its attention as one operator; everything is put back."""
    from transformers.cache_utils import DynamicCache
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    call = _Call(*_rotary_table(model))
    exporter: Any = torch.onnx
    exporter.register_custom_op_symbolic("edgestill::fused_attention", _symbolic, 18)
    ALL_ATTENTION_FUNCTIONS.register(NAME, call.attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, call.take_mask)
    fill: Callable[..., Any] = DynamicCache.update

    def update(cache: Any, keys: torch.Tensor, values: torch.Tensor, layer: int, *rest: Any, **words: Any) -> Any:
        if layer >= len(cache.layers):  # the past, handed to the model as it is filled layer by layer
            return fill(cache, keys, values, layer, *rest, **words)
        call.cache = cache
        return keys, values

    module = sys.modules[type(model).__module__]
    with ExitStack() as replaced:
        replaced.enter_context(_replaced(DynamicCache, "update", update))
        replaced.enter_context(_replaced(model.config, "_attn_implementation", NAME))
        if hasattr(module, ROTATION):
            replaced.enter_context(_replaced(module, ROTATION, lambda query, key, *_, **__: (query, key)))
        yield
    call.cache = call.cos = call.sin = call.seqlens = call.total = (
        None  # transformers keeps the functions, and they this
    )


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner`.`name` is `value` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def why_plain(model: Any) -> str | None:
    """Why this causal LM keeps the traced form of its attention; None when one operator does the same."""
    config = model.config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size % HEAD_MULTIPLE:
        return f"heads of {size} values are no multiple of {HEAD_MULTIPLE}, which onnxruntime's CPU kernel wants"
    if not getattr(model, "_supports_attention_backend", False):
        return f"the attention of {config.model_type} cannot be replaced by name in this transformers"
    if getattr(config, "reorder_and_upcast_attn", False) or getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return "attention is scaled layer by layer (scale_attn_by_inverse_layer_idx, reorder_and_upcast_attn)"
    if not getattr(config, "scale_attn_weights", True):
        return "attention is not scaled (scale_attn_weights: false)"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "attention has sinks of its own"
    return _why_not_rotated(model)


def _why_not_rotated(model: Any) -> str | None:
    module = sys.modules[type(model).__module__]
    if not hasattr(module, ROTATION):
        return None
    found = [m for name, m in model.named_modules() if "rotary_emb" in name.rpartition(".")[2]]
    if len(found) != 1:
        return f"{len(found)} tables of rotary angles, not one for all layers"
    kind = getattr(found[0], "rope_type", "default")
    if kind not in STATIC_ROPE:
        return f"rotary angles of kind {kind} depend on the length of the text"
    cos, sin = _angles(found[0], 4)
    if cos.shape[-1] % HEAD_MULTIPLE:
        return f"it rotates {cos.shape[-1]} values of a head, no multiple of {HEAD_MULTIPLE}"
    query = torch.arange(4 * cos.shape[-1], dtype=torch.float32).sin().reshape(1, 1, 4, -1)
    rotated, _ = getattr(module, ROTATION)(query, query, cos, sin)
    low, high = query.chunk(2, dim=-1)
    expected = query * cos + torch.cat([-high, low], dim=-1) * sin
    return None if torch.allclose(rotated, expected) else "it does not rotate the halves of a head against each other"


def _rotary_table(model: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """cos and sin [max_position_embeddings, rotated values / 2], by the model's own module; None, None without rotation."""
    rotary = next((m for name, m in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"), None)
    if rotary is None:
        return None, None
    cos, sin = _angles(rotary, model.config.get_text_config(decoder=True).max_position_embeddings)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _angles(rotary: Any, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1), torch.arange(positions)[None])
    return cos, sin
