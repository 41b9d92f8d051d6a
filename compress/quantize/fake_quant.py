"""A student that computes with weights on a grid while its float weights learn.

    forward     every reader of `module.weight` gets the nearest values on the grid: linear layers, embedding, fused head
    backward    straight through: the gradient at the values on the grid is that of the float weights
    between     the float weights stay the parameters: names, ties, checkpoints, DDP and FSDP2 know nothing of the grid

A weight is rounded once per optimizer step and read by all micro-steps. It is float before `from_step`, moves to the grid over
`ramp_steps`, and keeps its scales from `freeze_scales_at_step` on; frozen scales are buffers, so checkpoints have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edgestill.compress.low_rank import LowRankLinear, factor_layers
from edgestill.compress.quantize.activations import quantized_inputs
from edgestill.compress.quantize.grids import Scales, grid_of
from edgestill.profiles.quantize_words import QuantizeSpec
from edgestill.runtime.errors import BadInput

LAYERS = (nn.Linear, Conv1D, LowRankLinear)


class FakeQuant(nn.Module):
    """The weights of one student on their grid, and where in its schedule it is. The student's modules are changed in place."""

    def __init__(self, spec: QuantizeSpec, student: PreTrainedModel) -> None:
        """Put the student's layers on the grid.

        Raises:
            BadInput: a width that the scheme cannot hold, or a tied embedding and head of which only one is wanted.
        """
        super().__init__()
        self.spec = spec
        self.grid = grid_of(spec.scheme, spec.block_size, spec.symmetric)
        self.step = 0
        self._weights: dict[int, _Weight] = {}
        self._layers: dict[str, GridLayer] = {}
        head = student.get_output_embeddings()
        for name, module in _targets(student, spec):
            self._place(name, module)
        self._inputs_of_head = spec.activations and isinstance(head, _OnGrid)

    def _place(self, name: str, module: nn.Module) -> None:
        transposed = isinstance(module, Conv1D)
        parameter = module._parameters["weight"]
        if parameter is None:
            raise ValueError(f"{name} has no weight")
        if id(parameter) not in self._weights:
            inputs = parameter.shape[0 if transposed else 1]
            if (why := self.grid.unfit(inputs)) is not None:
                raise BadInput(f"quantize.scheme {self.spec.scheme}: layer {name}: {why}")
            self._weights[id(parameter)] = _Weight(self, f"{name}.weight", len(self._weights), transposed)
            if self.spec.freeze_scales_at_step is not None:
                self._reserve(_matrix(parameter, transposed), len(self._weights) - 1)
        one = self._weights[id(parameter)]
        if one.name not in self._layers or not isinstance(
            module, nn.Embedding
        ):  # of a tied pair the head, which multiplies
            self._layers[one.name] = GridLayer(one.name, module, transposed)
        kind: Any = type(module)
        module.__class__ = _on_grid(kind, self.spec.activations and not isinstance(module, nn.Embedding))
        module.__dict__["_edgestill_weight"] = one

    def _reserve(self, weight: Tensor, index: int) -> None:
        """Room for the frozen scales of a weight."""
        scales = self.grid.scales(weight)
        self.register_buffer(f"scale_{index}", torch.zeros_like(scales.scale))
        if scales.zero_point is not None:
            self.register_buffer(f"zero_point_{index}", torch.zeros_like(scales.zero_point))

    @property
    def names(self) -> list[str]:
        """Parameters on the grid."""
        return [weight.name for weight in self._weights.values()]

    def layers(self) -> list[GridLayer]:
        """One per parameter on the grid."""
        return list(self._layers.values())

    def enters_at(self, step: int) -> bool:
        """Whether weights move towards the grid for the first time behind optimizer step `step`."""
        return step == self.spec.from_step

    def at_step(self, step: int) -> None:
        """Say that `step` optimizer steps are done; weights are rounded anew when they are read next."""
        self.step = step
        for weight in self._weights.values():
            weight.stale = True

    def head_inputs(self, hidden: Tensor) -> Tensor:
        """What the head multiplies, where its weight is read without its module (fused_head.py)."""
        return quantized_inputs(hidden, self.grid.block_size) if self._inputs_of_head and self.blend > 0 else hidden

    @property
    def blend(self) -> float:
        """How far the weights have moved to the grid, 0 to 1."""
        spec = self.spec
        if self.step < spec.from_step:
            return 0.0
        return 1.0 if spec.ramp_steps == 0 else min(1.0, (self.step - spec.from_step) / spec.ramp_steps)

    @property
    def frozen(self) -> bool:
        """Whether scales stay as they are."""
        return self.spec.freeze_scales_at_step is not None and self.step >= self.spec.freeze_scales_at_step

    def frozen_scales(self, index: int) -> Scales:
        """The buffers of a weight."""
        return Scales(self.get_buffer(f"scale_{index}"), self._buffers.get(f"zero_point_{index}"))

    def scales_of(self, weight: Tensor, index: int) -> Scales:
        """Of float32 [N, K]; the ones of the step before while they may still move are remembered as those to freeze."""
        if self.frozen:
            return self.frozen_scales(index)
        scales = self.grid.scales(weight)
        if self.spec.freeze_scales_at_step is not None and self.step + 1 >= self.spec.freeze_scales_at_step:
            self.get_buffer(f"scale_{index}").copy_(scales.scale)
            if scales.zero_point is not None:
                self.get_buffer(f"zero_point_{index}").copy_(scales.zero_point)
        return scales

    @torch.no_grad()
    def encoded(self, state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Parameter name -> the arrays that ship, of the float weights in `state` (parameter name -> tensor)."""
        found = {}
        for weight in self._weights.values():
            matrix = _matrix(state[weight.name], weight.transposed)
            scales = self.frozen_scales(weight.index) if self.frozen else self.grid.scales(matrix)
            found[weight.name] = self.grid.encode(
                matrix, Scales(*(_to(s, matrix) for s in (scales.scale, scales.zero_point)))
            )
        return found


@dataclass(frozen=True)
class GridLayer:
    """A parameter on the grid and a module that reads it."""

    name: str
    module: nn.Module
    transposed: bool
    """Stored as [K, N], as Conv1D does."""

    @property
    def parameter(self) -> nn.Parameter:
        found = self.module._parameters["weight"]
        if found is None:
            raise ValueError(f"{self.name} is gone")
        return found

    @property
    def inputs(self) -> int:
        """K."""
        return self.parameter.shape[0 if self.transposed else 1]

    def matrix(self) -> Tensor:
        """The float weights, float32 [N, K]."""
        return _matrix(self.parameter, self.transposed)

    def write(self, matrix: Tensor) -> None:
        """Other float weights, [N, K]."""
        self.parameter.copy_(matrix.T if self.transposed else matrix)


def _matrix(parameter: Tensor, transposed: bool) -> Tensor:
    """float32 [N, K], contiguous."""
    weight = parameter.detach().float()
    return weight.T.contiguous() if transposed else weight


def _to(tensor: Tensor | None, like: Tensor) -> Any:
    return None if tensor is None else tensor.to(like.device)


class _Weight:
    """One parameter, its values on the grid, and whether they are those of this step. Tied modules share it."""

    def __init__(self, owner: FakeQuant, name: str, index: int, transposed: bool) -> None:
        self.owner, self.name, self.index, self.transposed = owner, name, index, transposed
        self.stale = True
        self._values: Tensor | None = None
        self._version = -1

    def read(self, master: Tensor) -> Tensor:
        """What a layer multiplies: differentiable, the gradient goes to `master` as it is."""
        blend = self.owner.blend
        if blend == 0 or isinstance(master, DTensor):  # a share of a spread weight: looked at, not multiplied by
            return master
        if self.stale or self._values is None or master._version != self._version:
            self._values, self._version, self.stale = self._round(master, blend), master._version, False
        values: Tensor = _StraightThrough.apply(master, self._values)  # type: ignore[no-untyped-call]
        return values

    @torch.no_grad()
    def _round(self, master: Tensor, blend: float) -> Tensor:
        with torch.autocast(master.device.type, enabled=False):
            weight = _matrix(master, self.transposed)
            values = self.owner.grid.values(weight, self.owner.scales_of(weight, self.index))
            if blend < 1:
                values = torch.lerp(weight, values, blend)
            return values.T if self.transposed else values


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, master: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _OnGrid(nn.Module):
    """Mixed into a layer's class: whoever asks for its weight gets the values on the grid."""

    _edgestill_weight: _Weight

    @property
    def weight(self) -> Tensor:
        master = self._parameters["weight"]
        if master is None:
            raise ValueError("the layer has no weight")
        return self._edgestill_weight.read(master)


class _WithInputs(_OnGrid):
    """The same, with inputs on int8."""

    def forward(self, x: Tensor) -> Tensor:
        owner = self._edgestill_weight.owner
        y: Tensor = super().forward(quantized_inputs(x, owner.grid.block_size) if owner.blend > 0 else x)
        return y


@cache
def _on_grid(kind: Any, with_inputs: bool) -> Any:
    """`kind` with its weight on a grid; the same type of layer for everybody who asks with isinstance."""
    return type(kind.__name__, (_WithInputs if with_inputs else _OnGrid, kind), {"__module__": kind.__module__})


def _targets(student: PreTrainedModel, spec: QuantizeSpec) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of everything that goes on the grid: what the export finds to quantize, but for what the recipe leaves out."""
    head, table = student.get_output_embeddings(), student.get_input_embeddings()
    tied = head.weight is table.weight
    if tied and spec.embeddings != spec.head:
        raise BadInput(
            "quantize: the student's embedding and head are one matrix; embeddings and head must both be true or both false"
        )
    left = {id(module) for module, wanted in ((head, spec.head), (table, spec.embeddings)) if not wanted}
    for name, module in student.named_modules():
        if (isinstance(module, LAYERS) or module is table) and id(module) not in left:
            yield name, module


def check_widths(spec: QuantizeSpec, config: PretrainedConfig) -> None:
    """Refuse a grid that the student of this configuration cannot lie on, before there are weights.

    Raises:
        BadInput: as `FakeQuant`.
    """
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(config)
        factor_layers(student)
        FakeQuant(spec, student)
