"""What an error in a looked-up row of the embedding costs: the counterpart of the second moment of a layer's input.

A linear layer's error e in one row of its weight costs e' E[x x'] e, x its input. An embedding multiplies nothing, but to second
order an error e in the rows that are looked up costs the language model

    1/2 e' E[g g'] e   nats per token,   g = d log p(y | text) / d (what the embedding returned),   y drawn from the model

(the Fisher information of its output). A head's row v costs 1/2 E[p_v (1 - p_v) (x'e)^2], close to p(v) times 1/2 e' E[x x'] e
where tokens are rarely certain, and row v is looked up with frequency p(v) too: so for a matrix that is both, the sum
E[x x'] + E[g g'] weighs one use against the other, without a factor to choose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgestill.compress.teachers import hidden_states

CHUNK_BYTES = 32 << 20
"""Of float32 probabilities at a time."""
SEED = 0
"""Of the tokens that are drawn: the same moment for the same student and text."""


def lookup_moment(student: PreTrainedModel, windows: npt.NDArray[np.int64]) -> Tensor:
    """E[g g'] float64 [H, H] of the input embedding, over `windows` int64 [W, T]; one window at a time, without autocast.

    The student should be in evaluation mode; its parameters and their gradients are left alone.
    """
    table = student.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise TypeError(f"the input embedding is a {type(table).__name__}, not an Embedding")
    head = student.get_output_embeddings()
    bias = getattr(head, "bias", None)
    device = next(student.parameters()).device
    generator = torch.Generator(device).manual_seed(SEED)
    moment = torch.zeros(table.embedding_dim, table.embedding_dim, dtype=torch.float64, device=device)
    returned: list[Tensor] = []

    def cut(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        returned.append(output.detach().requires_grad_())
        return returned[-1]

    handle = table.register_forward_hook(cut)
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for window in windows:
                returned.clear()
                hidden, _ = hidden_states(student, torch.from_numpy(window)[None].to(device))
                slope = _slopes(hidden[0].detach().float(), head.weight.detach().float(), bias, generator)
                (gradient,) = torch.autograd.grad(hidden, returned, slope[None].to(hidden.dtype))
                rows = gradient[0].double()
                moment += rows.T @ rows
    finally:
        handle.remove()
    scale = float(getattr(table, "embed_scale", 1.0))  # some embeddings multiply their rows
    return moment * (scale**2 / windows.size)


@torch.no_grad()
def _slopes(hidden: Tensor, head: Tensor, bias: Tensor | None, generator: torch.Generator) -> Tensor:
    """d log p(y) / d hidden [T, H] for a y drawn at each of the rows: the head's row of y less its mean row, chunk by chunk."""
    found = []
    for rows in torch.split(hidden, max(1, CHUNK_BYTES // (4 * len(head)))):
        p = torch.softmax(torch.nn.functional.linear(rows, head, bias), -1)
        drawn = torch.multinomial(p, 1, generator=generator).squeeze(1)
        found.append(head[drawn] - p @ head)
    return torch.cat(found)
