"""The fused output loss as one writes it without thinking of memory: full logits, plain torch, autograd. What ours is measured by.

Logits of every teacher and of the student are [n, V] tensors; softmax, weights and divergence are float32, only the products
run in `dtype`. Same formulas as `compress/fused_head.py` and `compress/fusion.py` (entropy weights per sequence, arithmetic
mix, forward KL + cross-entropy), written independently of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)


@torch.no_grad()
def fused_target(
    teachers: Sequence[tuple[Tensor, Tensor]], windows: int, tau: float, floor: float, dtype: torch.dtype
) -> Tensor:
    """The teachers' mixture [n, V], float32, each weighted by its mean entropy over a sequence.

    Args:
        teachers: (hidden states [n, d_k], head [V, d_k]) of each; n = windows x tokens, sequence after sequence.
        tau, floor: weights are (1 - floor) softmax(-H / (tau log V)) + floor / K.
    """
    log_ps = [torch.log_softmax(F.linear(h.to(dtype), w.to(dtype)).float(), dim=-1) for h, w in teachers]
    entropy = torch.stack([-(log_p.exp() * log_p).sum(-1).view(windows, -1).mean(1) for log_p in log_ps])
    weights = torch.softmax(-entropy / (tau * math.log(log_ps[0].shape[-1])), dim=0)
    weights = (1 - floor) * weights + floor / len(teachers)
    per_row = weights.repeat_interleave(log_ps[0].shape[0] // windows, dim=1)
    target = torch.zeros_like(log_ps[0])
    for weight, log_p in zip(per_row, log_ps, strict=True):
        target += weight.unsqueeze(-1) * log_p.exp()
    return target


def dense_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    teachers: Sequence[tuple[Tensor, Tensor]],
    *,
    windows: int,
    tau: float,
    floor: float,
    cross_entropy: float,
    dtype: torch.dtype,
) -> Tensor:
    """Mean over the rows of KL(target || student) + `cross_entropy` x the loss on the labels; a differentiable scalar.

    Args:
        hidden, head: the student's hidden states [n, d] and head [V, d].
        labels: int64 [n].
    """
    target = fused_target(teachers, windows, tau, floor, dtype)
    log_q = torch.log_softmax(F.linear(hidden.to(dtype), head.to(dtype)).float(), dim=-1)
    divergence = F.kl_div(log_q, target, reduction="batchmean")
    return divergence + cross_entropy * F.nll_loss(log_q, labels)
