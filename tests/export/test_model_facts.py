"""Facts of checkpoints against what their files hold, and sizes of models that are never allocated."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import SIZES, read_json, write_model

from edgestill.export.model_facts import facts_of_checkpoint, size_of_config
from edgestill.runtime.errors import BadInput


def _stored_elements(checkpoint: Path) -> int:
    with safe_open(checkpoint / "model.safetensors", framework="numpy") as handle:
        return sum(prod(handle.get_slice(name).get_shape()) for name in handle.keys())  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize("family", SIZES)
def test_facts_are_those_of_the_files(family: str, tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path, family, width=32, layers=3, max_tokens=96)
    facts = facts_of_checkpoint(checkpoint)
    assert facts.parameters == _stored_elements(checkpoint)  # a tied head is stored once
    heads = SIZES[family].get("num_attention_heads", 4)
    assert (facts.model_type, facts.n_layers, facts.n_heads, facts.hidden_size) == (family, 3, heads, 32)
    assert facts.n_kv_heads == SIZES[family].get("num_key_value_heads", heads)
    assert facts.head_size == SIZES[family].get("head_dim", 32 // heads)
    assert (facts.max_tokens, facts.vocab_size) == (96, 320)
    assert (facts.bos_token_id, facts.eos_token_ids) == (0, (0,))


def test_grouped_heads_are_counted_as_the_cache_holds_them(tmp_path: Path) -> None:
    assert facts_of_checkpoint(write_model(tmp_path / "l", "llama", num_key_value_heads=1)).n_kv_heads == 1
    assert facts_of_checkpoint(write_model(tmp_path / "g", "gpt2")).n_kv_heads == 4


def test_mask_buffers_in_old_checkpoints_are_no_parameters(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path, "gpt2")
    before = facts_of_checkpoint(checkpoint).parameters
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(
        {**tensors, "transformer.h.0.attn.bias": np.ones((1, 1, 128, 128), np.float32)},
        checkpoint / "model.safetensors",
    )
    assert facts_of_checkpoint(checkpoint).parameters == before


def test_generation_config_names_the_stop_tokens(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path)
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**read_json(path), "eos_token_id": [7, 3]}))
    assert facts_of_checkpoint(checkpoint).eos_token_ids == (7, 3)
    path.unlink()
    assert facts_of_checkpoint(checkpoint).eos_token_ids == (0,)


def test_size_of_a_model_that_would_not_fit() -> None:
    size = size_of_config(
        {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
        }
    )
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert size.parameters == 2 * 32000 * 4096 + 32 * layer + 4096 == 6_738_415_616
    assert size.embedding_parameters == 32000 * 4096
    assert not size.head_tied
    assert (size.n_layers, size.n_kv_heads, size.head_size, size.hidden_size) == (32, 32, 128, 4096)
    assert (size.vocab_size, size.max_tokens) == (32000, 4096)


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", True), ("gpt2", True), ("gpt_neox", False)])
def test_tied_heads_are_seen(family: str, tied: bool, tmp_path: Path) -> None:
    config = read_json(write_model(tmp_path, family) / "config.json")
    assert size_of_config(config).head_tied is tied


def test_an_unknown_model_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "megabrain"}')
    with pytest.raises(BadInput, match="'megabrain' cannot be loaded"):
        facts_of_checkpoint(tmp_path)
    with pytest.raises(BadInput, match="'megabrain'"):
        size_of_config({"model_type": "megabrain"})


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "t5"},
        {"model_type": "llama", "hidden_size": "wide"},
        {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0},
    ],
)
def test_configs_that_make_no_language_model_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(BadInput, match="no causal language model"):
        size_of_config(fields)


def test_a_folder_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no config\.json"):
        facts_of_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match="not JSON"):
        facts_of_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(BadInput, match="holds a list"):
        facts_of_checkpoint(tmp_path)


def test_a_config_without_a_length_is_refused() -> None:
    with pytest.raises(BadInput, match="max_position_embeddings None"):
        size_of_config({"model_type": "bloom", "hidden_size": 16, "n_head": 2, "n_layer": 1, "vocab_size": 32})
