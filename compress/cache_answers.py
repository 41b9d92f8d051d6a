"""What is kept of a teacher's distribution: its k most likely tokens and the mass of the rest, or N draws from it.

top_k     log p of the k most likely tokens, and log of the mass of the others, taken from the complement.
sampling  N independent draws at temperature 1 (RS-KD, arXiv 2503.16870). The target counts / N has the expectation p, so the
          gradient of every loss that is linear in the target (forward KL, cross-entropy) has the full distribution's
          expectation; k tokens and a tail have not, because the tail is spread as the student spreads it.

Beside either: the entropy over the whole vocabulary (that of k tokens or N draws is biased), at temperature 1 and at the
teacher's calibration temperature, and the log-probability of the true token.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgestill.compress.divergence import row_dot

Mode = Literal["top_k", "sampling"]
ARRAYS: dict[str, tuple[str, ...]] = {
    "top_k": ("ids", "logp", "tail_logp", "entropy", "entropy_calibrated", "label_logp"),
    "sampling": ("ids", "counts", "entropy", "entropy_calibrated", "label_logp"),
}
LOWEST = -65504.0
"""The least finite float16: a label of probability 0 must not become an infinite loss."""


def top_answers(logits: Tensor, labels: Tensor, top_k: int, calibration: float = 1.0) -> dict[str, Tensor]:
    """The k + 1 buckets of each row of logits.

    Args:
        logits: float32 [n, V].
        labels: int64 [n].
        top_k: at most V.
        calibration: temperature of `entropy_calibrated`.

    Returns:
        ids int64 [n, k], most likely first; logp float32 [n, k]; the rest float32 [n]: tail_logp, entropy,
        entropy_calibrated, label_logp, nats.
    """
    top, ids = logits.topk(top_k, dim=-1)
    weights, lse, beside = _facts(logits, labels, calibration)
    total = weights.sum(-1)
    # 1 - sum of the stored would be noise where the tail is thin
    tail = weights.scatter_(1, ids, 0.0).sum(-1) / total
    return {"ids": ids, "logp": top - lse.unsqueeze(1), "tail_logp": tail.log()} | beside


def sampled_answers(logits: Tensor, labels: Tensor, uniform: Tensor, calibration: float = 1.0) -> dict[str, Tensor]:
    """N draws with replacement from softmax(logits), by inversion of the distribution function.

    Args:
        logits: float32 [n, V].
        labels: int64 [n].
        uniform: float64 [n, N] in [0, 1), one per draw; where they come from decides whether a capture can be repeated.
        calibration: temperature of `entropy_calibrated`.

    Returns:
        ids int64 [n, min(N, V)] distinct and ascending, counts int64 of the same shape; unused slots repeat the first id
        with count 0. Beside them entropy, entropy_calibrated, label_logp float32 [n], nats.
    """
    # a float32 sum counts in steps of 6e-8, which most tokens of a large vocabulary are below
    weights, _, beside = _facts(logits, labels, calibration)
    below = weights.cumsum(-1, dtype=torch.float64)
    draws = torch.searchsorted(below, uniform * below[:, -1:], right=True).clamp_max_(logits.shape[1] - 1)
    ids, counts = _distinct(draws, min(draws.shape[1], logits.shape[1]))
    return {"ids": ids, "counts": counts} | beside


def uniforms(seed: int, windows: npt.NDArray[np.int64], answers: int, draws: int) -> npt.NDArray[np.float64]:
    """[B * answers, draws] numbers in [0, 1): a stream per (seed, window), so that batches and processes do not matter."""
    found = [np.random.default_rng([seed, int(window)]).random((answers, draws)) for window in windows]
    return np.concatenate(found)


def packed(found: dict[str, Tensor], vocabulary: int, draws: int) -> dict[str, npt.NDArray[Any]]:
    """As they are stored: ids and counts in the narrowest unsigned integers, all else float16."""
    ids = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    integers = {"ids": ids, "counts": np.uint8 if draws < 1 << 8 else np.uint16}
    stored: dict[str, npt.NDArray[Any]] = {}
    for name, values in found.items():
        if name in integers:
            stored[name] = values.cpu().numpy().astype(integers[name])
        else:
            lowest = -torch.inf if name == "tail_logp" else LOWEST
            stored[name] = values.clamp(min=lowest).to(torch.float16).cpu().numpy()
    return stored


def _facts(logits: Tensor, labels: Tensor, calibration: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """exp(logits - max) [n, V], the log-sum-exp [n], and what stands beside either kind of answers."""
    highest = logits.amax(-1, keepdim=True)
    z = logits - highest
    weights = z.exp()
    log_total, entropy = _entropy(z, weights)
    lse = highest.squeeze(1) + log_total
    beside = {"entropy": entropy, "label_logp": logits.gather(1, labels.unsqueeze(1)).squeeze(1) - lse}
    beside["entropy_calibrated"] = entropy
    if calibration != 1:
        z.div_(calibration)
        beside["entropy_calibrated"] = _entropy(z, z.exp())[1]
    return weights, lse, beside


def _entropy(z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """log Z and the entropy log Z - E[z] [n] of weights = exp(z), z at most 0: both terms are at least 0."""
    total = weights.sum(-1)
    log_total = total.log()
    return log_total, log_total - row_dot(weights, z) / total


def _distinct(draws: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Distinct ids and counts [n, width] of draws int64 [n, N]; no row has more than `width` distinct."""
    draws = draws.sort(dim=1).values
    first = torch.ones_like(draws, dtype=torch.bool)
    first[:, 1:] = draws[:, 1:] != draws[:, :-1]
    slot = first.cumsum(1) - 1
    ids = draws[:, :1].repeat(1, width).scatter_(1, slot, draws)
    counts = torch.zeros_like(ids).scatter_add_(1, slot, torch.ones_like(draws))
    return ids, counts
