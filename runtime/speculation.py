"""Speculation: guess the next tokens, verify them in one pass, keep those the model would have chosen itself.

    PromptLookup   what followed the last time these tokens appeared (LLMA, arXiv 2304.04487; prompt lookup decoding)
    DraftModel     a smaller student, greedily

Verification chooses token after token with the caller's own sampler from the model's own logits, and goes on while the choice
is the guess. So a guess changes no token and no distribution, whatever it is; it only saves passes. The pass over n tokens and
n passes over one token round differently in the last bits, so equal logits to those bits may tie otherwise.

How many guesses are worth their verification is worked out from what was seen (`DraftLength`): how often guesses were right,
counted also when none was sent, and what passes of each length took.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

import numpy as np

from edgestill.runtime.backends import F32, Backend, prefill_last
from edgestill.runtime.errors import BadInput

MAX_DRAFT = 8
"""Guesses in one pass: a pass over 9 tokens costs a small int4 model on a CPU three passes over one."""
INDEXED = (2, 4)
"""Runs of tokens that are looked up; single tokens repeat in every text, and what follows them does not."""
ID_BITS = 32
"""More than a token id has."""
LENGTHS = ((2, 0.1), (3, 0.3), (4, 0.5), (6, 0.7), (9, 0.9))
"""Least length of a match, and the share of guesses taken to be right behind such a match before any was seen."""
MEMORY = 0.9
"""Weight of the past at each new observation."""
MARGIN = 1.3
"""Tokens per time that guesses must promise, over the plain loop's. A pass over one token that follows one over several takes up to
a third longer than after its like, which no count of guesses shows."""


class Drafter(Protocol):
    """Where guesses come from. One belongs to one text."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` guesses at what follows `tokens`, prompt included; asked once per pass."""
        ...

    def learn(self, passed: int, seconds: float, chosen: Sequence[int]) -> None:
        """The pass over `passed` tokens after the last proposal took so long and gave the tokens `chosen`."""
        ...


class PassTimes:
    """What a pass over n tokens costs, in passes over one: 1 + slope (n - 1), the slope as measured."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._measured = 2
        """Slopes seen; the first counts as two."""
        self.slope = 0.35

    def add(self, passed: int, seconds: float) -> None:
        """A pass over `passed` tokens took so long."""
        before = self._seconds.get(passed, seconds)
        now = self._seconds[passed] = MEMORY * before + (1 - MEMORY) * min(seconds, 2 * before)
        if passed > 1 and 1 in self._seconds:
            measured = max(0.0, (now / self._seconds[1] - 1) / (passed - 1))
            self._measured += 1
            weight = max(1 - MEMORY, 1 / self._measured)
            self.slope += weight * (measured - self.slope)

    @property
    def one(self) -> float | None:
        """Seconds of a pass over one token; None before the first."""
        return self._seconds.get(1)


class DraftLength:
    """How many guesses pay, from the share that was right and what passes cost."""

    def __init__(self, right: float, times: PassTimes) -> None:
        """`right`: share of guesses taken to be right before any was seen."""
        self._right, self._seen = right * 2.0, 2.0
        self._times = times

    @property
    def share_right(self) -> float:
        """Of guesses whose predecessors were right."""
        return self._right / self._seen

    def count(self, guesses: Sequence[int], chosen: Sequence[int]) -> None:
        """Compare guesses with what was chosen, up to the first that was wrong."""
        for guess, token in zip(guesses, chosen, strict=False):
            self._right = MEMORY * self._right + (guess == token)
            self._seen = MEMORY * self._seen + 1
            if guess != token:
                return

    def best(self, most: int, guess_cost: float = 0.0) -> int:
        """The number of guesses up to `most` with the most tokens per time; `guess_cost` in passes over one token."""
        right, per_guess = min(self.share_right, 0.99), self._times.slope + guess_cost
        if right < MARGIN * (1 + per_guess) - 1:
            return 0  # one guess does not pay; that several would is rare, and not worth trying
        tokens, best, best_rate, likely = 1.0, 0, MARGIN, 1.0
        for n in range(1, most + 1):
            likely *= right
            tokens += likely
            if (rate := tokens / (1 + n * per_guess)) > best_rate:
                best, best_rate = n, rate
        return best


class PromptLookup:
    """Guesses are what followed the latest earlier place that ends in the same tokens, the longest match first."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int, dict[int, int]]] = [(n, (1 << n * ID_BITS) - 1, {}) for n in INDEXED]
        """Per length of run: its mask, and the place behind the latest such run by its tokens, written into one integer."""
        self._latest = 0
        """The last tokens that were indexed, as the runs write them; one shift a token is cheaper than a tuple a length."""
        self._indexed = 0
        # the longer the match, the likelier it goes on: each length keeps its own score. Short ones are not trusted before they
        # were right, which shows at no cost, since guesses that are not sent are counted too
        self._times = PassTimes()
        self._scores = [DraftLength(right, self._times) for _, right in LENGTHS]
        self._score: DraftLength | None = None
        self._guesses: list[int] = []

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """See `Drafter.propose`."""
        self._index(tokens)
        self._score, self._guesses = None, []
        for n, mask, places in reversed(self._runs):
            place = places.get(self._latest & mask)
            if place is None:
                continue
            self._score = self._scores[_class_of(_matched(tokens, place, n))]
            self._guesses = list(tokens[place : place + MAX_DRAFT])
            return self._guesses[: self._score.best(min(most, len(self._guesses)))]
        return []

    def learn(self, passed: int, seconds: float, chosen: Sequence[int]) -> None:
        """See `Drafter.learn`."""
        self._times.add(passed, seconds)
        if self._score is not None:
            self._score.count(self._guesses, chosen)

    def _index(self, tokens: Sequence[int]) -> None:
        """Note, for every run of tokens, what comes behind it; the end of the text has nothing behind it yet."""
        latest, widest = self._latest, self._runs[-1][1]
        for end in range(self._indexed, len(tokens)):
            for n, mask, places in self._runs:
                if n <= end:
                    places[latest & mask] = end
            latest = (latest << ID_BITS | int(tokens[end])) & widest
        self._latest, self._indexed = latest, len(tokens)


def _matched(tokens: Sequence[int], place: int, known: int) -> int:
    """How many tokens before `place` are those at the end of `tokens`; at least `known`, counted up to the longest class."""
    length, longest = known, min(LENGTHS[-1][0], place)
    while length < longest and tokens[place - 1 - length] == tokens[len(tokens) - 1 - length]:
        length += 1
    return length


def _class_of(length: int) -> int:
    return max(i for i, (least, _) in enumerate(LENGTHS) if length >= least)


class DraftModel:
    """Guesses are the greedy tokens of a smaller model with the same vocabulary."""

    def __init__(self, backend: Backend, max_tokens: int) -> None:
        """`max_tokens`: of the text, prompt included.

        Raises:
            BadInput: its cache can't be rewound.
        """
        if not backend.rewinds:
            raise BadInput("the draft model's cache can't be rewound; build its bundle with fused attention")
        self._backend = backend
        self._state = backend.new_state(1, min(max_tokens + MAX_DRAFT, backend.facts.max_tokens))
        self._held: list[int] = []
        self._times = PassTimes()
        self._length = DraftLength(0.7, self._times)
        self._guesses: list[int] = []
        self._guess_s = 0.0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """See `Drafter.propose`."""
        room = self._state.max_tokens - len(tokens)
        one = self._times.one
        cost = self._guess_s / one if one else 0.2
        wanted = self._length.best(max(0, min(most, room)), cost)
        self._guesses = []
        if wanted == 0 and room > 0 and len(tokens) % 16 == 0:
            wanted = 1  # now and then, lest a bad start be the last word
        if wanted == 0:
            return []
        logits = self._catch_up(tokens)
        for _ in range(wanted):
            started = perf_counter()
            guess = int(logits.argmax())
            self._guesses.append(guess)
            if len(self._guesses) < wanted:
                logits = self._backend.step(self._state, np.array([[guess]], np.int64))[0, -1]
                self._held.append(guess)
                spent = perf_counter() - started
                self._guess_s = MEMORY * self._guess_s + (1 - MEMORY) * spent if self._guess_s else spent
        return self._guesses

    def learn(self, passed: int, seconds: float, chosen: Sequence[int]) -> None:
        """See `Drafter.learn`."""
        self._times.add(passed, seconds)
        self._length.count(self._guesses, chosen)

    def _catch_up(self, tokens: Sequence[int]) -> F32:
        """Hold exactly `tokens`; the logits after the last."""
        same = 0
        for held, token in zip(self._held, tokens[:-1], strict=False):
            if held != token:
                break
            same += 1
        self._backend.rewind(self._state, same)
        self._held = list(tokens)
        last: F32 = prefill_last(self._backend, self._state, np.asarray([tokens[same:]], np.int64))[0]
        return last
