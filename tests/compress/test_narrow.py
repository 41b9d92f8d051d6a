"""Narrowing: what is planted as useless goes and nothing changes, importance by hand, normal checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cutting import FAMILIES, facts_of, logits_of, some_calibration, some_text, write_teacher
from transformers import AutoModelForCausalLM

from edgestill.compress.importance import width_importance
from edgestill.compress.narrow import narrow
from edgestill.compress.student import make_student
from edgestill.compress.teachers import decoder_blocks
from edgestill.profiles.schema import NarrowSpec, StudentSpec

CALIBRATION = some_calibration()
HEAD = {"gemma": 8, "gemma3_text": 8, "qwen3": 16}
"""Where it is not 32 channels / 4 heads = 8 by the configuration."""


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def offset(family: str) -> float:
    """Gemma's norms multiply by 1 + weight."""
    return 1.0 if family.startswith("gemma") else 0.0


@torch.no_grad()
def plant(model: Any, family: str) -> None:
    """Neuron 5 of layer 0 and 7 of layer 1, the first group of layer 0 and the second of layer 1, channels 3 and 30: nothing."""
    size = HEAD.get(family, 8)
    for layer, (neuron, group) in enumerate([(5, 0), (7, 1)]):
        block = decoder_blocks(model)[layer]
        block.mlp.up_proj.weight[neuron] = 0
        rows = slice(group * size, (group + 1) * size)
        block.self_attn.v_proj.weight[rows] = 0
        if block.self_attn.v_proj.bias is not None:
            block.self_attn.v_proj.bias[rows] = 0
    for channel in (3, 30):
        model.get_input_embeddings().weight[:, channel] = 0
        for block in decoder_blocks(model):
            for writer in (block.self_attn.o_proj, block.mlp.down_proj):
                writer.weight[channel] = 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "widths",
    [
        {"intermediate_size": 47},
        {"key_value_heads": 1},
        {"hidden_size": 30},
        {"intermediate_size": 47, "hidden_size": 30},
    ],
    ids=["neurons", "heads", "channels", "both"],
)
def test_what_does_nothing_goes_and_nothing_changes(tmp_path: Path, family: str, widths: dict[str, int]) -> None:
    model = load(write_teacher(tmp_path, family, layers=2))
    plant(model, family)
    before = logits_of(model, CALIBRATION)
    narrower, notes = narrow(model, NarrowSpec(**widths), CALIBRATION, None)
    torch.testing.assert_close(logits_of(narrower, CALIBRATION), before, atol=2e-4, rtol=2e-5)
    assert before.std() > 0.5
    assert all(share == pytest.approx(1, abs=1e-6) for share in notes["importance_kept"].values())
    narrower.save_pretrained(tmp_path / "narrow")
    again = load(tmp_path / "narrow")
    assert torch.equal(logits_of(again, CALIBRATION), logits_of(narrower, CALIBRATION))
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    found = (config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"], config["head_dim"])
    kv = widths.get("key_value_heads", 2)
    assert found == (widths.get("hidden_size", 32), widths.get("intermediate_size", 48), kv, HEAD.get(family, 8))
    assert config["num_attention_heads"] == 2 * kv
    assert notes["num_attention_heads"] == 2 * kv
    tied = narrower.get_output_embeddings().weight is narrower.get_input_embeddings().weight
    assert tied == (family in ("llama", "qwen2", "gemma", "gemma3_text"))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_scores_are_those_of_the_definition(tmp_path: Path, family: str) -> None:
    model = load(write_teacher(tmp_path, family, layers=2))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("down_proj", "o_proj", "layernorm", "model.norm")):
            module.register_forward_hook(lambda m, a, o, name=name: seen.__setitem__(name, (a[0], o)))
    logits_of(model, CALIBRATION)
    found = width_importance(model, 2, CALIBRATION, None)
    for layer in range(2):
        activation = seen[f"model.layers.{layer}.mlp.down_proj"][0].double()
        torch.testing.assert_close(found.neurons[layer], activation.abs().mean(1).norm(dim=0), atol=0, rtol=1e-5)
        heads = seen[f"model.layers.{layer}.self_attn.o_proj"][0].double().unflatten(-1, (2, -1))
        torch.testing.assert_close(found.heads[layer], heads.norm(dim=-1).mean(1).norm(dim=0), atol=0, rtol=1e-5)
    norms = {name: pair for name, pair in seen.items() if name.endswith("norm")}
    assert len(norms) == (9 if family == "gemma3_text" else 5)
    theirs = sum(out.double().abs().mean(1).norm(dim=0) for _, out in norms.values())
    torch.testing.assert_close(found.channels, theirs, atol=0, rtol=1e-5)
    assert set(found.power) == set(norms)
    for name, (given, _) in norms.items():
        square = given.double().square()
        theirs = (square / square.mean(-1, keepdim=True)).mean((0, 1))
        torch.testing.assert_close(found.power[name], theirs, atol=0, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_the_most_important_are_kept_in_their_order(tmp_path: Path, family: str) -> None:
    model = load(write_teacher(tmp_path, family, layers=2))
    found = width_importance(model, 2, CALIBRATION, None)
    narrower, notes = narrow(
        model, NarrowSpec(intermediate_size=20, key_value_heads=1, hidden_size=12), CALIBRATION, None
    )
    channels = found.channels.argsort(descending=True)[:12].sort().values
    for layer in range(2):
        wide, thin = decoder_blocks(model)[layer], decoder_blocks(narrower)[layer]
        neurons = found.neurons[layer].argsort(descending=True)[:20].sort().values
        group = int(found.heads[layer].argmax())
        size = 8
        keys, queries = range(group * size, (group + 1) * size), range(2 * group * size, 2 * (group + 1) * size)
        attention = wide.self_attn
        for ours, theirs, rows, columns in (
            (thin.mlp.gate_proj, wide.mlp.gate_proj, neurons, channels),
            (thin.mlp.up_proj, wide.mlp.up_proj, neurons, channels),
            (thin.mlp.down_proj, wide.mlp.down_proj, channels, neurons),
            (thin.self_attn.q_proj, attention.q_proj, list(queries), channels),
            (thin.self_attn.k_proj, attention.k_proj, list(keys), channels),
            (thin.self_attn.v_proj, attention.v_proj, list(keys), channels),
            (thin.self_attn.o_proj, attention.o_proj, channels, list(queries)),
        ):
            assert torch.equal(ours.weight, theirs.weight[rows][:, columns])
            assert ours.bias is None or torch.equal(ours.bias, theirs.bias[rows])
        c = found.power[f"model.layers.{layer}.input_layernorm"][channels].mean().sqrt()
        expected = (wide.input_layernorm.weight[channels] + offset(family)) * c - offset(family)
        torch.testing.assert_close(thin.input_layernorm.weight, expected, atol=1e-6, rtol=1e-6)
    shares = notes["importance_kept"]
    assert shares["channels"] == pytest.approx((found.channels[channels].sum() / found.channels.sum()).item(), abs=1e-6)
    assert 0.25 < shares["neurons"] < 1
    assert 0.5 <= shares["heads"] < 1


def test_a_width_that_is_not_named_stays_untouched(tmp_path: Path) -> None:
    model = load(write_teacher(tmp_path, layers=2))
    narrower, _ = narrow(model, NarrowSpec(intermediate_size=24), CALIBRATION, None)
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
        assert torch.equal(narrower.state_dict()[name], model.state_dict()[name])


def test_keeping_everything_is_the_teacher(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path, "qwen2")
    spec = StudentSpec(init="teacher:big", narrow=NarrowSpec(hidden_size=32, intermediate_size=48, key_value_heads=2))
    made = make_student(spec, [facts_of(folder)], 263, 0, text=some_text())
    torch.testing.assert_close(logits_of(made.model, CALIBRATION), logits_of(load(folder), CALIBRATION))
    assert made.origin == (0, 1, 2)
