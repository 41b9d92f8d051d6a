"""The student: from a configuration of its own, or from a teacher by keeping layers. Always a normal checkpoint.

`student_config` says what it will be, and refuses what cannot be, before anything is trained or allocated; `make_student`
gives it weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from edgestill.compress.layer_map import kept_layers
from edgestill.compress.teacher_files import read_config
from edgestill.compress.teachers import TeacherFacts, decoder_blocks
from edgestill.profiles.nearest import nearest
from edgestill.profiles.schema import StudentSpec
from edgestill.runtime.errors import BadInput

LAYER_FIELDS = ("num_hidden_layers", "n_layer", "num_layers")
"""Names of the depth in Hugging Face configurations."""
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)
"""Fields (under the family's own names) that count something."""


def student_config(spec: StudentSpec, teachers: list[TeacherFacts], vocabulary: int) -> PretrainedConfig:
    """The configuration of the student that the recipe describes; no weight is read or allocated.

    Raises:
        BadInput: an unknown model_type or field, sizes that do not fit together, a layer that is not there.
    """
    if spec.init == "config":
        return _own_config(dict(spec.config or {}), teachers[0], vocabulary)
    teacher = _source(spec, teachers)
    config = read_config(teacher.path, teacher.name, trust_remote_code=False)
    _keep_in_config(config, _kept(spec, teacher))
    config.vocab_size = vocabulary
    return config


def make_student(spec: StudentSpec, teachers: list[TeacherFacts], vocabulary: int, seed: int) -> PreTrainedModel:
    """A float32 student on the CPU with the teachers' vocabulary, special ids included.

    Args:
        vocabulary: real size of the shared tokenizer; a kept teacher's padded rows are cut off.

    Raises:
        BadInput: as `student_config`.
    """
    config = student_config(spec, teachers, vocabulary)
    if spec.init == "config":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model
    teacher = _source(spec, teachers)
    model = AutoModelForCausalLM.from_pretrained(teacher.path, dtype=torch.float32)
    _keep_layers(model, _kept(spec, teacher))
    if model.get_input_embeddings().weight.shape[0] != vocabulary:
        model.resize_token_embeddings(vocabulary)
    return model


# a configuration of its own -----------------------------------------------------------------------------------------


def _own_config(given: dict[str, Any], teacher: TeacherFacts, vocabulary: int) -> PretrainedConfig:
    if given.get("vocab_size", vocabulary) != vocabulary:
        raise BadInput(
            f"student.config.vocab_size: {given['vocab_size']}, but the teachers' tokenizer has {vocabulary} tokens; "
            "leave vocab_size out"
        )
    family = given.pop("model_type")
    try:
        plain = AutoConfig.for_model(family)
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"student.config.model_type: {family!r} is not known to transformers; for example llama"
        ) from error
    _check_fields(given, plain, family)
    source = read_config(teacher.path, teacher.name, trust_remote_code=teacher.trust_remote_code)
    ids = {name: getattr(source, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config: PretrainedConfig = AutoConfig.for_model(family, **{"vocab_size": vocabulary, **ids, **given})
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = str(error).split("\n")[0][:120]
        raise BadInput(f"student.config: no causal {family} can be made of it ({reason}); correct it") from error
    _check_heads(config)
    return config


def _check_fields(given: Mapping[str, Any], plain: PretrainedConfig, family: str) -> None:
    other_names = dict(plain.attribute_map)
    own = sorted((set(plain.to_dict()) - set(PretrainedConfig().to_dict())) | set(other_names))
    unknown = sorted(set(given) - set(plain.to_dict()) - set(other_names))
    if unknown:
        raise BadInput(f"student.config.{unknown[0]}: {family} has no such field; {nearest(unknown[0], own)}")
    for name in sorted({*SIZES, *(other_names[size] for size in SIZES if size in other_names)} & set(given)):
        value = given[name]
        if value is not None and (type(value) is not int or value < 1):
            raise BadInput(f"student.config.{name}: {value!r} is out of range; give a whole number of at least 1")


def _check_heads(config: PretrainedConfig) -> None:
    """What transformers finds out only when the model runs."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    if heads % shared:
        raise BadInput(
            f"student.config.num_attention_heads: {heads} heads cannot share {shared} key/value heads evenly; "
            "make num_attention_heads a multiple of num_key_value_heads"
        )
    rotary = any(hasattr(text, name) for name in ("rope_theta", "rope_parameters", "rotary_pct"))
    if rotary and size % 2:
        raise BadInput(
            f"student.config.num_attention_heads: heads of {size} ({text.hidden_size} / {heads}) cannot be rotated in pairs; "
            "make hidden_size / num_attention_heads even"
        )


# layers of a teacher ------------------------------------------------------------------------------------------------


def _source(spec: StudentSpec, teachers: list[TeacherFacts]) -> TeacherFacts:
    return next(t for t in teachers if t.name == spec.init.removeprefix("teacher:"))


def _kept(spec: StudentSpec, teacher: TeacherFacts) -> list[int]:
    """The teacher's layers that the student keeps, ascending."""
    keep = spec.keep_layers or kept_layers(teacher.n_layers, spec.layers or teacher.n_layers)
    if keep[-1] >= teacher.n_layers:
        raise BadInput(
            f"student.keep_layers: layer {keep[-1]} does not exist; teacher {teacher.name!r} has 0 to {teacher.n_layers - 1}"
        )
    return keep


def _keep_in_config(config: PretrainedConfig, keep: list[int]) -> None:
    for field in LAYER_FIELDS:
        if hasattr(config, field):
            setattr(config, field, len(keep))
            break
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in keep]


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
                setattr(module, "layer_idx", i)  # noqa: B010  (an int; torch types every module attribute as a tensor)
    config = copy.deepcopy(model.config)
    _keep_in_config(config, keep)
    model.config = config
    for module in model.modules():
        if isinstance(getattr(module, "config", None), type(config)):
            module.config = config


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
