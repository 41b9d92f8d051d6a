"""A narrower model cut out of a wide one: the most important neurons, key/value groups and residual channels, in their order.

    embedding, head         columns: channels                    norms            channels
    queries                 rows: heads of the kept groups       columns: channels
    keys, values            rows: kept groups                    columns: channels
    output of attention     rows: channels                       columns: heads of the kept groups
    gate, up                rows: neurons of the layer           columns: channels
    down                    rows: channels                       columns: neurons of the layer

Heads keep their size, which the configuration then states. Two things depend on the number of channels and are put right in the
weights. An RMS norm divides by the root mean square of what is left, so its weight is multiplied by
c = sqrt(sum over kept channels of E[x_c^2 / mean x^2] / kept), which keeps every channel as large as it was; for channels that
were always zero this is exact. Gemma multiplies its embedding by sqrt(hidden_size): the embedding takes up the difference,
and where the head is the same matrix the last norm gives it back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from edgestill.compress.importance import Calibration, WidthImportance, device_of, residual_norms, width_importance
from edgestill.compress.teachers import decoder_blocks
from edgestill.profiles.schema import NarrowSpec
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import Task


@dataclass(frozen=True)
class Family:
    """norm_offset: an RMS norm multiplies by offset + weight; scaled_embedding: by sqrt(hidden_size)."""

    norm_offset: float = 0.0
    scaled_embedding: bool = False


FAMILIES = {
    "gemma": Family(1.0, scaled_embedding=True),
    "gemma3_text": Family(1.0, scaled_embedding=True),
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}
"""Families whose modules are named and used as the table above says, by model_type."""
AXES: dict[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("queries", "channels"),
    "self_attn.k_proj": ("keys", "channels"),
    "self_attn.v_proj": ("keys", "channels"),
    "self_attn.o_proj": ("channels", "queries"),
    "mlp.gate_proj": ("neurons", "channels"),
    "mlp.up_proj": ("neurons", "channels"),
    "mlp.down_proj": ("channels", "neurons"),
}
"""What the rows and columns of a block's linear layers are; a bias has the rows."""


def head_size(config: PretrainedConfig) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def narrow_config(config: PretrainedConfig, spec: NarrowSpec, teacher: str) -> None:
    """Write the widths of `spec` into the configuration of the teacher of that name.

    Raises:
        BadInput: a family that cannot be narrowed, or a width larger than the teacher's.
    """
    if config.model_type not in FAMILIES:
        raise BadInput(
            f"student.narrow: teacher {teacher!r} is a {config.model_type}, which cannot be narrowed; the families that can are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    wide = {
        "intermediate_size": config.intermediate_size,
        "key_value_heads": shared,
        "hidden_size": config.hidden_size,
    }
    for name, has in wide.items():
        wanted = getattr(spec, name)
        if wanted is not None and wanted > has:
            raise BadInput(
                f"student.narrow.{name}: {wanted} is more than the {has} of teacher {teacher!r}; keep at most {has}"
            )
    config.head_dim = head_size(config)  # before hidden_size and the heads that it would be derived from
    config.intermediate_size = spec.intermediate_size or config.intermediate_size
    config.hidden_size = spec.hidden_size or config.hidden_size
    if spec.key_value_heads is not None:
        config.num_attention_heads = heads // shared * spec.key_value_heads
        config.num_key_value_heads = spec.key_value_heads


def narrow(
    model: PreTrainedModel, spec: NarrowSpec, calibration: Calibration, task: Task | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The narrower model, on the device of `model`, and notes for the log: widths, and the share of importance that is kept.

    Raises:
        BadInput: as `narrow_config`.
    """
    config = copy.deepcopy(model.config)
    narrow_config(config, spec, str(model.config.model_type))
    found = width_importance(model, model.config.num_key_value_heads, calibration, task)
    kept = _Kept.of(found, config)
    tensors = _cut(model, kept, model.config)
    if spec.hidden_size is not None:
        _put_right(tensors, model, kept, found, config)
    with torch.random.fork_rng(devices=[]):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    made.load_state_dict(tensors, strict=True)
    made.generation_config = model.generation_config
    widths = {name: getattr(config, name) for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    notes = {**widths, "num_key_value_heads": config.num_key_value_heads, "importance_kept": kept.shares(found)}
    return made.eval().to(device_of(model)), notes


@dataclass(frozen=True, eq=False)
class _Kept:
    """Indices that stay, int64 ascending: of residual channels, and per layer of neurons and key/value heads."""

    channels: Tensor
    neurons: list[Tensor]
    heads: list[Tensor]

    @classmethod
    def of(cls, found: WidthImportance, config: PretrainedConfig) -> _Kept:
        return cls(
            _largest(found.channels, config.hidden_size),
            [_largest(scores, config.intermediate_size) for scores in found.neurons],
            [_largest(scores, config.num_key_value_heads) for scores in found.heads],
        )

    def axes(self, layer: int, group: int, size: int) -> dict[str, Tensor]:
        """Indices along each axis of a block's weights: `group` query heads of `size` to a key/value head."""
        heads = self.heads[layer]
        queries = heads.unsqueeze(1) * group + torch.arange(group)
        return {
            "channels": self.channels,
            "neurons": self.neurons[layer],
            "keys": (heads.unsqueeze(1) * size + torch.arange(size)).flatten(),
            "queries": (queries.reshape(-1, 1) * size + torch.arange(size)).flatten(),
        }

    def shares(self, found: WidthImportance) -> dict[str, float]:
        """Summed score of what stays over that of all, over all layers."""
        pairs = {
            "channels": ([found.channels], [self.channels]),
            "neurons": (found.neurons, self.neurons),
            "heads": (found.heads, self.heads),
        }
        return {
            name: round(sum(float(s[k].sum()) for s, k in zip(scores, kept, strict=True)) / _total(scores), 6)
            for name, (scores, kept) in pairs.items()
        }


def _total(scores: list[Tensor]) -> float:
    return max(sum(float(s.sum()) for s in scores), 1e-300)


def _largest(scores: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` largest scores, ascending; of equal ones the earlier."""
    return torch.sort(scores, descending=True, stable=True).indices[:keep].sort().values


def _cut(model: nn.Module, kept: _Kept, config: PretrainedConfig) -> dict[str, Tensor]:
    """The state of the narrower model, norms and embedding not yet put right."""
    group, size = config.num_attention_heads // config.num_key_value_heads, head_size(config)
    names = {module: name for name, module in model.named_modules()}
    axes: dict[str, tuple[Tensor | None, ...]] = {}
    for i, block in enumerate(decoder_blocks(model)):
        along = kept.axes(i, group, size)
        axes |= {f"{names[block]}.{module}": tuple(along[axis] for axis in of) for module, of in AXES.items()}
    axes |= dict.fromkeys(residual_norms(model), (kept.channels,))
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]  # HF's
        axes[names[table]] = (None, kept.channels)
    tensors = {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach().cpu()
        for dimension, index in enumerate(axes.get(name.rpartition(".")[0], ())[: value.dim()]):
            value = value if index is None else value.index_select(dimension, index)
        tensors[name] = value
    return tensors


def _put_right(
    tensors: dict[str, Tensor], model: nn.Module, kept: _Kept, found: WidthImportance, config: PretrainedConfig
) -> None:
    """Norms and scaled embeddings for the smaller number of channels (module docstring), in place."""
    family = FAMILIES[str(config.model_type)]
    factors = {name: _norm_factor(power, kept.channels) for name, power in found.power.items()}
    if family.scaled_embedding:
        scale = math.sqrt(len(found.channels) / config.hidden_size)
        names = {module: name for name, module in model.named_modules()}
        table = f"{names[model.get_input_embeddings()]}.weight"  # type: ignore[operator]
        tensors[table] = tensors[table] * scale
        if config.tie_word_embeddings:
            head = f"{names[model.get_output_embeddings()]}.weight"  # type: ignore[operator]
            tensors[head] = tensors[table]
            factors[list(residual_norms(model))[-1]] /= scale
    _scale_norms(tensors, factors, family.norm_offset)


def _norm_factor(power: Tensor, channels: Tensor) -> float:
    """c of the module docstring."""
    return float(power[channels].mean().sqrt())


def _scale_norms(tensors: dict[str, Tensor], factors: Mapping[str, float], offset: float) -> None:
    for name, factor in factors.items():
        weight = tensors[f"{name}.weight"].double()
        tensors[f"{name}.weight"] = ((weight + offset) * factor - offset).float()
