"""Rows of an ablation compared: every row was trained from the same seeds and judged on the same windows.

Perplexity of a domain: exp of the mean negative log-likelihood over its tokens. Mixed: exp of the mean over domains of those
means, so that the longer text does not decide. With m_s the mean of seed s, S seeds: SE(m) = sd(m_s) / sqrt(S), and that of
the perplexity by the delta method.

Differences are paired: d[s, w] = NLL(row) - NLL(other) of seed s and window w, and two things vary, the text and the seed. With
u[s, w] the contribution of a cell to the estimate (its deviation from the domain's mean, times its share of the tokens, times
the share of the domain), sums over clusters c give one-way variances

    V_c = C / (C - 1) * sum_c (sum of u in c)^2        C clusters (Liang and Zeger, Biometrika 73, 1986)

and the two-way variance is V_block + V_seed - V_both (Cameron, Gelbach and Miller, Journal of Business & Economic Statistics
29, 2011, equation 2.11): what block and seed share is counted once. They take V_both from the cells as they are, which hold
the seeds' and blocks' own deviations again and so subtract too much, up to V_block / S. Every seed meets every block here, so it
is taken from what is left of the cells, r = u - mean of its seed - mean of its block + mean:

    V_both = S B / ((S - 1) (B - 1)) * sum r^2         B blocks; unbiased for effects that add up (two-way analysis of variance)

The variance is never taken below the larger of the two one-way variances. With one seed only the text varies, and the result
says so by `seeds`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MARK = 2.0
"""Differences beyond this many standard errors are marked."""

F64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Scores:
    """One row on all judged windows.

    seeds: S of them; nll: float64 [S, W], sums over the tokens of a window, nats; tokens [W], domain [W] (index), block [W].
    """

    seeds: tuple[int, ...]
    nll: F64
    tokens: Ints
    domain: Ints
    block: Ints

    def means(self, domains: Sequence[int]) -> F64:
        """float64 [S]: mean over these domains of the mean NLL per token."""
        found = [self.nll[:, self.domain == d].sum(1) / self.tokens[self.domain == d].sum() for d in domains]
        return np.asarray(np.mean(found, axis=0), np.float64)


@dataclass(frozen=True)
class Spread:
    """A perplexity and its standard error over seeds (None for one seed)."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Difference:
    """Mean of NLL(row) - NLL(other), nats per token; positive: the row is worse. standard_error None: one block, one seed."""

    nats: float
    standard_error: float | None
    seeds: int
    blocks: int

    @property
    def marked(self) -> bool:
        """Beyond `MARK` standard errors."""
        return self.standard_error is not None and abs(self.nats) > MARK * self.standard_error


def perplexity(scores: Scores, domains: Sequence[int]) -> Spread:
    """exp of the mean NLL over seeds and these domains, each domain the same share."""
    means = scores.means(domains)
    value = math.exp(means.mean())
    if len(means) < 2:
        return Spread(value, None)
    return Spread(value, value * float(means.std(ddof=1)) / math.sqrt(len(means)))


def difference(row: Scores, other: Scores, domains: Sequence[int]) -> Difference | None:
    """`row` against `other` on the seeds that both have, each domain the same share; None when they share no seed.

    Raises:
        ValueError: they were judged on different windows.
    """
    if not (np.array_equal(row.tokens, other.tokens) and np.array_equal(row.block, other.block)):
        raise ValueError("the two rows were judged on different windows")
    seeds = [s for s in row.seeds if s in other.seeds]
    if not seeds:
        return None
    apart = row.nll[[row.seeds.index(s) for s in seeds]] - other.nll[[other.seeds.index(s) for s in seeds]]
    cells = np.zeros_like(apart)
    total = 0.0
    for d in domains:
        inside = row.domain == d
        tokens = row.tokens[inside].astype(np.float64)
        mean = float(apart[:, inside].sum() / (len(seeds) * tokens.sum()))
        cells[:, inside] = (apart[:, inside] - mean * tokens) / (len(seeds) * tokens.sum() * len(domains))
        total += mean / len(domains)
    used = np.isin(row.domain, domains)
    blocks, cells = row.block[used], cells[:, used]
    return Difference(total, _standard_error(cells, blocks), len(seeds), len(np.unique(blocks)))


def _standard_error(cells: F64, blocks: Ints) -> float | None:
    """Two-way clustered over rows (seeds) and `blocks` of columns; None with neither two seeds nor two blocks."""
    _, index = np.unique(blocks, return_inverse=True)
    both = np.stack([np.bincount(index, weights=seed) for seed in cells]).astype(np.float64)
    by_block, by_seed = _one_way(both.sum(axis=0)), _one_way(both.sum(axis=1))
    if by_block is None or by_seed is None:
        alone = by_seed if by_block is None else by_block
        return None if alone is None else math.sqrt(alone)
    left = both - both.mean(axis=0, keepdims=True) - both.mean(axis=1, keepdims=True) + both.mean()
    seeds, blocks = both.shape
    shared = seeds * blocks / ((seeds - 1) * (blocks - 1)) * float((left**2).sum())
    return math.sqrt(max(by_block, by_seed, by_block + by_seed - shared))


def _one_way(sums: F64) -> float | None:
    """Variance from cluster sums [C]; None for one cluster."""
    count = len(sums)
    return None if count < 2 else count / (count - 1) * float(sums @ sums)
