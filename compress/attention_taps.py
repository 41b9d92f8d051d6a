"""What the attention of a causal LM works with, caught while it runs: queries, keys and values, or the attention maps.

Queries, keys and values are taken as the projections put them out, before rotary embedding and any normalisation of heads, so
the attention kernel does not matter. Fused projections are split as their family stores them:

    GPT-2        c_attn             [ all queries | all keys | all values ]
    Phi-3        qkv_proj           the same, keys and values narrower where heads share them
    GPT-NeoX     query_key_value    per head: [ its query | its key | its value ]

Maps are the second output of the attention module, which eager attention computes anyway; only those of the watched layers
are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from edgestill.compress.teachers import decoder_blocks
from edgestill.runtime.errors import BadInput

Kind = Literal["relation", "maps"]


class Relations(NamedTuple):
    """The projections of one layer: query [B, T, dq], key and value [B, T, dk], heads side by side."""

    query: Tensor
    key: Tensor
    value: Tensor


Taps = dict[int, Relations | Tensor]
"""Layer -> Relations, or attention probabilities [B, H, T, T]."""


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its projections: `attention` in a block, `projections` (one or three linear layers) in that."""

    attention: str
    projections: tuple[str, ...]
    split: Callable[[Sequence[Tensor], PretrainedConfig], Relations]


def projection_widths(config: PretrainedConfig) -> tuple[int, int]:
    """Channels of the queries, and of the keys (which the values share)."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads * size, (getattr(text, "num_key_value_heads", None) or heads) * size


def _apart(outputs: Sequence[Tensor], config: PretrainedConfig) -> Relations:
    return Relations(*outputs)


def _side_by_side(outputs: Sequence[Tensor], config: PretrainedConfig) -> Relations:
    wide, narrow = projection_widths(config)
    return Relations(*torch.split(outputs[0], [wide, narrow, narrow], dim=-1))


def _per_head(outputs: Sequence[Tensor], config: PretrainedConfig) -> Relations:
    batch, tokens, _ = outputs[0].shape
    heads = outputs[0].view(batch, tokens, config.get_text_config(decoder=True).num_attention_heads, 3, -1)
    return Relations(*(part.flatten(-2) for part in heads.unbind(-2)))


_LIKE_LLAMA = Layout("self_attn", ("q_proj", "k_proj", "v_proj"), _apart)
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma3_text"), _LIKE_LLAMA
    ),
    **dict.fromkeys(("phi", "olmo", "olmo2", "granite", "smollm3", "starcoder2", "cohere", "opt"), _LIKE_LLAMA),
    "gpt2": Layout("attn", ("c_attn",), _side_by_side),
    "gpt_neox": Layout("attention", ("query_key_value",), _per_head),
    "phi3": Layout("self_attn", ("qkv_proj",), _side_by_side),
}
"""model_type -> layout. A family is listed when a test has compared its projections with what its attention makes of them:
the same attribute name hides other layouts elsewhere (Falcon's query_key_value, CodeGen's qkv_proj)."""


def layout_of(config: PretrainedConfig, who: str) -> Layout:
    """The layout of a model's family; `who` it is stands in the error.

    Raises:
        BadInput: a family whose projections are not known.
    """
    family = config.get_text_config(decoder=True).model_type
    if family not in LAYOUTS:
        raise BadInput(
            f"losses.attention: the projections of {who}, family {family!r}, are not known, only those of "
            f"{', '.join(sorted(LAYOUTS))}; use one of these or leave attention out"
        )
    return LAYOUTS[family]


@contextmanager
def watch(model: nn.Module, layers: Sequence[int], kind: Kind) -> Iterator[Taps]:
    """A dict that the forward pass run inside fills; nothing is detached. Afterwards the model is as before.

    Args:
        model: a causal LM of a family in LAYOUTS; for maps with eager attention.
        layers: blocks counted from 0.
        kind: relation -> Relations; maps -> attention probabilities [B, H, T, T] (after dropout, where a model in training
            mode has any on them).

    Raises:
        BadInput: a family that is not known, or maps of a model whose attention is not eager.
    """
    config: Any = model.config
    layout = layout_of(config, type(model).__name__)
    kernel = config.get_text_config(decoder=True)._attn_implementation
    if kind == "maps" and kernel != "eager":
        raise BadInput(
            f"losses.attention.kind: maps, but {type(model).__name__} runs {kernel} attention, which never forms them; "
            'call set_attn_implementation("eager") or use kind: relation'
        )
    taken: Taps = {}
    handles: list[Any] = []
    blocks = decoder_blocks(model)
    try:
        for layer in dict.fromkeys(layers):
            attention = blocks[layer].get_submodule(layout.attention)
            if kind == "maps":
                handles.append(attention.register_forward_hook(_keep_maps(taken, layer)))
            else:
                handles.extend(_hook_projections(attention, layout, config, taken, layer))
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def _keep_maps(taken: Taps, layer: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        taken[layer] = output[1]

    return hook


def _hook_projections(
    attention: nn.Module, layout: Layout, config: PretrainedConfig, taken: Taps, layer: int
) -> Iterator[Any]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            outputs[name] = output
            if len(outputs) == len(layout.projections):
                taken[layer] = layout.split([outputs[name] for name in layout.projections], config)
                outputs.clear()

        return hook

    for name in layout.projections:
        yield attention.get_submodule(name).register_forward_hook(keep(name))
