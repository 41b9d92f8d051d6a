"""Linear layers as products of two thin ones, and checkpoints that hold them.

    y = W x + b   ->   y = E (R x) + b          R [rank, in], E [out, rank]

R and E are the best of their rank for the layer's inputs (moments.low_rank_factors). A layer that would not become smaller stays
as it is, and so do the experts of a mixture, which see other tokens than they used to.

config.json names the ranks under `edgestill_low_rank`, and `load_student` rebuilds the layers. R is stored under the name of the
weight that it replaces, in another shape: transformers alone stops with a size mismatch and never runs on random weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edgestill.compress.moments import low_rank_factors
from edgestill.compress.teachers import decoder_blocks
from edgestill.profiles.schema import LowRankSpec
from edgestill.runtime.errors import BadInput

FIELD = "edgestill_low_rank"
"""Of config.json: {"rank": {module name: rank}}."""


class LowRankLinear(nn.Module):
    """E (R x) + b. weight: R [rank, in]; expand: the linear layer of E [out, rank] and b."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = inputs, outputs, rank
        self.weight = nn.Parameter(torch.empty(rank, inputs))
        self.expand = nn.Linear(rank, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y: Tensor = self.expand(nn.functional.linear(x, self.weight))
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


# which layers, which ranks ------------------------------------------------------------------------------------------


def choose_ranks(model: nn.Module, spec: LowRankSpec, teacher: str) -> dict[str, int]:
    """Module name -> rank of every linear layer of the blocks that becomes smaller. Shapes alone are read.

    Raises:
        BadInput: a family without linear layers (GPT-2's Conv1D), or a fraction at which none becomes smaller.
    """
    blocks = decoder_blocks(model)
    lists = [part for block in blocks for part in block.modules() if isinstance(part, nn.ModuleList)]
    inside = {id(module) for module in blocks.modules()} - {id(module) for part in lists for module in part.modules()}
    named = [(name, module) for name, module in model.named_modules() if id(module) in inside]
    kind = type(model).__name__
    if any(isinstance(module, Conv1D) for _, module in named):
        raise BadInput(
            f"student.low_rank: teacher {teacher!r} ({kind}) keeps its layers as Conv1D, which are not factored; start from a "
            "family of linear layers like llama or qwen2, or remove low_rank"
        )
    ranks = {}
    for name, module in named:
        if isinstance(module, nn.Linear):
            inputs, outputs = module.in_features, module.out_features
            rank = max(1, round(spec.rank_fraction * min(inputs, outputs)))
            if rank * (inputs + outputs) < inputs * outputs:
                ranks[name] = rank
    if not ranks:
        raise BadInput(
            f"student.low_rank.rank_fraction: at {spec.rank_fraction:g} no layer of teacher {teacher!r} ({kind}) becomes smaller; "
            "give less than 0.5, where every layer does"
        )
    return ranks


def plan_low_rank(config: PretrainedConfig, spec: LowRankSpec, teacher: str) -> None:
    """Write the ranks into a student's configuration, before there are weights.

    Raises:
        BadInput: as `choose_ranks`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    setattr(config, FIELD, {"rank": choose_ranks(model, spec, teacher)})


def factor_layers(model: PreTrainedModel) -> None:
    """Replace the layers that `model.config` names by low-rank ones without values, in place; plain models stay as they are.

    Raises:
        BadInput: ranks that do not fit the model.
    """
    entry = getattr(model.config, FIELD, None)
    if entry is None:
        return
    for name, rank in _ranks_of(entry).items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear) or not 0 < rank < min(module.in_features, module.out_features):
            raise BadInput(
                f"config.json: {FIELD} gives {name} the rank {rank}, which is no linear layer of {type(model).__name__} of more "
                "than that rank; restore the file"
            )
        low = LowRankLinear(module.in_features, module.out_features, rank, module.bias is not None)
        replace_module(model, name, low.to(module.weight.device, module.weight.dtype))


def _ranks_of(entry: Any) -> dict[str, int]:
    ranks = entry.get("rank") if isinstance(entry, dict) else None
    if not isinstance(ranks, dict) or not all(type(rank) is int for rank in ranks.values()):
        raise BadInput(f'config.json: {FIELD} must be {{"rank": {{module name: whole number}}}}; restore the file')
    return ranks


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` under `name`."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


# the decomposition --------------------------------------------------------------------------------------------------


@torch.no_grad()
def low_rank_of(layer: nn.Linear, moment: Tensor, rank: int) -> LowRankLinear:
    """The layer's best approximation of `rank` for inputs of that moment, in its precision and on its device."""
    low = LowRankLinear(layer.in_features, layer.out_features, rank, layer.bias is not None)
    low = low.to(layer.weight.device, layer.weight.dtype)
    expand, reduce = low_rank_factors(layer.weight, moment, rank)
    low.weight.copy_(reduce)
    low.expand.weight.copy_(expand)
    if layer.bias is not None:
        low.expand.bias.copy_(layer.bias)
    return low


# checkpoints --------------------------------------------------------------------------------------------------------


def load_student(folder: Path, dtype: torch.dtype, *, attention: str | None = None) -> PreTrainedModel:
    """A student's checkpoint, low-rank layers included, in evaluation mode on the CPU. Plain ones load as transformers does.

    `AutoModelForCausalLM.from_pretrained` alone raises a RuntimeError on a checkpoint with low-rank layers: "size mismatch for
    weight: copying a param with shape [rank, in] from checkpoint, the shape in current model is [out, in]".

    Args:
        attention: implementation in transformers' words, as `eager`; None leaves the choice to it.

    Raises:
        BadInput: low-rank layers that do not fit the rest, or whose weights are missing.
        OSError: no checkpoint with safetensors, in transformers' words.
    """
    words: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    if attention is not None:
        words["attn_implementation"] = attention
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if getattr(config, FIELD, None) is None:
        plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **words)
        return plain
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    model, loading = _with_low_rank(kind).from_pretrained(folder, dtype=dtype, output_loading_info=True, **words)
    if missing := sorted(loading["missing_keys"]):
        raise BadInput(
            f"{folder}: has no weights for {missing[0]} (of {len(missing)} missing); build the student again"
        )
    model.__class__ = kind
    student: PreTrainedModel = model
    return student


def _with_low_rank(kind: Any) -> Any:
    """`kind` with its low-rank layers in place before transformers fills in the weights."""

    def build(self: Any, config: PretrainedConfig, *arguments: Any, **words: Any) -> None:
        kind.__init__(self, config, *arguments, **words)
        factor_layers(self)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})
