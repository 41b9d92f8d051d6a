"""The bytes of a student's weights on their grid, beside its checkpoint: written once by training, copied by every export.

    <checkpoint>/quantized/weights.safetensors    <parameter name>.codes, .scales and .zero_points, as grids.py lays them out;
                                                  metadata: format, scheme, block_size, symmetric

The checkpoint itself stays float and whole: transformers reads it without knowing of this file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edgestill.compress.low_rank import load_student
from edgestill.compress.quantize.grids import Grid, grid_of
from edgestill.profiles.quantize_words import QuantizeSpec, Scheme
from edgestill.runtime.errors import BadInput
from edgestill.runtime.files import write_atomically

FILE = Path("quantized") / "weights.safetensors"
FORMAT = "1"


@dataclass(frozen=True)
class ShippedWeights:
    """Weights on one grid, by parameter name."""

    scheme: Scheme
    block_size: int
    symmetric: bool
    arrays: Mapping[str, Mapping[str, Tensor]]
    """Parameter name -> codes, scales and maybe zero_points, on the CPU."""

    @property
    def grid(self) -> Grid:
        return grid_of(self.scheme, self.block_size, self.symmetric)

    @classmethod
    def of(cls, spec: QuantizeSpec, arrays: Mapping[str, Mapping[str, Tensor]]) -> ShippedWeights:
        return cls(spec.scheme, spec.block_size, spec.symmetric, arrays)

    def save(self, checkpoint: Path) -> None:
        """Beside the checkpoint in this folder."""
        tensors = {f"{name}.{part}": t.contiguous() for name, parts in self.arrays.items() for part, t in parts.items()}
        words = {"scheme": self.scheme, "block_size": self.block_size, "symmetric": self.symmetric}
        file = checkpoint / FILE
        file.parent.mkdir(exist_ok=True)
        metadata = {"format": FORMAT, "grid": json.dumps(words)}
        write_atomically(file, safetensors.torch.save(tensors, metadata=metadata))

    @classmethod
    def load(cls, checkpoint: Path) -> ShippedWeights | None:
        """What lies beside a checkpoint; None when it was trained in float.

        Raises:
            BadInput: the file is damaged or of another version.
        """
        file = checkpoint / FILE
        if not file.exists():
            return None
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no mapping)
        except safetensors.SafetensorError as error:
            raise BadInput(f"{file}: damaged ({error}); build the student again") from error
        if metadata.get("format") != FORMAT:
            raise BadInput(
                f"{file}: format {metadata.get('format')}, this version reads {FORMAT}; build the student again"
            )
        arrays: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            weight, _, part = name.rpartition(".")
            arrays.setdefault(weight, {})[part] = tensor
        return cls(**json.loads(metadata["grid"]), arrays=arrays)


def load_as_shipped(checkpoint: Path) -> PreTrainedModel:
    """The student with the weights that ship: on its grid, or float32 where it was trained in float."""
    if (checkpoint / FILE).exists():
        return load_shipped_student(checkpoint)
    return load_student(checkpoint, torch.float32)


@torch.no_grad()
def load_shipped_student(checkpoint: Path, *, attention: str | None = None) -> PreTrainedModel:
    """The student of a checkpoint with the values that its shipped bytes stand for, float32, on the CPU, in evaluation mode.

    Raises:
        BadInput: nothing was trained on a grid, or the bytes are of another model.
    """
    shipped = ShippedWeights.load(checkpoint)
    if shipped is None:
        raise BadInput(f"{checkpoint}: has no {FILE}; its student was trained in float")
    student = load_student(checkpoint, torch.float32, attention=attention)
    for name, arrays in shipped.arrays.items():
        try:
            module = student.get_submodule(name.rpartition(".")[0])
            parameter = student.get_parameter(name)
        except AttributeError as error:
            raise BadInput(f"{checkpoint / FILE}: has {name}, which the checkpoint has not; build it again") from error
        transposed = isinstance(module, Conv1D)
        rows, columns = reversed(parameter.shape) if transposed else parameter.shape
        values = shipped.grid.decode(dict(arrays), (rows, columns))
        parameter.copy_(values.T if transposed else values)
    return student
