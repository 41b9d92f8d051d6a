"""Values with their uncertainty: a mean over tokens, a ratio of perplexities, a quantile of latencies.

A limit is tested on the one-sided 95 % bound of a value, so every function here returns an `Estimate`: value, standard
error, both bounds and n. Two facts of the data decide the formulas:

- tokens of one stretch of text are not independent, so the variance of a mean comes from sums over blocks (the cluster-robust
  variance of Liang and Zeger, Biometrika 73, 1986, with the G/(G-1) correction and Student's t with G - 1 degrees of freedom);
- latencies are not normal, so bounds of quantiles are order statistics, which hold for every distribution (David and
  Nagaraja, Order Statistics, 3rd ed., section 7.1), widened by Woodruff's method (JASA 47, 1952) where samples come in groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Z95 = 1.6448536269514722
"""95 % quantile of the normal distribution."""
MIN_TAIL_SAMPLES = 100
"""Below this many samples a p95 is not reported: its bound would hang on one or two of them."""

F64 = npt.NDArray[np.float64]
Groups = npt.NDArray[np.integer]

_T95 = (6.313752, 2.919986, 2.353363, 2.131847)


@dataclass(frozen=True)
class Estimate:
    """A measured value, or the reason why there is none."""

    value: float | None
    standard_error: float | None = None
    n: int = 0
    lower: float | None = None
    """One-sided 95 % lower confidence bound; None where the data give none."""
    upper: float | None = None
    """One-sided 95 % upper confidence bound."""
    reason: str | None = None
    """Why `value` or its bounds are None."""
    broken: bool = False
    """The value was measured and is not a finite number: a limit on it fails, it is not merely unmeasured."""

    @staticmethod
    def missing(reason: str) -> Estimate:
        """A value that could not be measured, and why."""
        return Estimate(None, reason=reason)

    @staticmethod
    def not_finite(bad: int, n: int) -> Estimate:
        """A value spoilt by NaN or infinity in `bad` of its `n` samples."""
        return Estimate(None, n=n, reason=f"{bad} of {n} samples are not finite numbers", broken=True)

    @staticmethod
    def exact(value: float) -> Estimate:
        """A value without spread (a size, a high-water mark): both bounds are the value."""
        return Estimate(float(value), None, 1, float(value), float(value))

    def scaled(self, factor: float) -> Estimate:
        """The estimate of `factor` times this quantity, factor > 0."""

        def times(x: float | None) -> float | None:
            return None if x is None else x * factor

        return Estimate(
            times(self.value),
            times(self.standard_error),
            self.n,
            times(self.lower),
            times(self.upper),
            self.reason,
            self.broken,
        )


def student_t95(df: int) -> float:
    """95 % quantile of Student's t with `df` >= 1 degrees of freedom; absolute error < 2e-4.

    A table for df <= 4, then the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5).
    """
    if df < 1:
        raise ValueError(f"{df} degrees of freedom: a spread needs at least 1")
    if df <= len(_T95):
        return _T95[df - 1]
    z = Z95
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / df + g2 / df**2 + g3 / df**3 + g4 / df**4


def block_mean(x: F64, blocks: Groups) -> Estimate:
    """Mean of `x` [n] with a standard error over the blocks `blocks` [n] (any integers).

    m = sum(x) / n;  u_b = sum over block b of (x_i - m);  SE^2 = G / (G - 1) * sum_b u_b^2 / n^2;
    bounds m -+ t(0.95, G - 1) SE for G blocks. One block: no standard error and no bounds, and `reason` says so.
    """
    x = np.asarray(x, np.float64)
    if not len(x):
        return Estimate.missing("no samples")
    finite = np.isfinite(x)
    if not finite.all():
        return Estimate.not_finite(int((~finite).sum()), len(x))
    mean = float(x.mean())
    _, index = np.unique(blocks, return_inverse=True)
    sums = np.bincount(index, weights=x - mean)
    count = len(sums)
    if count < 2:
        return Estimate(mean, None, len(x), reason="all samples come from one block: no standard error")
    error = math.sqrt(count / (count - 1) * float(sums @ sums)) / len(x)
    half = student_t95(count - 1) * error
    return Estimate(mean, error, len(x), mean - half, mean + half)


def exp_mean(x: F64, blocks: Groups) -> Estimate:
    """exp(mean(x)): a perplexity when x is a negative log-likelihood, a ratio of perplexities when x is a paired difference.

    SE by the delta method, exp(m) SE(m); the bounds are exp of the bounds of the mean, so they respect positivity.
    """
    mean = block_mean(x, blocks)
    if mean.value is None:
        return mean
    if mean.value > 700.0:  # exp overflows a double at 709.8
        return Estimate(None, n=mean.n, reason=f"exp({mean.value:.4g}) is too large to write", broken=True)
    value = math.exp(mean.value)
    if mean.standard_error is None or mean.lower is None or mean.upper is None:
        return Estimate(value, None, mean.n, reason=mean.reason)
    return Estimate(value, value * mean.standard_error, mean.n, math.exp(mean.lower), math.exp(min(mean.upper, 700.0)))


def perplexity_ratio(logp: F64, other_logp: F64, blocks: Groups) -> Estimate:
    """Perplexity of `logp` [n] over that of `other_logp` [n] on the same tokens: exp(mean(other_logp - logp)), paired."""
    return exp_mean(np.asarray(other_logp, np.float64) - np.asarray(logp, np.float64), blocks)


def binomial_cdf(n: int, q: float) -> F64:
    """P(Bin(n, q) <= j) for j = 0..n, float64 [n + 1], for 0 < q < 1."""
    j = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_pmf = log_factorial[n] - log_factorial - log_factorial[::-1] + j * math.log(q) + (n - j) * math.log1p(-q)
    return np.asarray(np.minimum(np.cumsum(np.exp(log_pmf)), 1.0), np.float64)


def quantile_ranks(n: int, q: float, confidence: float = 0.95) -> tuple[int | None, int | None]:
    """Ranks (from 1) of the samples that bound the q-quantile from below and above, each with `confidence`; None: too few.

    P(x_(r) >= Q) = P(Bin(n, q) <= r - 1), so the upper rank is the smallest r where that reaches `confidence`, and the lower
    one the largest r with P(Bin(n, q) >= r) >= `confidence`.
    """
    cdf = binomial_cdf(n, q)
    above = np.flatnonzero(cdf[:n] >= confidence)
    below = np.flatnonzero(cdf[:n] <= 1 - confidence)
    return (int(below[-1]) + 1 if len(below) else None), (int(above[0]) + 1 if len(above) else None)


def quantile(samples: F64, q: float, groups: Groups | None = None, *, min_n: int = 1) -> Estimate:
    """The q-quantile of `samples` [n] with distribution-free bounds.

    Args:
        samples: any order, any distribution.
        q: 0 < q < 1.
        groups: samples of one group (one generation) may depend on each other; the bounds are then the farther of the order
            statistics and of Woodruff's, which reads the quantile at q -+ t SE(share below it) with a block standard error.
        min_n: fewer samples give no value; the reason names both numbers.

    The standard error is half the distance of the two bounds over 1.645, where both exist.
    """
    x = np.sort(np.asarray(samples, np.float64))
    n = len(x)
    if n < max(min_n, 1):
        return Estimate(None, n=n, reason=f"n = {n} < {max(min_n, 1)} samples")
    if not np.isfinite(x).all():
        return Estimate.not_finite(int((~np.isfinite(x)).sum()), n)
    value = float(np.quantile(x, q))
    low_rank, high_rank = quantile_ranks(n, q)
    lower = None if low_rank is None else float(x[low_rank - 1])
    upper = None if high_rank is None else float(x[high_rank - 1])
    if groups is not None:
        share = block_mean((np.asarray(samples, np.float64) <= value).astype(np.float64), groups)
        low_q, high_q = (None, None) if share.standard_error is None else _woodruff(q, share.standard_error, groups)
        lower = None if lower is None or low_q is None else min(lower, float(np.quantile(x, low_q)))
        upper = None if upper is None or high_q is None else max(upper, float(np.quantile(x, high_q)))
    error = None if lower is None or upper is None else (upper - lower) / (2 * Z95)
    reason = None
    if lower is None or upper is None:
        reason = f"{n} samples are too few to bound their {q:.0%} quantile on both sides"
    return Estimate(value, error, n, lower, upper, reason)


def _woodruff(q: float, error: float, groups: Groups) -> tuple[float | None, float | None]:
    """The probabilities q -+ t SE, None where they leave [0, 1]."""
    half = student_t95(len(np.unique(groups)) - 1) * error
    return (q - half if q - half >= 0 else None), (q + half if q + half <= 1 else None)


def median(samples: F64, groups: Groups | None = None) -> Estimate:
    """The median of `samples` [n]; one-sided 95 % bounds exist from n = 5."""
    return quantile(samples, 0.5, groups)


def p95(samples: F64, groups: Groups | None = None) -> Estimate:
    """The 95th percentile of `samples` [n]; null under 100 samples."""
    return quantile(samples, 0.95, groups, min_n=MIN_TAIL_SAMPLES)
