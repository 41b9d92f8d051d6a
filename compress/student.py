"""The student: from a configuration of its own, or from a teacher by keeping layers. Always a normal checkpoint."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from edgestill.compress.layer_map import kept_layers
from edgestill.compress.teachers import TeacherFacts, decoder_blocks
from edgestill.profiles.schema import StudentSpec
from edgestill.runtime.errors import BadInput

LAYER_FIELDS = ("num_hidden_layers", "n_layer", "num_layers")
"""Names of the depth in Hugging Face configurations."""


def make_student(spec: StudentSpec, teachers: list[TeacherFacts], vocabulary: int, seed: int) -> PreTrainedModel:
    """A float32 student on the CPU with the teachers' vocabulary, special ids included.

    Args:
        vocabulary: real size of the shared tokenizer; a kept teacher's padded rows are cut off.

    Raises:
        BadInput: an unknown model_type or field, a layer that is not there.
    """
    if spec.init == "config":
        return _from_config(dict(spec.config or {}), teachers[0], vocabulary, seed)
    facts = next(t for t in teachers if t.name == spec.init.removeprefix("teacher:"))
    model = AutoModelForCausalLM.from_pretrained(facts.path, dtype=torch.float32)
    keep = spec.keep_layers or kept_layers(facts.n_layers, spec.layers or facts.n_layers)
    if keep[-1] >= facts.n_layers:
        raise BadInput(f"student.keep_layers: layer {keep[-1]} does not exist; teacher has 0 to {facts.n_layers - 1}")
    _keep_layers(model, keep)
    if model.get_input_embeddings().weight.shape[0] != vocabulary:
        model.resize_token_embeddings(vocabulary)
    return model


def _from_config(fields: dict[str, Any], teacher: TeacherFacts, vocabulary: int, seed: int) -> PreTrainedModel:
    source = AutoConfig.from_pretrained(teacher.path)
    fields = {
        "vocab_size": vocabulary,
        "bos_token_id": source.bos_token_id,
        "eos_token_id": source.eos_token_id,
        "pad_token_id": source.pad_token_id,
        **fields,
    }
    if fields["vocab_size"] != vocabulary:
        raise BadInput(
            f"student.config.vocab_size: {fields['vocab_size']}, but the teachers' tokenizer has {vocabulary} tokens; "
            "leave vocab_size out"
        )
    family = fields.pop("model_type")
    try:
        config = AutoConfig.for_model(family, **fields)
    except ValueError as error:
        raise BadInput(
            f"student.config.model_type: {family!r} is not known to transformers; for example llama"
        ) from error
    known = config.to_dict().keys() | type(config).attribute_map.keys()
    unknown = sorted(set(fields) - set(AutoConfig.for_model(family).to_dict()) - set(type(config).attribute_map))
    if unknown:
        raise BadInput(f"student.config.{unknown[0]}: {family} has no such field; known are {', '.join(sorted(known))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _keep_layers(model: PreTrainedModel, keep: list[int]) -> None:
    """Drop all blocks but `keep`, in place; configuration and per-layer cache indices follow."""
    blocks = decoder_blocks(model)
    kept = nn.ModuleList(blocks[i] for i in keep)
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is blocks:
                setattr(parent, name, kept)
    for i, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
    config = copy.deepcopy(model.config)
    for field in LAYER_FIELDS:
        if hasattr(config, field):
            setattr(config, field, len(keep))
            break
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in keep]
    model.config = config
    for module in model.modules():
        if isinstance(getattr(module, "config", None), type(config)):
            module.config = config


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
