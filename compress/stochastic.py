"""Several noisy views of a teacher's features, and the student's choice among them (SSD, arXiv 2504.14307).

With z_i the features of pass i, s the student's, P its projection, a_i = mean over a sequence's tokens of cos(P s, z_i):

    kept     a_i >= median_i a_i                        views far from what the student can express are left out
    w        = softmax(a / tau) over the kept
    target   = sum_i w_i z_i                            a constant: no gradient flows into the weights

Language models are trained without dropout nowadays, so the noise is put in here: on the output of every block, from where it
passes through the blocks above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgestill.compress.teachers import Teacher, decoder_blocks
from edgestill.profiles.schema import StochasticSpec


@torch.no_grad()
def noisy_features(
    teacher: Teacher, input_ids: Tensor, layers: Sequence[int], spec: StochasticSpec
) -> dict[int, Tensor]:
    """{layer: [N, B, T, d]}: the block outputs of `spec.passes` = N passes with dropout.

    The noise comes from torch's default generator of the device, whose state training checkpoints carry.

    Args:
        input_ids: int64 [B, T] on the teacher's device.
        layers: blocks counted from 0.
    """

    def drop(module: nn.Module, arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        noisy = nn.functional.dropout(hidden, spec.dropout, training=True)
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy

    hooks = [block.register_forward_hook(drop) for block in decoder_blocks(teacher.model)]
    try:
        views = [teacher.hidden(input_ids, layers)[1] for _ in range(spec.passes)]
    finally:
        for handle in hooks:
            handle.remove()
    return {layer: torch.stack([view[layer] for view in views]) for layer in dict.fromkeys(layers)}


@torch.no_grad()
def guided_target(ours: Tensor, views: Tensor, keep: Tensor, temperature: float) -> Tensor:
    """The student-guided mean of noisy views, [B, T, d] in float32.

    Args:
        ours: [B, T, d], the student's features in the space of comparison.
        views: [N, B, T, d].
        keep: float32 [B, T], 1 for tokens that count, else 0.
        temperature: tau.
    """
    cosines = nn.functional.cosine_similarity(ours.float().unsqueeze(0), views.float(), dim=-1)  # [N, B, T]
    likeness = (cosines * keep).sum(-1) / keep.sum(-1).clamp_min(1)  # [N, B]
    ordered, middle = likeness.sort(0).values, likeness.shape[0] // 2
    median = (ordered[middle] + ordered[-1 - middle]) / 2  # both ends of the middle: of an even number, their mean
    weights = (likeness / temperature).masked_fill(likeness < median, -torch.inf).softmax(0)
    return (weights[:, :, None, None] * views).sum(0)
