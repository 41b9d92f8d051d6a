"""One temperature per teacher, fitted on validation text, so that entropies of different teachers can be compared.

T_k = argmin over T of the mean negative log-likelihood of the true next tokens under softmax(z_k / T). An over-confident
teacher gets T > 1. Only the entropies (the weights) use it; the fused target itself is made of the teachers' own
distributions. The fit evaluates a geometric grid of temperatures in one pass over the text and refines by a parabola in log T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edgestill.compress.corpus import Part
from edgestill.compress.fused_head import CPU_CHUNK_BYTES
from edgestill.compress.teachers import Teacher
from edgestill.runtime.progress import Task

GRID = tuple(math.exp(x) for x in np.linspace(math.log(0.5), math.log(3.0), 19))
MAX_WINDOWS = 64


@dataclass(frozen=True)
class Calibration:
    """Result of one fit; perplexities are on the validation tokens it was fitted on."""

    temperature: float
    perplexity: float
    """At T = 1."""
    calibrated_perplexity: float
    tokens: int


def calibration_windows(validation: Part) -> npt.NDArray[np.int64]:
    """At most `MAX_WINDOWS` validation windows, spread evenly."""
    total = validation.n_windows
    return np.unique(np.linspace(0, total - 1, min(MAX_WINDOWS, total)).round().astype(np.int64))


@torch.no_grad()
def calibrate(
    teacher: Teacher, validation: Part, windows: npt.NDArray[np.int64], *, batch_size: int, task: Task
) -> Calibration:
    """Fit one temperature on these windows (int64 [w]); `task` is advanced by one per window."""
    grid = torch.tensor(GRID, device=teacher.head_weight.device)
    sums, count = torch.zeros(len(GRID) + 1, dtype=torch.float64), 0
    step = max(1, CPU_CHUNK_BYTES // (8 * teacher.head_weight.shape[0]))
    for start in range(0, len(windows), batch_size):
        ids = torch.from_numpy(validation.token_ids[windows[start : start + batch_size]].astype(np.int64))
        ids = ids.to(teacher.head_weight.device)
        hidden = teacher.hidden(ids)[0][:, :-1].flatten(0, 1)
        labels = ids[:, 1:].flatten()
        for first in range(0, labels.numel(), step):
            rows = slice(first, first + step)
            logits = torch.nn.functional.linear(hidden[rows], teacher.head_weight, teacher.head_bias).float()
            picked = logits.gather(1, labels[rows].unsqueeze(1)).squeeze(1)
            for i, t in enumerate([*grid, torch.ones((), device=grid.device)]):
                sums[i] += (torch.logsumexp(logits / t, -1) - picked / t).sum().cpu().double()
        count += labels.numel()
        task.advance(len(ids))
    nll = (sums / max(count, 1)).numpy()
    temperature, best = _minimum(np.log(np.array(GRID)), nll[:-1])
    return Calibration(temperature, float(math.exp(nll[-1])), float(math.exp(best)), count)


def _minimum(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """exp(x) at the vertex of the parabola through the lowest grid point and its neighbours, and the value there."""
    i = int(np.clip(np.argmin(y), 1, len(x) - 2))
    a, b, c = np.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
    if a <= 0 or abs(b / (2 * a)) > x[1] - x[0]:  # the minimum lies on the edge of the grid
        j = int(np.argmin(y))
        return float(math.exp(x[j])), float(y[j])
    return float(math.exp(x[i] - b / (2 * a))), float(c - b * b / (4 * a))
