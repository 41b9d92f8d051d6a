"""Guesses change no choice: greedy texts are the same token for token, draws have the same distribution, whatever is guessed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from bundles import make_bundle

from edgestill.runtime.errors import BadInput
from edgestill.runtime.generate import Ending, generate_pieces
from edgestill.runtime.model import Model, load
from edgestill.runtime.sampling import Sampler, SamplingOptions
from edgestill.runtime.speculation import MAX_DRAFT, DraftLength, DraftModel, PassTimes, PromptLookup
from edgestill.runtime.text import StopStrings

PROMPT = [int(i) for i in np.random.default_rng(0).integers(1, 260, 24)] * 2


class Told:
    """Guesses given in advance: what the model would say, with a wrong one at every `wrong`-th place."""

    def __init__(self, future: Sequence[int], wrong: int, vocab: int) -> None:
        self.future, self.wrong, self.vocab = list(future), wrong, vocab
        self.proposed: list[list[int]] = []
        self.learnt: list[tuple[int, list[int]]] = []

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        start = len(tokens) - len(PROMPT)
        guesses = self.future[start : start + min(most, 5)]
        guesses = [(g + 1) % self.vocab if (start + i) % self.wrong == 0 else g for i, g in enumerate(guesses)]
        self.proposed.append(guesses)
        return guesses

    def learn(self, passed: int, seconds: float, chosen: Sequence[int]) -> None:
        assert seconds > 0
        self.learnt.append((passed, list(chosen)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(make_bundle(tmp_path_factory.mktemp("fused") / "b", "qwen3", fused=True, max_tokens=256), threads=1)


def tokens_of(model: Model, drafter: object, options: SamplingOptions, new: int = 60) -> list[int]:
    sampler = Sampler(options, model.facts.vocab_size, PROMPT)
    ending = Ending(new, frozenset(), frozenset())
    pieces = generate_pieces(
        model.backend,
        PROMPT,
        sampler,
        model.detokenizer(),
        StopStrings([]),
        ending,
        drafter,  # type: ignore[arg-type]
    )
    return [piece.token_id for piece in pieces]


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(repetition_penalty=1.3),
        SamplingOptions(temperature=0.9, top_p=0.95, seed=3),
        SamplingOptions(temperature=1.5, top_k=20, repetition_penalty=1.1, seed=4),
    ],
)
@pytest.mark.parametrize("wrong", [1, 2, 3, 1000])
def test_any_guesses_give_the_tokens_of_the_plain_loop(model: Model, options: SamplingOptions, wrong: int) -> None:
    plain = tokens_of(model, None, options)
    told = Told(plain, wrong, model.facts.vocab_size)
    assert tokens_of(model, told, options) == plain
    passes = {1: 59, 1000: 10}  # of 59 tokens after the first: one a pass, or one with five right guesses
    assert len(told.proposed) == passes.get(wrong, len(told.proposed)) < 60
    followed = [token for _, chosen in told.learnt for token in chosen]
    assert followed == plain[1 : 1 + len(followed)]
    assert all(passed == len(guesses) + 1 for (passed, _), guesses in zip(told.learnt, told.proposed, strict=False))


def test_draws_with_guesses_have_the_distribution_of_draws_without(model: Model) -> None:
    """Chi-square over the second new token of 400 texts each, guesses always the likeliest token."""
    drawn: dict[bool, list[int]] = {True: [], False: []}
    likely = tokens_of(model, None, SamplingOptions(), new=3)
    for guessing in drawn:
        for seed in range(400):
            told = Told(likely, 1000, model.facts.vocab_size) if guessing else None
            options = SamplingOptions(temperature=0.8, top_k=4, seed=seed + 1000 * guessing)
            drawn[guessing].append(tokens_of(model, told, options, new=3)[1])
    tokens = sorted({*drawn[True], *drawn[False]})
    counts = np.array([[drawn[kind].count(token) for token in tokens] for kind in (True, False)], float)
    counts = counts[:, counts.sum(0) >= 10]
    expected = counts.sum(0) * counts.sum(1, keepdims=True) / counts.sum()
    statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), counts.shape[1] - 1
    assert freedom >= 2
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations of chi-square


def test_lookup_finds_what_followed_the_longest_match() -> None:
    long, short = list(range(1, 13)), [10, 11, 12]
    text = [*long, 77, 78, *short, 55, 56, *long]
    assert PromptLookup().propose(text, 2) == [77, 78]  # twelve tokens beat the later three
    lookup = PromptLookup()
    lookup.propose(text, 2)
    lookup.learn(3, 1e-3, [77, 78, 5])
    assert lookup.propose([*text, 77, 78, 5], 4) == []  # 78 5 has not been there before
    assert PromptLookup().propose([1, 2], 4) == []
    assert PromptLookup().propose([5], 4) == []


def test_short_matches_are_trusted_only_after_they_were_right() -> None:
    lookup = PromptLookup()
    words = [1, 2, 50, 3, 1, 2, 51, 4, 1, 2]  # 1 2 is followed by something else each time
    assert lookup.propose(words, MAX_DRAFT) == []
    for _ in range(12):  # nothing is sent, but what would have been guessed is compared
        lookup.learn(1, 1e-3, [51, 4])
        guesses = lookup.propose(words, MAX_DRAFT)
    assert guesses[:2] == [51, 4]
    for _ in range(12):
        lookup.learn(len(guesses) + 1, 1e-3 * (1 + 0.3 * len(guesses)), [99])
        guesses = lookup.propose(words, MAX_DRAFT)
    assert guesses == []


def test_the_number_of_guesses_follows_their_worth() -> None:
    times = PassTimes()
    length = DraftLength(0.5, times)
    for _ in range(50):
        length.count([1, 2, 3], [1, 2, 3])
        times.add(1, 1.0)
        times.add(4, 1.6)
    assert times.slope == pytest.approx(0.2, abs=0.02)
    assert length.best(8) == 8
    assert length.best(8, guess_cost=2.0) == 0
    for _ in range(50):
        length.count([1, 2, 3], [0])
    assert length.best(8) == 0
    assert length.share_right < 0.02


def test_a_model_drafts_for_itself_and_is_always_right(model: Model) -> None:
    plain = tokens_of(model, None, SamplingOptions(), new=80)
    drafter = DraftModel(model.backend, 200)
    done, guessed = 0, 0
    while done < 60:
        guesses = drafter.propose([*PROMPT, *plain[:done]], 3)
        assert guesses == plain[done : done + len(guesses)]
        chosen = plain[done : done + len(guesses) + 1]
        drafter.learn(len(guesses) + 1, 1.0 + 0.1 * len(guesses), chosen)  # passes that cost a guess next to nothing
        done, guessed = done + len(chosen), guessed + len(guesses)
    assert guessed >= 30


def test_drafts_of_a_loaded_model_and_of_the_text(model: Model, tmp_path: Path) -> None:
    plain = model.generate(PROMPT, max_new_tokens=50)
    for draft in ("lookup", model):
        text = model.generate(PROMPT, max_new_tokens=50, draft=draft)  # type: ignore[arg-type]
        assert text.token_ids == plain.token_ids
        assert len(text.statistics.inter_token_ms) == 49
    assert text.statistics.guessed_tokens >= text.statistics.accepted_tokens > 0
    assert plain.statistics.acceptance_rate is None
    with pytest.raises(BadInput, match="give 'lookup', a loaded model or None"):
        model.generate(PROMPT, max_new_tokens=2, draft="look")  # type: ignore[arg-type]
    other = load(make_bundle(tmp_path / "other", "llama", fused=True, vocab=512), threads=1)
    with pytest.raises(BadInput, match="has another vocabulary"):
        model.generate(PROMPT, max_new_tokens=2, draft=other)
    growing = load(make_bundle(tmp_path / "growing", "llama"), threads=1)
    with pytest.raises(BadInput, match="can't be rewound"):
        growing.generate(PROMPT, max_new_tokens=2, draft="lookup")
