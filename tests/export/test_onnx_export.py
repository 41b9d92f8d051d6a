"""The export through Optimum: what the graph takes and gives, what is refused, and that nothing else is disturbed."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import Export
from tiny import SIZES, write_model
from transformers import AutoConfig, AutoModelForCausalLM

from edgestill.export.onnx_export import describe_graph, export_onnx
from edgestill.runtime.errors import BadInput
from edgestill.runtime.manifest import TensorSpec


@pytest.mark.parametrize("family", SIZES)
def test_graph_takes_tokens_and_a_growing_cache(family: str, exported: Export) -> None:
    _, export = exported(family)
    heads, past, new = export.facts.n_kv_heads, "past_sequence_length", "sequence_length"
    size = export.facts.head_size
    inputs = {spec.name: spec for spec in export.graph.inputs}
    outputs = {spec.name: spec for spec in export.graph.outputs}
    sides = [f"{layer}.{side}" for layer in range(2) for side in ("key", "value")]
    if family == "gemma":  # Optimum lets it count positions itself
        inputs["position_ids"] = TensorSpec("position_ids", "int64", ("batch_size", new))
    assert inputs == {
        "input_ids": TensorSpec("input_ids", "int64", ("batch_size", new)),
        "attention_mask": TensorSpec("attention_mask", "int64", ("batch_size", f"{past} + {new}")),
        "position_ids": TensorSpec("position_ids", "int64", ("batch_size", new)),
    } | {
        f"past_key_values.{s}": TensorSpec(f"past_key_values.{s}", "float32", ("batch_size", heads, past, size))
        for s in sides
    }
    present = f"{past} + {new}"
    assert outputs == {"logits": TensorSpec("logits", "float32", ("batch_size", new, 320))} | {
        f"present.{s}": TensorSpec(f"present.{s}", "float32", ("batch_size", heads, present, size)) for s in sides
    }
    assert (export.graph.file, export.graph.cache) == ("model.onnx", "growing")
    assert [path.name for path in export.path.parent.iterdir()] == ["model.onnx"]


def test_the_same_checkpoint_gives_the_same_bytes(exported: Export, tmp_path: Path) -> None:
    checkpoint, export = exported("llama")
    assert export_onnx(checkpoint, tmp_path).path.read_bytes() == export.path.read_bytes()


def test_a_vocabulary_wider_than_the_tokenizer(tmp_path: Path) -> None:
    export = export_onnx(write_model(tmp_path / "checkpoint", vocab=512), tmp_path / "onnx")
    assert export.facts.vocab_size == 512
    assert export.graph.outputs[0].shape[-1] == 512


def test_random_state_and_loggers_are_left_as_they_were(exported: Export, tmp_path: Path) -> None:
    checkpoint, _ = exported("gpt2")
    loggers = [logging.getLogger(name) for name in ("", "optimum", "transformers")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    export_onnx(checkpoint, tmp_path)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state()) == states[1]
    assert random.getstate() == states[2]
    assert [(logger.level, list(logger.handlers)) for logger in loggers] == before


def test_a_model_that_optimum_cannot_export_is_named(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "biogpt", vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(BadInput, match="'biogpt' has no ONNX export with a cache"):
        export_onnx(tmp_path / "checkpoint", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
    with pytest.raises(BadInput, match="no safetensors weights"):
        export_onnx(checkpoint, tmp_path / "onnx")
    assert list((tmp_path / "onnx").iterdir()) == []


def test_describe_graph_reads_what_export_wrote(exported: Export) -> None:
    _, export = exported("llama")
    assert describe_graph(export.path) == export.graph
    assert describe_graph(export.path, "portable/model.onnx").file == "portable/model.onnx"
