"""Queries, keys and values as the attention really uses them, for every family that is listed; maps as transformers gives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import SIZES
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from edgestill.compress.attention_taps import LAYOUTS, Relations, projection_widths, watch
from edgestill.compress.teachers import decoder_blocks
from edgestill.runtime.errors import BadInput

WIDTH, HEADS, LAYERS, VOCAB = 48, 4, 2, 61
OUTPUT = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}
"""Families -> where heads are mixed, if not self_attn.o_proj."""


def model(family: str) -> PreTrainedModel:
    fields: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "gpt2":
        fields |= SIZES["gpt2"] | {"n_embd": WIDTH, "n_layer": LAYERS, "n_positions": 32}
    else:
        fields |= {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
        fields |= {"intermediate_size": 64, "max_position_embeddings": 32}
        known = AutoConfig.for_model(family)
        small = {"num_key_value_heads": 2, "head_dim": 12, "word_embed_proj_dim": WIDTH, "ffn_dim": 64}
        small |= {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
        fields |= {name: value for name, value in small.items() if hasattr(known, name)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.3)
    return made.eval()


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def tap(watched: PreTrainedModel, layers: list[int], **arguments: Any) -> dict[int, Relations]:
    with torch.no_grad(), watch(watched, layers, "relation") as taken:
        watched(input_ids=tokens(), use_cache=False, **arguments)
    assert all(isinstance(found, Relations) for found in taken.values())
    return taken  # type: ignore[return-value]


@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_every_family_gives_its_widths_and_its_maps(family: str) -> None:
    watched = model(family)
    wide, narrow = projection_widths(watched.config)
    assert (wide, narrow) == (WIDTH, WIDTH // 2 if hasattr(watched.config, "num_key_value_heads") else WIDTH)
    taken = tap(watched, [1])
    assert list(taken) == [1]
    assert [part.shape for part in taken[1]] == [(2, 9, wide), (2, 9, narrow), (2, 9, narrow)]
    watched.set_attn_implementation("eager")
    with torch.no_grad(), watch(watched, [0, 1], "maps") as maps:
        theirs = watched(input_ids=tokens(), output_attentions=True).attentions
    for layer in range(LAYERS):
        ours = maps[layer]
        assert isinstance(ours, Tensor)
        assert ours.shape == (2, HEADS, 9, 9)
        assert torch.equal(ours, theirs[layer])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3"])
def test_queries_and_keys_make_the_maps_and_values_the_output(family: str) -> None:
    """Without turning (all positions 0) the maps must follow from the taps; the first token's output is its value."""
    watched = model(family)
    watched.set_attn_implementation("eager")
    mixed = []
    output = decoder_blocks(watched)[1].get_submodule(OUTPUT.get(family, "self_attn.o_proj"))
    handle = output.register_forward_pre_hook(lambda module, arguments: mixed.append(arguments[0]))
    with watch(watched, [1], "maps") as maps:
        still = {} if family == "gpt2" else {"position_ids": torch.zeros_like(tokens())}
        taken = tap(watched, [1], attention_mask=torch.ones_like(tokens()), **still)
    handle.remove()
    query, key, value = (part.view(2, 9, -1, WIDTH // HEADS).transpose(1, 2) for part in taken[1])
    key, value = (part.repeat_interleave(HEADS // part.shape[1], dim=1) for part in (key, value))
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).masked_fill(future, float("-inf"))
    torch.testing.assert_close(maps[1], scores.softmax(-1))
    assert maps[1].amax(-1)[:, :, 4:].max() > 0.5  # not so flat that anything would fit
    torch.testing.assert_close(mixed[0][:, 0], value[:, :, 0].flatten(1))
    torch.testing.assert_close(mixed[0], (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def test_gradients_flow_and_no_hook_stays() -> None:
    watched = model("gpt_neox")
    with watch(watched, [0, 1, 1], "relation") as taken:
        watched(input_ids=tokens())
    assert sorted(taken) == [0, 1]
    found = taken[1]
    assert isinstance(found, Relations)
    found.key.square().sum().backward()
    blocks = decoder_blocks(watched)
    gradient = blocks[1].get_submodule("attention.query_key_value").weight.grad
    heads = gradient.view(HEADS, 3, WIDTH // HEADS, WIDTH).abs().sum((0, 2, 3))
    assert heads[1] > 0 == heads[0] == heads[2]
    with pytest.raises(IndexError), watch(watched, [1], "relation"):
        watched(input_ids=tokens() + VOCAB)
    assert not any(module._forward_hooks for module in watched.modules())


def test_what_cannot_be_watched() -> None:
    fields = {"hidden_size": 16, "n_head": 2, "n_layer": 1, "vocab_size": 8}
    bloom = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **fields))
    with pytest.raises(
        BadInput, match=r"BloomForCausalLM, family 'bloom', are not known, only those of cohere, .*phi3"
    ):
        tap(bloom, [0])
    with (
        pytest.raises(BadInput, match=r"maps, but LlamaForCausalLM runs sdpa attention.*set_attn_implementation"),
        watch(model("llama"), [0], "maps"),
    ):
        pass
