"""Prototypes of a teacher's features, and the match of soft assignments to them (after ProC-KD, arXiv 2212.13180).

C [M, d] are the directions around which the teacher's features cluster (k-means on the unit sphere). With h the teacher's
feature, P s the student's in the same space, both of length 1, and tau a temperature:

    L = KL( softmax(C h / tau) || softmax(C P s / tau) )          per token, nats

ProC-KD assigns image features; for text this is what carries over: which cluster a token belongs to, and how surely.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

LLOYD_STEPS = 25
ROWS_AT_A_TIME = 4096


def cluster_directions(features: Tensor, count: int, *, seed: int = 0, steps: int = LLOYD_STEPS) -> Tensor:
    """Spherical k-means (k-means++ start, Lloyd steps): `count` directions of length 1, float32 [count, d].

    Args:
        features: [n, d], n >= count; only their directions count.

    A cluster that loses all its points keeps its direction.
    """
    if features.shape[0] < count:
        raise ValueError(f"{features.shape[0]} features cannot have {count} prototypes")
    points = normalize(features.float(), dim=-1)
    centres = _spread_out(points, count, torch.Generator().manual_seed(seed))
    nearest = torch.full((points.shape[0],), -1, device=points.device)
    for _ in range(steps):
        before, nearest = (
            nearest,
            torch.cat([(rows @ centres.T).argmax(1) for rows in torch.split(points, ROWS_AT_A_TIME)]),
        )
        if torch.equal(before, nearest):
            break
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        filled = torch.bincount(nearest, minlength=count) > 0
        centres = torch.where(filled.unsqueeze(1), normalize(sums, dim=-1), centres)
    return centres


def _spread_out(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre drawn with probability proportional to its squared distance from those there."""
    first = int(torch.randint(points.shape[0], (), generator=generator))
    chosen = [first]
    squared = 2 - 2 * points @ points[first]
    for _ in range(count - 1):
        chances = squared.clamp_min(1e-12).cpu()  # on the host: the same draw on every device
        chosen.append(int(torch.multinomial(chances, 1, generator=generator)))
        squared = torch.minimum(squared, 2 - 2 * points @ points[chosen[-1]])
    return points[chosen].clone()


def assignment_distance(ours: Tensor, theirs: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """KL between the soft assignments, nats, float32 [...].

    Args:
        ours, theirs: [..., d]; theirs is a constant.
        prototypes: [M, d], rows of length 1.
    """
    with torch.autocast(device_type=ours.device.type, enabled=False):  # bfloat16 cosines over tau err by 2 % and more
        log_q = torch.log_softmax(linear(normalize(ours.float(), dim=-1), prototypes) / temperature, -1)
        log_p = torch.log_softmax(linear(normalize(theirs.float(), dim=-1), prototypes) / temperature, -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
