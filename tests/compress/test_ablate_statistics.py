"""Perplexities and paired differences of an ablation, against hand-made numbers and a simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgestill.compress.ablate_statistics import Scores, difference, perplexity


def scores(nll: Any, *, seeds: tuple[int, ...] | None = None, **arrays: Any) -> Scores:
    """Windows of one token, one domain, a block each, where nothing else is said."""
    values = np.array(nll, np.float64)
    windows = values.shape[1]
    words = {"tokens": np.ones(windows), "domain": np.zeros(windows), "block": np.arange(windows), **arrays}
    return Scores(
        seeds or tuple(range(len(values))), values, **{name: np.array(v, np.int64) for name, v in words.items()}
    )


def zeros(like: Scores) -> Scores:
    return Scores(like.seeds, np.zeros_like(like.nll), like.tokens, like.domain, like.block)


@pytest.mark.parametrize(
    ("apart", "variance"),
    [
        # blocks 2.25, seeds 1, both 0.25
        ([[1, 3], [2, 6]], 3.0),
        # only the seeds differ: the variance of their mean, (4 - 0)^2 / 4
        ([[0, 0], [4, 4]], 4.0),
        # effects that add up: 1 + 1
        ([[0, 2], [2, 4]], 2.0),
        # only noise, no seed and no block better than another: 0 + 0 - 1 falls to the larger of the two, 0
        ([[0, 2], [2, 0]], 0.0),
        # one seed: the blocks; one window: the seeds
        ([[0, 4]], 4.0),
        ([[0], [4]], 4.0),
    ],
)
def test_variances_by_hand(apart: list[list[float]], variance: float) -> None:
    row = scores(apart)
    found = difference(row, zeros(row), [0])
    assert found is not None
    assert found.nats == pytest.approx(np.mean(apart))
    assert found.standard_error == pytest.approx(math.sqrt(variance))


def test_one_seed_and_one_block_give_no_standard_error() -> None:
    row = scores([[1.0, 2.0]], block=[7, 7])
    found = difference(row, zeros(row), [0])
    assert found is not None
    assert (found.nats, found.standard_error, found.marked, found.blocks) == (1.5, None, False, 1)


def test_windows_of_one_block_count_as_one() -> None:
    """Twice the windows with the same values in the same blocks say nothing new."""
    once = scores([[1.0, 3.0, 2.0], [2.0, 6.0, 1.0]])
    twice = scores(np.repeat(once.nll, 2, axis=1), block=[0, 0, 1, 1, 2, 2])
    a, b = (difference(row, zeros(row), [0]) for row in (once, twice))
    assert a is not None
    assert b is not None
    assert a.standard_error == pytest.approx(b.standard_error)


def test_domains_weigh_the_same_whatever_their_length() -> None:
    row = scores([[10.0, 10.0, 10.0, 3.0]], tokens=[10, 10, 10, 1], domain=[0, 0, 0, 1])
    found = difference(row, zeros(row), [0, 1])
    assert found is not None
    assert found.nats == pytest.approx((1.0 + 3.0) / 2)
    assert perplexity(row, [0, 1]).value == pytest.approx(math.exp(2.0))
    assert perplexity(row, [1]).value == pytest.approx(math.exp(3.0))


def test_perplexity_has_the_standard_error_of_its_seeds() -> None:
    row = scores([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    found = perplexity(row, [0])
    assert found.value == pytest.approx(math.exp(2.0))
    assert found.standard_error == pytest.approx(math.exp(2.0) * 1.0 / math.sqrt(3))
    assert perplexity(scores([[1.0, 2.0]]), [0]).standard_error is None


def test_only_seeds_that_both_have_are_paired() -> None:
    row, other = scores([[5.0], [1.0]], seeds=(0, 1)), scores([[1.0], [9.0]], seeds=(1, 2))
    found = difference(row, other, [0])
    assert found is not None
    assert (found.nats, found.seeds) == (0.0, 1)
    assert difference(scores([[5.0]], seeds=(0,)), other, [0]) is None


def test_other_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="different windows"):
        difference(scores([[1.0, 1.0]]), scores([[1.0, 1.0]], tokens=[1, 2]), [0])


def test_a_difference_is_marked_beyond_two_standard_errors() -> None:
    near, far = scores([[0.0, 2.0]]), scores([[4.0, 6.0]])  # 1 and 5 with a standard error of 1
    found = [difference(row, zeros(row), [0]) for row in (near, far)]
    assert [f.marked for f in found if f is not None] == [False, True]


def test_standard_error_is_the_spread_of_the_estimate_when_seeds_and_documents_vary() -> None:
    """4,000 studies of 5 seeds x 40 documents with effects of both and noise: the mean variance is the true one."""
    rng = np.random.default_rng(0)
    seeds, blocks = 5, 40
    estimates, variances = [], []
    for _ in range(4000):
        apart = rng.normal(0, 0.3, (seeds, 1)) + rng.normal(0, 0.6, (1, blocks)) + rng.normal(0, 0.5, (seeds, blocks))
        row = scores(apart)
        found = difference(row, zeros(row), [0])
        assert found is not None
        assert found.standard_error is not None
        estimates.append(found.nats)
        variances.append(found.standard_error**2)
    true = 0.3**2 / seeds + 0.6**2 / blocks + 0.5**2 / (seeds * blocks)
    assert np.var(estimates) == pytest.approx(true, rel=0.08)
    assert np.mean(variances) == pytest.approx(true, rel=0.04)
