"""The student: from a configuration of its own, or from a teacher that is cut down. Always a checkpoint of its family.

`student_config` says what it will be, and refuses what cannot be, before anything is trained or allocated; `make_student`
gives it weights. A teacher loses layers first (layer_choice.py), then width (narrow.py), then rank (low_rank.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from edgestill.compress.importance import Calibration
from edgestill.compress.layer_choice import block_influence, most_influential, remove_one_by_one
from edgestill.compress.layer_map import kept_layers
from edgestill.compress.local_distillation import make_low_rank
from edgestill.compress.low_rank import FIELD as LOW_RANK
from edgestill.compress.low_rank import plan_low_rank
from edgestill.compress.narrow import narrow, narrow_config
from edgestill.compress.packing import Part
from edgestill.compress.teacher_files import read_config
from edgestill.compress.teachers import TeacherFacts, decoder_blocks
from edgestill.profiles.nearest import nearest
from edgestill.profiles.schema import StudentSpec
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import Task

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


CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class NewStudent:
    """A student before training, float32 on the CPU, in evaluation mode.

    origin: the teacher's layer that each layer was copied from; None for a student from scratch. notes: JSON-able facts for the
    log: layers, and as far as they were asked for block_influence, removed, narrow, low_rank.
    """

    model: PreTrainedModel
    origin: tuple[int, ...] | None
    notes: dict[str, Any]


def student_config(spec: StudentSpec, teachers: list[TeacherFacts], vocabulary: int) -> PretrainedConfig:
    """The configuration of the student that the recipe describes; no weight is read or allocated.

    Where calibration text chooses the layers, it is that of as many evenly spaced ones.

    Raises:
        BadInput: an unknown model_type or field, sizes that do not fit together, a layer that is not there, more than the
            teacher has, a family that cannot be narrowed or factored.
    """
    if spec.choose != "uniform" and spec.layers is None:
        raise BadInput(
            f"student.choose: {spec.choose} chooses among a teacher's layers; give `layers`, or remove choose"
        )
    if spec.init == "config":
        return _own_config(dict(spec.config or {}), teachers[0], vocabulary)
    teacher = _source(spec, teachers)
    config = read_config(teacher.path, teacher.name, trust_remote_code=False)
    if getattr(config, LOW_RANK, None) is not None:
        raise BadInput(
            f"student.init: teacher {teacher.name!r} has low-rank layers, which are not cut again; start from a plain model"
        )
    _keep_in_config(config, _kept(spec, teacher))
    config.vocab_size = vocabulary
    if spec.narrow is not None:
        narrow_config(config, spec.narrow, teacher.name)
    if spec.low_rank is not None:
        plan_low_rank(config, spec.low_rank, teacher.name)
    return config


def make_student(
    spec: StudentSpec,
    teachers: list[TeacherFacts],
    vocabulary: int,
    seed: int,
    *,
    text: Part | None = None,
    device: torch.device = CPU,
    task: Task | None = None,
) -> NewStudent:
    """A student with the teachers' vocabulary, special ids included. The global random state is left as it was.

    Args:
        vocabulary: real size of the shared tokenizer; a kept teacher's padded rows are cut off.
        text: the training part; only read where importance is measured (choose, narrow, low_rank).
        device: where it is measured.
        task: advanced by calibration tokens, once per pass; its note says what is measured.

    Raises:
        BadInput: as `student_config`.
        ValueError: importance is to be measured, and there is no text.
    """
    with torch.random.fork_rng(devices=[]):
        config = student_config(spec, teachers, vocabulary)
        torch.manual_seed(seed)
        if spec.init == "config":
            return NewStudent(AutoModelForCausalLM.from_config(config), None, {})
        calibration = _calibration(spec, text)
        return _cut_down(spec, _source(spec, teachers), vocabulary, seed, calibration, device, task)


def _cut_down(
    spec: StudentSpec,
    teacher: TeacherFacts,
    vocabulary: int,
    seed: int,
    calibration: Calibration | None,
    device: torch.device,
    task: Task | None,
) -> NewStudent:
    """The teacher with fewer layers, then less width, then less rank."""
    model = AutoModelForCausalLM.from_pretrained(teacher.path, dtype=torch.float32).to(device)
    kept, notes = _chosen(spec, teacher, model, calibration, task)
    _keep_layers(model, kept)
    if model.get_input_embeddings().weight.shape[0] != vocabulary:
        model.resize_token_embeddings(vocabulary)
    if spec.narrow is not None and calibration is not None:
        model, notes["narrow"] = narrow(model, spec.narrow, calibration, task)
    if spec.low_rank is not None and calibration is not None:
        notes["low_rank"] = make_low_rank(model, spec.low_rank, calibration, seed, task)
    return NewStudent(model.eval().to(CPU), tuple(kept), notes)


def _calibration(spec: StudentSpec, text: Part | None) -> Calibration | None:
    """The windows on which importance is measured, or None where nothing is."""
    if spec.choose == "uniform" and spec.narrow is None and spec.low_rank is None:
        return None
    if text is None:
        raise ValueError("importance is measured on the training part; pass `text`")
    return Calibration.of(text, spec.calibration_tokens)


def _chosen(
    spec: StudentSpec,
    teacher: TeacherFacts,
    model: PreTrainedModel,
    calibration: Calibration | None,
    task: Task | None,
) -> tuple[list[int], dict[str, Any]]:
    """The layers to keep, ascending, and what is to be said of the choice."""
    kept = _kept(spec, teacher)
    notes: dict[str, Any] = {}
    if spec.choose == "block_influence" and calibration is not None:
        influence = block_influence(model, calibration, task)
        kept, notes["block_influence"] = most_influential(influence, len(kept)), [round(x, 6) for x in influence]
    elif spec.choose == "iterative" and calibration is not None:
        kept, removals = remove_one_by_one(model, teacher, calibration, len(kept), task)
        notes["removed"] = [asdict(removal) for removal in removals]
    return kept, {"layers": kept, **notes}


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
