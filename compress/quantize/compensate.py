"""Weights moved to where rounding to nearest makes up for its own errors: GPTQ (Frantar et al., arXiv 2210.17323), on any grid.

With C = E[x x'] of a layer's input x, rounding W to Q costs E |x W' - x Q'|^2. Inputs are rounded one after the other, and each
error is made up for by the inputs not yet rounded. Not the codes are kept here, but the weights as their turn came:

    compensated(W)      W~ such that the nearest values of W~ on the grid are GPTQ's Q
    compensate_student  the same for every layer of a student that is about to be trained on its grid

A row of the embedding is multiplied by nothing: what its errors cost is in lookup_moment.py, and a tied embedding answers for both.

So whatever rounds to nearest (a training that goes on, an export) needs no codes of another kind. For that the scales of a block
must be the same before and after: its largest and smallest weight keep their value, and all others stay between them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgestill.compress.processes import world
from edgestill.compress.quantize.fake_quant import FakeQuant, GridLayer
from edgestill.compress.quantize.grids import Grid, Scales
from edgestill.compress.quantize.lookup_moment import lookup_moment
from edgestill.compress.teachers import hidden_states

DAMPING = 0.01
"""Times the mean of the moment's diagonal, added to it: inputs may be dead or linearly dependent."""
CHUNK_VALUES = 1 << 20
"""Weights worked on at a time (outputs are independent): 8 MiB in float64, also for a head of a large vocabulary."""
MOMENT_BYTES = 512 << 20
"""Moments held at a time; layers beyond it wait for another pass over the text."""
BATCH_TOKENS = 2048


def compensated(weight: Tensor, moment: Tensor, grid: Grid, damping: float = DAMPING) -> Tensor:
    """W~ float32 [N, K] of weight float32 [N, K].

    Args:
        moment: E[x x'] of the layer's input, float64 [K, K].
        grid: one with blocks, so not int8's.
        damping: see DAMPING.

    Raises:
        ValueError: `moment` is not [K, K] or not finite, or damping is not positive.
        torch.linalg.LinAlgError: `moment` is no moment (not positive semi-definite).
    """
    inputs = weight.shape[1]
    if moment.shape != (inputs, inputs):
        raise ValueError(f"moment of shape {tuple(moment.shape)} for {inputs} inputs")
    if not damping > 0:
        raise ValueError(f"damping {damping} must be positive: inputs may be dead or linearly dependent")
    feedback = _feedback(moment, damping)
    rows = max(1, CHUNK_VALUES // inputs)
    return torch.cat([_compensated(part, feedback, grid) for part in torch.split(weight, rows)])


def _compensated(weight: Tensor, feedback: Tensor, grid: Grid) -> Tensor:
    column = copy.copy(grid)  # the same grid for one input of each block
    column.block_size = 1
    work, kept = weight.double(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], grid.block_size):
        stop = min(start + grid.block_size, weight.shape[1])
        block = work[:, start:stop].float().contiguous()
        scales: Scales = grid.scales(block)
        low, high = torch.aminmax(block, dim=1)
        ends = (block == low.unsqueeze(1)) | (block == high.unsqueeze(1))
        errors = torch.empty(len(weight), stop - start, dtype=torch.float64, device=weight.device)
        for k in range(start, stop):
            here = k - start
            value = torch.where(ends[:, here], block[:, here], work[:, k].float().clamp(low, high))
            kept[:, k] = value
            rounded = column.values(value.unsqueeze(1), scales).squeeze(1)
            errors[:, here] = (work[:, k] - rounded) / feedback[k, k]
            work[:, k + 1 : stop] -= torch.outer(errors[:, here], feedback[k, k + 1 : stop])
        work[:, stop:] -= errors @ feedback[start:stop, stop:]  # once per block: later blocks do not look before
    return kept


def _feedback(moment: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U'U = (moment + damping)^-1: row k says how the error of input k is made up for.

    From the factor R R' of the damped moment (R upper triangular) as R^-1, without squaring the condition number.
    """
    moment = moment.double()
    identity = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    ridge = damping * moment.diagonal().mean()
    if ridge == 0:
        return identity
    factor = torch.linalg.cholesky((moment + ridge * identity).flip(0, 1)).flip(0, 1)
    feedback: Tensor = torch.linalg.solve_triangular(factor, identity, upper=True)
    if not feedback.isfinite().all():
        raise ValueError("the moment is not finite")
    return feedback


# a student ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compensate_student(fake: FakeQuant, student: PreTrainedModel, windows: npt.NDArray[np.int64]) -> None:
    """Move the float weights of every layer on the grid, from what they let the student compute of `windows` int64 [W, T].

    With several processes all get the weights of the first.
    """
    layers = {layer.name: layer for layer in fake.layers()}
    training = student.training
    student.eval()
    try:
        for group in _groups(layers):
            for name, moment in _moments(group, student, windows).items():
                layer = group[name]
                layer.write(compensated(layer.matrix(), moment, fake.grid))
    finally:
        student.train(training)
    if world()[0] > 1:
        for layer in layers.values():
            torch.distributed.broadcast(layer.parameter, 0)


def _groups(layers: Mapping[str, GridLayer]) -> Iterator[dict[str, GridLayer]]:
    """The layers in order, as many at a time as MOMENT_BYTES holds moments of."""
    group: dict[str, GridLayer] = {}
    held = 0
    for name, layer in layers.items():
        size = 8 * layer.inputs**2
        if group and held + size > MOMENT_BYTES:
            yield group
            group, held = {}, 0
        group[name] = layer
        held += size
    if group:
        yield group


def _moments(
    layers: Mapping[str, GridLayer], student: PreTrainedModel, windows: npt.NDArray[np.int64]
) -> dict[str, Tensor]:
    """Float64 [K, K] by name: E[x x'], of an embedding E[g g'], of both uses their sum. A batch is summed in float32, batches
    in float64."""
    found: dict[str, Tensor] = {}
    head, table = student.get_output_embeddings(), student.get_input_embeddings()

    def add(name: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).float()
        product = (rows.T @ rows).double()
        found[name] = found[name] + product if name in found else product

    def hook(name: str) -> Any:
        return lambda module, arguments: add(name, arguments[0])

    apart = (head, table)
    watched = [
        layer.module.register_forward_pre_hook(hook(n)) for n, layer in layers.items() if layer.module not in apart
    ]
    heads = [name for name, layer in layers.items() if layer.module is head]
    device = next(iter(layers.values())).parameter.device
    try:
        with torch.autocast(device.type, enabled=False):
            for batch in np.array_split(windows, max(1, windows.size // BATCH_TOKENS)):
                hidden, _ = hidden_states(student, torch.from_numpy(batch).to(device))
                for name in heads:
                    add(name, hidden)
    finally:
        for handle in watched:
            handle.remove()
    moments = {name: moment / windows.size for name, moment in found.items()}
    for name, layer in layers.items():
        if layer.parameter is table._parameters["weight"]:
            looked_up = lookup_moment(student, windows)
            moments[name] = moments[name] + looked_up if name in moments else looked_up
    return moments
