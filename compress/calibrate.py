"""What makes the entropies of different teachers comparable, fitted on validation text.

temperature   T_k = argmin over T of the mean negative log-likelihood of the true next tokens under softmax(z_k / T). An
              over-confident teacher gets T > 1. Only the entropies (the weights) use it; the fused target itself is made of
              the teachers' own distributions. A geometric grid of temperatures in one pass, refined by a parabola in log T.
offset        o = argmin over o of -log sum_k w_k p_k(y), with w_k = softmax_k(-(H_k / log V - o_k) / tau): the likelihood of
              the target that they make together. It needs each teacher's entropies and the log-probabilities of the true
              tokens, no logits, so the fit costs nothing beside the pass that collects them (`CalibrationAnswers`).

A teacher that knows one domain is over-confident in the others, so its temperature depends on how much of them is in the text: the
windows are as many of each domain. An offset moves little with that share, since where one teacher is right by far there is
nothing to gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgestill.compress.corpus import Part
from edgestill.compress.divergence import row_dot
from edgestill.compress.fused_head import CPU_CHUNK_BYTES
from edgestill.compress.fusion import WeightRule
from edgestill.compress.packing import spread
from edgestill.compress.rows import IGNORE, Rows
from edgestill.compress.teachers import Teacher
from edgestill.runtime.progress import Task

EVIDENCE = "evidence.safetensors"
OFFSET_PENALTY = 1e-4
"""On (o_k / tau)^2, in nats: a teacher that is never needed stays at a finite distance."""
SOFTER = (64.0, 16.0, 4.0, 1.0)
"""Temperatures of the fit over that of the rule, one after the other: where weights are sharp and wrong, nothing slopes."""
GRID = tuple(math.exp(x) for x in np.linspace(math.log(0.5), math.log(3.0), 10))
MAX_WINDOWS = 128
TEMPERATURE_DIGITS, OFFSET_DIGITS = 3, 5
"""Finer digits say nothing, and differ between processors: stages are keyed by these numbers, and their results travel."""


@dataclass(frozen=True)
class Calibration:
    """Result of one fit; perplexities are on the validation tokens it was fitted on."""

    temperature: float
    perplexity: float
    """At T = 1."""
    calibrated_perplexity: float
    tokens: int


@dataclass(frozen=True)
class CalibrationAnswers:
    """What the teachers say of the validation windows: float32 [K, W, T - 1] nats, entropies at temperature 1."""

    entropy: Tensor
    label_log_p: Tensor

    def save(self, folder: Path) -> None:
        """Into a file of this folder."""
        save_file({"entropy": self.entropy, "label_log_p": self.label_log_p}, folder / EVIDENCE)

    @classmethod
    def load(cls, folder: Path) -> CalibrationAnswers:
        """What `save` wrote."""
        return cls(**load_file(folder / EVIDENCE))

    @classmethod
    def joined(cls, parts: Sequence[CalibrationAnswers]) -> CalibrationAnswers:
        """Of all teachers, from that of each, on the same windows."""
        return cls(torch.cat([p.entropy for p in parts]), torch.cat([p.label_log_p for p in parts]))


def calibration_windows(validation: Part) -> npt.NDArray[np.int64]:
    """At most `MAX_WINDOWS` validation windows, as many of each domain (where it has them), spread evenly."""
    return spread(validation, MAX_WINDOWS)


@torch.no_grad()
def calibrate(
    teacher: Teacher, validation: Part, windows: npt.NDArray[np.int64], *, batch_size: int, task: Task
) -> tuple[Calibration, CalibrationAnswers]:
    """Fit one temperature on the tokens of these windows (int64 [w]) that count; `task` is advanced by one per window.

    Returns:
        The fit, and the evidence of this one teacher on these windows.
    """
    device = teacher.head_weight.device
    sums, count = torch.zeros(len(GRID) + 1, dtype=torch.float64), 0
    entropies, answers = [], []
    step = max(1, CPU_CHUNK_BYTES // (8 * teacher.head_weight.shape[0]))
    for start in range(0, len(windows), batch_size):
        chosen = windows[start : start + batch_size]
        ids = torch.from_numpy(validation.token_ids[chosen].astype(np.int64)).to(device)
        counted = torch.ones_like(ids[:, 1:], dtype=torch.float32)
        if validation.loss_mask is not None:
            counted = torch.from_numpy(validation.loss_mask[chosen][:, 1:].astype(np.float32)).to(device)
        counted = counted.flatten()
        hidden = teacher.hidden(ids)[0][:, :-1].flatten(0, 1)
        labels = ids[:, 1:].flatten()
        for first in range(0, labels.numel(), step):
            rows = slice(first, first + step)
            logits = teacher.logits(hidden[rows])
            picked = logits.gather(1, labels[rows].unsqueeze(1)).squeeze(1)
            for i, t in enumerate([*GRID, 1.0]):
                sums[i] += ((torch.logsumexp(logits / t, -1) - picked / t) * counted[rows]).sum().cpu().double()
            log_p = torch.log_softmax(logits, -1)
            entropies.append(-row_dot(log_p.exp(), log_p).cpu())
            answers.append((picked - logits.logsumexp(-1)).cpu())
        count += int(counted.sum())
        task.advance(len(ids))
    nll = (sums / max(count, 1)).numpy()
    temperature, best = _minimum(np.log(np.array(GRID)), nll[:-1])
    found = Calibration(round(temperature, TEMPERATURE_DIGITS), float(math.exp(nll[-1])), float(math.exp(best)), count)
    shape = (1, len(windows), -1)
    return found, CalibrationAnswers(torch.cat(entropies).view(shape), torch.cat(answers).view(shape))


def fit_offsets(
    rule: WeightRule, evidence: CalibrationAnswers, part: Part, windows: npt.NDArray[np.int64]
) -> tuple[float, ...]:
    """The offsets of `rule` (weights by entropy, its own offsets not read) on the validation windows of the evidence.

    The mix is taken as arithmetic: the geometric one needs whole distributions, and its weights are the same.

    Returns:
        One offset per teacher, in units of the normalised entropy, mean 0.
    """
    labels = torch.from_numpy(part.token_ids[windows].astype(np.int64))
    if part.loss_mask is not None:
        labels = labels.masked_fill(torch.from_numpy(part.loss_mask[windows] == 0), IGNORE)
    rows = Rows.of(labels, torch.from_numpy(part.domain[windows].astype(np.int64)))
    entropy, answer = (x.flatten(1)[:, rows.positions].double() for x in (evidence.entropy, evidence.label_log_p))
    pooled = torch.stack([rule.pooled(h, rows.sequence) for h in entropy]) / rule.log_vocabulary
    offsets = torch.zeros(len(pooled), 1, dtype=torch.float64)
    for softer in SOFTER:
        offsets = _descend(offsets, pooled, answer, rule, rule.tau * softer)
    return tuple(round(float(o), OFFSET_DIGITS) for o in offsets)


def _descend(offsets: Tensor, pooled: Tensor, answer: Tensor, rule: WeightRule, tau: float) -> Tensor:
    """The best offsets [K, 1] at this temperature, from these; float64, mean 0."""
    free = (offsets / tau).requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        centred = free - free.mean()
        weights = rule.with_floor((centred - pooled / tau).softmax(0))
        value = -torch.logsumexp(weights.log() + answer, 0).mean() + OFFSET_PENALTY * centred.square().sum()
        value.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]  # untyped in torch
    return ((free - free.mean()) * tau).detach()


def _minimum(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """exp(x) at the vertex of the parabola through the lowest grid point and its neighbours, and the value there."""
    i = int(np.clip(np.argmin(y), 1, len(x) - 2))
    a, b, c = np.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
    if a <= 0 or abs(b / (2 * a)) > x[1] - x[0]:  # the minimum lies on the edge of the grid
        j = int(np.argmin(y))
        return float(math.exp(x[j])), float(y[j])
    return float(math.exp(x[i] - b / (2 * a))), float(c - b * b / (4 * a))
