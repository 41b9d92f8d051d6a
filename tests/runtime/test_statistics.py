"""Formulas by hand, laws, and the coverage of every bound on simulated data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.runtime.statistics import (
    Estimate,
    binomial_cdf,
    block_mean,
    exp_mean,
    median,
    p95,
    perplexity_ratio,
    quantile,
    quantile_ranks,
    student_t95,
)

SIMULATIONS = 1500
MARGIN = 4 * math.sqrt(0.95 * 0.05 / SIMULATIONS)
"""Four standard deviations of an estimated coverage of 95 %."""


def test_student_t_agrees_with_published_tables() -> None:
    published = {
        1: 6.314,
        2: 2.920,
        3: 2.353,
        4: 2.132,
        5: 2.015,
        6: 1.943,
        10: 1.812,
        20: 1.725,
        30: 1.697,
        120: 1.658,
    }
    for df, value in published.items():
        assert abs(student_t95(df) - value) < 6e-4, df
    with pytest.raises(ValueError, match="0 degrees"):
        student_t95(0)


def test_block_mean_by_hand() -> None:
    # blocks {0, 2}, {4, 6}: mean 3, block sums of residuals -4 and 4, SE^2 = 2/1 * 32 / 16 = 4
    got = block_mean(np.array([0.0, 2.0, 4.0, 6.0]), np.array([7, 7, 1, 1]))
    assert (got.value, got.standard_error, got.n) == (3.0, 2.0, 4)
    assert got.upper == pytest.approx(3 + 6.313752 * 2) and got.lower == pytest.approx(3 - 6.313752 * 2)


def test_blocks_of_one_sample_give_the_textbook_standard_error() -> None:
    x = np.random.default_rng(0).normal(size=50)
    assert block_mean(x, np.arange(50)).standard_error == pytest.approx(x.std(ddof=1) / math.sqrt(50), rel=1e-12)


def test_repeating_every_token_does_not_shrink_the_standard_error() -> None:
    rng = np.random.default_rng(1)
    x, blocks = rng.normal(size=60), np.repeat(np.arange(12), 5)
    once, thrice = block_mean(x, blocks), block_mean(np.repeat(x, 3), np.repeat(blocks, 3))
    assert thrice.standard_error == pytest.approx(once.standard_error, rel=1e-12) and thrice.n == 3 * once.n


def test_one_block_has_a_value_but_no_bound() -> None:
    got = block_mean(np.array([1.0, 2.0]), np.array([3, 3]))
    assert got.value == 1.5 and got.upper is None and got.lower is None and "one block" in str(got.reason)


def test_not_finite_is_broken_and_empty_is_missing() -> None:
    assert block_mean(np.array([1.0, math.nan, math.inf]), np.arange(3)).broken
    assert "2 of 3" in str(block_mean(np.array([1.0, math.nan, math.inf]), np.arange(3)).reason)
    empty = block_mean(np.zeros(0), np.zeros(0, int))
    assert empty.value is None and not empty.broken
    assert exp_mean(np.full(4, 1e4), np.arange(4)).broken


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-20, 0), min_size=4, max_size=40), st.floats(0.1, 3.0), st.integers(0, 2**31))
def test_ratio_laws(logp: list[float], shift: float, seed: int) -> None:
    """A constant gap of d nats is a ratio of exp(d) without error; swapping the sides inverts value and bounds."""
    a, blocks = np.array(logp), np.arange(len(logp)) % 3
    constant = perplexity_ratio(a - shift, a, blocks)
    assert constant.value == pytest.approx(math.exp(shift)) and constant.standard_error == pytest.approx(0, abs=1e-6)
    b = np.random.default_rng(seed).normal(-3, 1, len(a))
    forth, back = perplexity_ratio(a, b, blocks), perplexity_ratio(b, a, blocks)
    assert forth.value is not None and back.value is not None and forth.upper is not None and back.lower is not None
    assert forth.value * back.value == pytest.approx(1) and forth.upper * back.lower == pytest.approx(1)


def test_delta_method_agrees_with_a_block_bootstrap() -> None:
    rng = np.random.default_rng(2)
    blocks = np.repeat(np.arange(40), 25)
    difference = rng.normal(0.05, 0.4, 1000) + rng.normal(0, 0.2, 40)[blocks]
    got = exp_mean(difference, blocks)
    picks = rng.integers(0, 40, (3000, 40))
    sums = difference.reshape(40, 25).sum(1)
    bootstrap = np.exp(sums[picks].sum(1) / 1000).std()
    assert got.standard_error == pytest.approx(bootstrap, rel=0.06)


def _coverage(truth: float, estimates: list[Estimate]) -> tuple[float, float]:
    """Share of upper bounds above and of lower bounds below the truth."""
    upper = np.mean([e.upper is not None and e.upper >= truth for e in estimates])
    lower = np.mean([e.lower is not None and e.lower <= truth for e in estimates])
    return float(upper), float(lower)


def test_block_bounds_cover_and_token_bounds_do_not() -> None:
    rng = np.random.default_rng(3)
    blocks = np.repeat(np.arange(20), 30)
    draws = [rng.normal(0, 1, 600) + rng.normal(0, 0.5, 20)[blocks] for _ in range(SIMULATIONS)]
    upper, lower = _coverage(0.0, [block_mean(x, blocks) for x in draws])
    assert abs(upper - 0.95) < MARGIN and abs(lower - 0.95) < MARGIN
    naive, _ = _coverage(0.0, [block_mean(x, np.arange(600)) for x in draws])
    assert naive < 0.85


def test_binomial_cdf_is_exact_on_integers() -> None:
    assert binomial_cdf(4, 0.5) * 16 == pytest.approx([1, 5, 11, 15, 16])


def test_quantile_ranks_known_cases() -> None:
    assert quantile_ranks(4, 0.5) == (None, None)  # 1 - 0.5^4 = 0.9375 < 0.95
    assert quantile_ranks(5, 0.5) == (1, 5)  # 1 - 0.5^5 = 0.969
    assert quantile_ranks(58, 0.95)[1] is None and quantile_ranks(59, 0.95)[1] == 59  # 1 - 0.95^59 = 0.9515
    low, high = quantile_ranks(100, 0.5)
    assert low is not None and high is not None and low + high == 101  # the median is symmetric


@pytest.mark.parametrize(("q", "n"), [(0.5, 25), (0.95, 150)])
def test_order_statistic_bounds_cover_a_skewed_distribution(q: float, n: int) -> None:
    rng = np.random.default_rng(4)
    truth = -math.log(1 - q)  # of the exponential distribution
    upper, lower = _coverage(truth, [quantile(rng.exponential(size=n), q) for _ in range(SIMULATIONS)])
    assert upper > 0.95 - MARGIN and lower > 0.95 - MARGIN
    assert upper < 0.995 and lower < 0.995  # not so wide that they say nothing


def test_groups_widen_the_bounds_until_they_cover() -> None:
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(25), 20)
    draws = [rng.normal(0, 1, 500) + rng.normal(0, 1, 25)[groups] for _ in range(SIMULATIONS)]
    ignoring, _ = _coverage(0.0, [median(x) for x in draws])
    upper, lower = _coverage(0.0, [median(x, groups) for x in draws])
    assert ignoring < 0.8 and upper > 0.93 and lower > 0.93


def test_p95_needs_a_hundred_samples() -> None:
    few = p95(np.arange(99.0))
    assert few.value is None and few.n == 99 and few.reason == "n = 99 < 100 samples" and not few.broken
    enough = p95(np.arange(1.0, 101.0))
    assert enough.value == pytest.approx(95.05) and enough.upper is not None and enough.value < enough.upper <= 100


def test_quantile_of_too_few_samples_says_so() -> None:
    got = median(np.array([3.0, 1.0, 2.0]))
    assert got.value == 2.0 and got.upper is None and "too few" in str(got.reason)
    assert median(np.zeros(0)).value is None
    assert median(np.array([1.0, math.nan])).broken


def test_scaled_and_exact() -> None:
    assert Estimate(2.0, 0.5, 9, 1.0, 3.0).scaled(2) == Estimate(4.0, 1.0, 9, 2.0, 6.0)
    assert Estimate.missing("x").scaled(2) == Estimate.missing("x")
    assert Estimate.exact(3) == Estimate(3.0, None, 1, 3.0, 3.0)
