"""The integers of a student that was trained on its grid, for the weights of its graph: copied, never rounded again.

A weight of the graph is recognised by its values: the trace keeps the checkpoint's float32 numbers, whatever it calls them. What
was left off the grid in training stays float32 in the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from edgestill.compress.low_rank import load_student
from edgestill.compress.quantize.shipped import ShippedWeights
from edgestill.export.blockwise import BlockWeight, int8_blocks
from edgestill.export.quantize import ByValues, Given, digest_of
from edgestill.export.stored import F32, Quantized
from edgestill.export.tables import TableWeight
from edgestill.profiles.schema import PrecisionSpec

NOT_TRAINED = "not on the grid in training"


def trained_weights(checkpoint: Path, precision: PrecisionSpec) -> Given | None:
    """What `quantize_graph` is given for this checkpoint; None when it was trained in float, or on another grid than the
    profile's.

    Raises:
        BadInput: the bytes beside the checkpoint are damaged. `quantize_graph` raises it too, where the graph lacks one of them.
    """
    shipped = ShippedWeights.load(checkpoint)
    if shipped is None or why_not(shipped, precision) is not None:
        return None
    known: dict[bytes, Quantized] = {}
    student = load_student(checkpoint, torch.float32)
    for name, arrays in shipped.arrays.items():
        parameter = student.get_parameter(name).detach()
        module = student.get_submodule(name.rpartition(".")[0])
        matrix = (parameter if isinstance(module, Conv1D) else parameter.T).numpy()
        known[digest_of(matrix)] = _stored(shipped, {part: a.numpy() for part, a in arrays.items()}, matrix, precision)
    return ByValues(known, NOT_TRAINED, every=True)


def why_not(shipped: ShippedWeights, precision: PrecisionSpec) -> str | None:
    """How the grid of the student differs from the profile's; None when its bytes ship."""
    ours: dict[str, Any] = {"weights": shipped.scheme}
    if shipped.scheme != "int8":
        ours["block_size"] = shipped.block_size
    if shipped.scheme == "int4":
        ours["symmetric"] = shipped.symmetric
    for word, trained in ours.items():
        if (wanted := getattr(precision, word)) != trained:
            return f"trained with {word} {trained}, and the profile wants {wanted}"
    return None


def _stored(shipped: ShippedWeights, arrays: dict[str, Any], matrix: F32, precision: PrecisionSpec) -> Quantized:
    inputs, outputs = matrix.shape
    if shipped.scheme == "int8":
        return int8_blocks(arrays["codes"], arrays["scales"], precision.block_size)
    if shipped.scheme == "int4":
        return BlockWeight(arrays["codes"], arrays["scales"], arrays.get("zero_points"), 4, shipped.block_size, inputs)
    return TableWeight(arrays["codes"], arrays["scales"], shipped.scheme, shipped.block_size, inputs, outputs)
