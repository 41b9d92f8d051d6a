"""Divergences between the target p and the student q: real values and closed-form gradients.

Each entry takes p, log p, q and log q, all float32 (or float64) [n, C] over the same C classes (the vocabulary, or k + 1
buckets), and returns the value per row in nats [n] and its gradient with respect to the student's logits z / T [n, C], where
q = softmax(z / T). With g = dL/dq and J(g) = q * (g - <q, g>) the gradient is J(g):

    forward_kl   sum p log(p / q)                                  q - p
    reverse_kl   sum q log(q / p)                                  q * (log(q / p) - value)
    jsd          beta KL(p || m) + (1 - beta) KL(q || m),          J((1 - beta) log(q / m))
                 m = beta p + (1 - beta) q

The values are divergences, not cross-entropies: they are 0 when p = q. A hand-written gradient avoids autograd through
`kl_div` with a differentiable target, where finite losses are known to come with NaN gradients.

Classes with p = 0 are allowed where the divergence allows them: they carry log p = LOG_TINY, so reverse KL charges the
student at most about 87 nats times its mass there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LOG_TINY = -87.0
"""log of the smallest probability that is told from zero: about the logarithm of float32's smallest normal number."""

Divergence = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row of a and b [n, C] -> [n]; unlike (a * b).sum(-1) it writes no [n, C] tensor."""
    return torch.einsum("nc,nc->n", a, b)


def forward_kl(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """KL(p || q), mass covering. `beta` is not read."""
    return row_dot(p, log_p) - row_dot(p, log_q), q - p


def reverse_kl(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """KL(q || p), mode seeking. `beta` is not read."""
    log_ratio = log_q - log_p
    value = row_dot(q, log_ratio)
    return value, log_ratio.sub_(value.unsqueeze(-1)).mul_(q)


def jsd(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """Generalised Jensen-Shannon divergence, 0 < beta < 1 (GKD, arXiv 2306.13649, eq. 1).

    It goes to 0 as beta goes to 0 or 1, so it does not pass into forward or reverse KL there: ask for those by name.
    """
    log_m = torch.log((beta * p + (1 - beta) * q).clamp_min(torch.finfo(p.dtype).tiny))
    log_q_over_m = log_q - log_m
    value = beta * row_dot(p, log_p - log_m) + (1 - beta) * row_dot(q, log_q_over_m)
    g = (1 - beta) * log_q_over_m
    return value, q * (g - (q * g).sum(-1, keepdim=True))


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
"""Name in a recipe -> function."""
