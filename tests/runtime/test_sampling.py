"""The filters are transformers' filters, draws follow the distribution, and options are checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edgestill.runtime.errors import BadInput, BundleError
from edgestill.runtime.sampling import HEAD, Sampler, SamplingOptions, distribution, repetition_penalty


def random_logits(vocab: int, seed: int = 0, scale: float = 3.0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)


def theirs(logits: npt.NDArray[np.float32], prompt: list[int], options: SamplingOptions) -> npt.NDArray[np.float64]:
    """Probabilities [V] after transformers' processors, in the order in which generate() builds them."""
    processors = LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p > 0.0:
        processors.append(MinPLogitsWarper(options.min_p))
    scores = processors(torch.tensor([prompt]), torch.from_numpy(logits.copy())[None])
    result: npt.NDArray[np.float64] = torch.softmax(scores.double(), -1)[0].numpy()
    return result


@pytest.mark.parametrize("vocab", [50, 3 * HEAD])
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 5.0, "top_k": 1},
        {"top_k": 7},
        {"top_k": 10_000},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"temperature": 50.0, "top_p": 0.95},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
)
def test_filters_equal_those_of_transformers(vocab: int, words: dict[str, Any]) -> None:
    options = SamplingOptions(**{"temperature": 1.0, **words})
    for seed in range(5):
        logits = random_logits(vocab, seed)
        prompt = [1, 4, 4, int(logits.argmax())]
        seen = np.zeros(vocab, np.bool_)
        seen[prompt] = True
        tokens, probabilities = distribution(repetition_penalty(logits, seen, options.repetition_penalty), options)
        ours = np.zeros(vocab)
        ours[tokens] = probabilities
        expected = theirs(logits, prompt, options)
        assert np.array_equal(ours > 0, expected > 0)
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-9)


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 8 tokens: 7 degrees of freedom, critical value 24.32 at 0.1 %."""
    logits = random_logits(8, seed=3, scale=1.0)
    options = SamplingOptions(temperature=0.7, seed=11)
    sampler, draws = Sampler(options, 8), 20_000
    counts = np.bincount([sampler.choose(logits)[0] for _ in range(draws)], minlength=8)
    expected = draws * theirs(logits, [0], options)
    assert ((counts - expected) ** 2 / expected).sum() < 24.32
    uniform = np.full(8, draws / 8)  # the test must be able to fail
    assert ((counts - uniform) ** 2 / uniform).sum() > 24.32


def test_filtered_tokens_are_never_drawn() -> None:
    logits = random_logits(50)
    sampler = Sampler(SamplingOptions(temperature=2.0, top_k=3, seed=0), 50)
    assert {sampler.choose(logits)[0] for _ in range(500)} == set(np.argsort(logits)[-3:].tolist())


def test_one_seed_gives_one_sequence_and_another_gives_another() -> None:
    logits = random_logits(300, scale=0.1)

    def sequence(seed: int) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed), 300)
        return [sampler.choose(logits)[0] for _ in range(20)]

    assert sequence(5) == sequence(5)
    assert sequence(0) != sequence(5)


def test_greedy_takes_the_first_largest_and_penalty_moves_it() -> None:
    logits = np.array([1.0, 3.0, 3.0, -1.0], np.float32)
    assert Sampler(SamplingOptions(), 4).choose(logits)[0] == 1
    penalised = Sampler(SamplingOptions(repetition_penalty=2.0), 4, prompt_ids=[1])
    assert [penalised.choose(logits)[0] for _ in range(3)] == [2, 1, 1]  # 3/2 each after one use; 1 stays 1.5 > 1


@pytest.mark.parametrize("words", [{}, {"temperature": 0.5, "top_k": 2, "repetition_penalty": 3.0, "seed": 1}])
def test_logprob_is_that_of_the_unmodified_distribution(words: dict[str, Any]) -> None:
    logits = random_logits(1000, scale=20.0)
    sampler = Sampler(SamplingOptions(**words), 1000, prompt_ids=[int(logits.argmax())])
    token, logprob = sampler.choose(logits)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1)[token].item()
    assert abs(logprob - expected) < 1e-5


def test_a_row_may_hold_minus_infinity_but_not_nan() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf], np.float32)
    sampler = Sampler(SamplingOptions(temperature=1.0, top_p=0.9, min_p=0.1, seed=0), 3)
    assert sampler.choose(logits) == (1, 0.0)
    for bad in (np.nan, np.inf):
        with pytest.raises(BundleError, match="largest logit is"):
            sampler.choose(np.array([0.0, bad, 1.0], np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", True),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", "x"),
    ],
)
def test_options_out_of_range_are_refused_with_value_and_range(name: str, value: Any) -> None:
    with pytest.raises(BadInput, match=rf"^{name} is .*; give a "):
        SamplingOptions(**{name: value})


@pytest.mark.parametrize("offset", [-3000.0, -70.0, 0.0, 55.0, 63.0, 80.0, 3000.0])
def test_log_probabilities_hold_for_logits_of_any_size(offset: float) -> None:
    logits = (np.random.default_rng(5).normal(0, 4, 50_000) + offset).astype(np.float32)
    exact = logits.astype(np.float64)
    exact -= exact.max() + np.log(np.exp(exact - exact.max()).sum())
    token, logprob = Sampler(SamplingOptions(), 50_000).choose(logits)
    assert token == exact.argmax()
    assert logprob == pytest.approx(exact[token], abs=1e-5)
