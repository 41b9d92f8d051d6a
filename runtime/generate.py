"""The decode loop: a prompt in, pieces of text out, one per token, with the time each took.

Work is done only while the caller asks for the next piece, so leaving the loop stops it and frees the cache. Times are those
of the model: what the caller does between two pieces is not counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np

from edgestill.runtime.backends import F32, Backend, prefill_last
from edgestill.runtime.sampling import Sampler
from edgestill.runtime.speculation import MAX_DRAFT, Drafter
from edgestill.runtime.text import Detokenizer, StopStrings

Finish = Literal["stop", "length", "eos"]
"""`stop`: a stop string or stop token; `length`: max_new_tokens; `eos`: the model's own end."""


@dataclass(frozen=True)
class GenerationStatistics:
    """What one call did and how long it took."""

    prompt_tokens: int
    new_tokens: int
    """Tokens produced, the one that ended the text included."""
    first_token_ms: float
    """From the start of the work to the first token: prefill, choice and decoding to text."""
    inter_token_ms: tuple[float, ...]
    """Time of every token after the first. Guesses that were right come with the token before them: their time is next to 0."""
    finish_reason: Finish
    guessed_tokens: int = 0
    """Guesses that were verified (speculation.py)."""
    accepted_tokens: int = 0
    """Guesses that were right."""

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the guesses that were right; None without guesses."""
        return self.accepted_tokens / self.guessed_tokens if self.guessed_tokens else None

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens / time to the first token."""
        return 1000.0 * self.prompt_tokens / self.first_token_ms

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first / the time they took; None when there is only one."""
        return 1000.0 * len(self.inter_token_ms) / sum(self.inter_token_ms) if self.inter_token_ms else None

    @property
    def inter_token_ms_mean(self) -> float | None:
        """Mean time between tokens; None when there is only one token."""
        return sum(self.inter_token_ms) / len(self.inter_token_ms) if self.inter_token_ms else None

    def inter_token_ms_percentile(self, percent: float) -> float | None:
        """Percentile of the time between tokens (linear interpolation); None when there is only one token."""
        return float(np.percentile(self.inter_token_ms, percent)) if self.inter_token_ms else None


@dataclass(frozen=True)
class Piece:
    """One token and the text that it completed."""

    text: str
    """Whole characters only; empty while a character or a possible stop string is incomplete."""
    token_id: int
    logprob: float
    """Of the token under the model's own distribution (before temperature, filters and penalty), nats."""
    finish: Finish | None = None
    """Set on the last piece, with `statistics`."""
    statistics: GenerationStatistics | None = None


@dataclass(frozen=True)
class Generation:
    """A finished text."""

    text: str
    token_ids: tuple[int, ...]
    """Every token produced, the one that ended the text included."""
    logprobs: tuple[float, ...]
    finish_reason: Finish
    statistics: GenerationStatistics


@dataclass(frozen=True)
class Ending:
    """What ends a text before its length does."""

    max_new_tokens: int
    eos_token_ids: Collection[int]
    stop_token_ids: Collection[int]

    def reason(self, token_id: int, new_tokens: int, stopped: bool) -> Finish | None:
        """Why the text ends after this token, or None."""
        if stopped or token_id in self.stop_token_ids:
            return "stop"
        if token_id in self.eos_token_ids:
            return "eos"
        return "length" if new_tokens == self.max_new_tokens else None


def generate_pieces(
    backend: Backend,
    prompt_ids: Sequence[int],
    sampler: Sampler,
    detokenizer: Detokenizer,
    stops: StopStrings,
    ending: Ending,
    drafter: Drafter | None = None,
) -> Iterator[Piece]:
    """Decode after `prompt_ids` (at least one token); the last piece has `finish` and `statistics`.

    Arguments are checked by `Model.stream`.
    """
    started = perf_counter()
    passes = _Passes(backend, prompt_ids, ending.max_new_tokens, drafter)
    times: list[float] = []
    while True:
        token, logprob = sampler.choose(passes.logits)
        silent = token in ending.eos_token_ids or token in ending.stop_token_ids
        text = stops.push("" if silent else detokenizer.push(token))
        finish = ending.reason(token, len(times) + 1, stops.stopped)
        if finish is not None and not stops.stopped:
            text += stops.flush()
        times.append(1000.0 * (perf_counter() - started))
        if finish is not None:
            break
        yield Piece(text, token, logprob)
        started = perf_counter()
        passes.append(token, ending.max_new_tokens - len(times))
    statistics = GenerationStatistics(
        len(prompt_ids), len(times), times[0], tuple(times[1:]), finish, passes.guessed, passes.accepted
    )
    yield Piece(text, token, logprob, finish, statistics)


class _Passes:
    """The model's side of one text: logits after the last token, and guesses that were verified along with it."""

    def __init__(
        self, backend: Backend, prompt_ids: Sequence[int], max_new_tokens: int, drafter: Drafter | None
    ) -> None:
        self._backend, self._drafter = backend, drafter
        self._state = backend.new_state(1, len(prompt_ids) + max_new_tokens)
        self.logits: F32 = prefill_last(backend, self._state, np.asarray([prompt_ids], np.int64))[0]
        """float32 [V], valid until the next `append`."""
        self.guessed = self.accepted = 0
        self._one = np.empty((1, 1), np.int64)
        self._tokens = list(prompt_ids)
        self._guesses: list[int] = []
        self._ahead: F32 | None = None
        """float32 [guesses + 1, V] of the last pass."""
        self._used = 0
        """Rows of `_ahead` that were chosen from."""
        self._seconds = 0.0

    def append(self, token: int, left: int) -> None:
        """`token` was chosen, and at most `left` more will be."""
        if self._drafter is None:
            self._one[0, 0] = token
            self.logits = self._backend.step(self._state, self._one)[0, 0]
            return
        self._tokens.append(token)
        if self._ahead is not None and self._guesses[self._used - 1 : self._used] == [token]:
            self.accepted += 1
            self.logits = self._ahead[self._used]
            self._used += 1
            return
        self._pass(token, left, self._drafter)

    def _pass(self, token: int, left: int, drafter: Drafter) -> None:
        """Verify the next guesses in one pass."""
        if self._ahead is not None:
            if self._used <= len(self._guesses):  # the rest was wrong, or not asked for
                self._backend.rewind(self._state, len(self._tokens) - 1)
            drafter.learn(len(self._guesses) + 1, self._seconds, self._tokens[-self._used :])
        self._guesses = drafter.propose(self._tokens, min(left - 1, MAX_DRAFT))
        step = self._one
        if self._guesses:
            step = np.array([[token, *self._guesses]], np.int64)
        else:
            step[0, 0] = token
        started = perf_counter()
        self._ahead = self._backend.step(self._state, step)[0]
        self._seconds = perf_counter() - started
        self.guessed += len(self._guesses)
        self.logits, self._used = self._ahead[0], 1
