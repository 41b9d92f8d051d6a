"""genai_config.json names what the graph has and says what the model is."""

from __future__ import annotations

import dataclasses

import pytest
from export_helpers import Export
from tiny import SIZES

from edgestill.export.genai_config import genai_config


@pytest.mark.parametrize("family", SIZES)
def test_names_are_those_of_the_graph(family: str, exported: Export) -> None:
    _, export = exported(family)
    decoder = genai_config(export.facts, export.graph)["model"]["decoder"]
    for side, specs in (("inputs", export.graph.inputs), ("outputs", export.graph.outputs)):
        named = {name % layer if "%d" in name else name for name in decoder[side].values() for layer in range(2)}
        assert named == {spec.name for spec in specs}
    shape = next(spec.shape for spec in export.graph.inputs if spec.name == "past_key_values.0.key")
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (shape[1], shape[3])
    assert (decoder["num_hidden_layers"], decoder["filename"]) == (2, "model.onnx")


def test_an_input_that_the_graph_lacks_is_not_named(exported: Export) -> None:
    _, export = exported("llama")
    fewer = tuple(spec for spec in export.graph.inputs if spec.name != "position_ids")
    config = genai_config(export.facts, dataclasses.replace(export.graph, inputs=fewer))
    assert "position_ids" not in config["model"]["decoder"]["inputs"]


@pytest.mark.parametrize(("family", "kind"), [("llama", "llama"), ("gpt2", "decoder"), ("gpt_neox", "decoder")])
def test_types_that_genai_knows_by_another_layout_are_plain_decoders(family: str, kind: str, exported: Export) -> None:
    _, export = exported(family)
    assert genai_config(export.facts, export.graph)["model"]["type"] == kind


def test_tokens_lengths_and_cache(exported: Export) -> None:
    _, export = exported("llama")
    facts = dataclasses.replace(export.facts, bos_token_id=None, eos_token_ids=(7, 3), max_tokens=99)
    config = genai_config(facts, dataclasses.replace(export.graph, cache="shared"), threads=3)
    model = config["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (7, [7, 3], 7)
    assert (model["context_length"], config["search"]["max_length"]) == (99, 99)
    assert config["search"]["past_present_share_buffer"] is True
    assert model["decoder"]["session_options"]["intra_op_num_threads"] == 3
    plain = genai_config(export.facts, export.graph)
    assert plain["model"]["eos_token_id"] == 0
    assert plain["search"]["past_present_share_buffer"] is False
