"""Divergences between the target p and the student q: real values and closed-form gradients.

Each entry takes p, log p, q and log q, all float32 (or float64) [n, C] over the same C classes (the vocabulary, or k + 1
buckets), and returns the value per row in nats [n] and its gradient with respect to the student's logits z / T [n, C], where
q = softmax(z / T). With g = dL/dq and J(g) = q * (g - <q, g>) the gradient is J(g):

    forward_kl        sum p log(p / q)                                  q - p
    reverse_kl        sum q log(q / p)                                  q * (log(q / p) - value)
    jsd               beta KL(p || m) + (1 - beta) KL(q || m),          J((1 - beta) log(q / m))
                      m = beta p + (1 - beta) q
    skew_forward_kl   KL(p || m),  m = s p + (1 - s) q                  J(-(1 - s) p / m)
    skew_reverse_kl   KL(q || m),  m = (1 - s) p + s q                  J(log(q / m) - s q / m)
    adaptive_kl       a KL(p || q) + (1 - a) KL(q || p), a detached     a (q - p) + (1 - a) q * (log(q / p) - KL(q || p))
    tvd               1/2 sum |q - p|                                   J(1/2 sign(q - p))
    taid              KL(p_t || q),  log p_t = (1 - t) log q + t log p - log Z, detached       q - p_t

p and log p may be overwritten: the gradient takes their place where it can.

The values are divergences, not cross-entropies: they are 0 when p = q. A hand-written gradient avoids autograd through
`kl_div` with a differentiable target, where finite losses are known to come with NaN gradients.

Classes with p = 0 are allowed where the divergence allows them: they carry log p = LOG_TINY, so reverse KL charges the
student at most about 87 nats times its mass there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_TINY = -87.0
"""log of the smallest probability that is told from zero: about the logarithm of float32's smallest normal number."""


@dataclass(frozen=True)
class Settings:
    """Numbers that some divergences read; meanings in profiles/loss_words.py."""

    beta: float = 0.5
    skew: float = 0.1
    head_mass: float = 0.5
    interpolation: Tensor | float = 1.0
    """TAID's t, a scalar (on the device, so that it may change without the host)."""


PIECE = 64

Divergence = Callable[[Tensor, Tensor, Tensor, Tensor, Settings], tuple[Tensor, Tensor]]


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row of a and b [n, C] -> [n]; unlike (a * b).sum(-1) it writes no [n, C] tensor.

    Pieces of 64 are summed alone first: one running float32 sum over a whole vocabulary is off in the fourth digit.
    """
    whole = a.shape[1] - a.shape[1] % PIECE
    pieces = torch.einsum(
        "nbc,nbc->nb", a[:, :whole].view(len(a), -1, PIECE), b[:, :whole].view(len(a), -1, PIECE)
    ).sum(-1)
    return pieces if whole == a.shape[1] else pieces + (a[:, whole:] * b[:, whole:]).sum(-1)


def _through_softmax(q: Tensor, g: Tensor) -> Tensor:
    """J(g) = q * (g - <q, g>) [n, C]; g is overwritten."""
    return g.sub_(row_dot(q, g).unsqueeze(-1)).mul_(q)


def forward_kl(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """KL(p || q), mass covering."""
    return row_dot(p, log_p) - row_dot(p, log_q), torch.sub(q, p, out=p)


def reverse_kl(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """KL(q || p), mode seeking."""
    log_ratio = torch.sub(log_q, log_p, out=log_p)
    value = row_dot(q, log_ratio)
    return value, log_ratio.sub_(value.unsqueeze(-1)).mul_(q)


def jsd(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Generalised Jensen-Shannon divergence, 0 < beta < 1 (GKD, arXiv 2306.13649, eq. 1).

    It goes to 0 as beta goes to 0 or 1, so it does not pass into forward or reverse KL there: ask for those by name.
    """
    beta = settings.beta
    log_m = torch.log((beta * p + (1 - beta) * q).clamp_min(torch.finfo(p.dtype).tiny))
    log_q_over_m = log_q - log_m
    value = beta * row_dot(p, log_p - log_m) + (1 - beta) * row_dot(q, log_q_over_m)
    return value, _through_softmax(q, log_q_over_m.mul_(1 - beta))


def skew_forward_kl(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """KL(p || s p + (1 - s) q) (DistiLLM, arXiv 2402.03898): bounded by -log s."""
    s = settings.skew
    m = (s * p + (1 - s) * q).clamp_min(torch.finfo(p.dtype).tiny)
    value = row_dot(p, log_p) - row_dot(p, m.log())
    return value, _through_softmax(q, torch.div(p, m).mul_(-(1 - s)))


def skew_reverse_kl(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """KL(q || (1 - s) p + s q) (DistiLLM, arXiv 2402.03898): bounded by -log s."""
    s = settings.skew
    m = ((1 - s) * p + s * q).clamp_min(torch.finfo(p.dtype).tiny)
    log_ratio = log_q - m.log()
    value = row_dot(q, log_ratio)
    return value, _through_softmax(q, log_ratio.sub_(torch.div(q, m).mul_(s)))


def adaptive_kl(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Forward and reverse KL by where the student is wrong (AKL, arXiv 2404.02657).

    a = gap on the head of p / whole gap, gap = sum |p - q|; the head is the most likely tokens that first reach `head_mass`.
    """
    sorted_p, order = p.sort(dim=-1, descending=True)
    head = sorted_p.cumsum(-1) - sorted_p < settings.head_mass
    gap = (p - q).abs_().gather(-1, order)
    a = (gap * head).sum(-1) / gap.sum(-1).clamp_min(torch.finfo(p.dtype).tiny)
    forward = row_dot(p, log_p) - row_dot(p, log_q)
    reverse, reverse_gradient = reverse_kl(p, log_p, q, log_q, settings)
    forward_gradient = torch.sub(q, p, out=p)
    share = a.unsqueeze(-1)
    return a * forward + (1 - a) * reverse, forward_gradient.mul_(share).add_(reverse_gradient.mul_(1 - share))


def tvd(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Total variation distance, at most 1: the least disturbed by a teacher that is badly wrong somewhere."""
    difference = q - p
    value = difference.abs().sum(-1) / 2
    return value, _through_softmax(q, difference.sign_().mul_(0.5))


def taid(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """KL to a target between student and teachers (arXiv 2501.16937, eq. 3; interpolated in logit space).

    Log-probabilities of the fused target serve as logits: softmax does not see the constant between the two.
    """
    t = settings.interpolation
    log_target = torch.log_softmax((1 - t) * log_q + t * log_p, -1)
    target = log_target.exp()
    return row_dot(target, log_target) - row_dot(target, log_q), q - target


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "tvd": tvd,
    "taid": taid,
}
"""Name in a recipe -> function."""
