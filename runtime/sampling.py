"""From one row of logits to one token: greedy or sampled, with the filters of transformers in transformers' order.

    repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw

Definitions: nucleus sampling arXiv 1904.09751 (top-p), arXiv 2407.01082 (min-p), CTRL arXiv 1909.05858 (penalty).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgestill.runtime.errors import BadInput, BundleError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

PLAIN_EXP = 64.0
"""exp(64) is 6e27: a sum of as many as a vocabulary has stays far below float32's 3e38, and exp(-64) far above its least."""
HEAD = 1024
"""A nucleus is nearly always among the 1024 most likely tokens; sorting a whole vocabulary would cost more than a small graph."""


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen. The defaults here are the only place they are written."""

    temperature: float = 0.0
    """0: greedy, the most likely token. Above 0 logits are divided by it before a draw."""
    top_k: int = 0
    """Draw among the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Draw among tokens at least this share as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen before (prompt included) are divided by it when positive, multiplied when negative."""
    seed: int | None = None
    """Of numpy's PCG64; None: fresh entropy, every run differs."""

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0.0, math.inf, "[0, inf)")
        _in_range("top_p", self.top_p, math.ulp(0.0), 1.0, "(0, 1]")
        _in_range("min_p", self.min_p, 0.0, 1.0, "[0, 1]")
        _in_range("repetition_penalty", self.repetition_penalty, math.ulp(0.0), math.inf, "(0, inf)")
        _not_negative("top_k", self.top_k)
        if self.seed is not None:
            _not_negative("seed", self.seed)


def _in_range(name: str, value: float, least: float, most: float, text: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not least <= value <= most:
        raise BadInput(f"{name} is {value!r}; give a number in {text}")


def _not_negative(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadInput(f"{name} is {value!r}; give a whole number, 0 or more")


class Sampler:
    """Chooses tokens of one sequence; keeps the random generator and, when penalised, the tokens seen."""

    def __init__(self, options: SamplingOptions, vocab_size: int, prompt_ids: Iterable[int] = ()) -> None:
        self.options = options
        self._rng = np.random.Generator(np.random.PCG64(options.seed))
        self._scratch = np.empty(vocab_size, np.float32)
        self._seen: npt.NDArray[np.bool_] | None = None
        if options.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[list(prompt_ids)] = True

    def choose(self, logits: F32) -> tuple[int, float]:
        """The next token after `logits` (float32 [V]), and its log-probability under them as they are, in nats.

        Raises:
            BundleError: a logit is NaN, or the largest is infinite.
        """
        best = int(logits.argmax())  # of a NaN, the first
        peak = float(logits[best])
        if not math.isfinite(peak):
            raise BundleError(
                f"the graph's largest logit is {peak}; run `edgestill verify`, then build the bundle again"
            )
        token, scores = best, logits
        if self._seen is not None:
            scores = repetition_penalty(logits, self._seen, self.options.repetition_penalty)
            token = int(scores.argmax())
        if self.options.temperature > 0:
            token = self._draw(scores)
        # exp of logits of usual size fits float32 as they are: one pass less over a vocabulary that is in no cache any more
        shift = 0.0 if abs(peak) < PLAIN_EXP else peak
        np.exp(logits if shift == 0.0 else np.subtract(logits, shift, out=self._scratch), out=self._scratch)
        logprob = float(logits[token]) - shift - math.log(float(self._scratch.sum()))
        if self._seen is not None:
            self._seen[token] = True
        return token, logprob

    def _draw(self, scores: F32) -> int:
        tokens, probabilities = distribution(scores, self.options)
        cumulative = probabilities.cumsum()
        drawn = int(cumulative.searchsorted(self._rng.random() * cumulative[-1], side="right"))
        return int(tokens[min(drawn, len(tokens) - 1)])


def repetition_penalty(logits: F32, seen: npt.NDArray[np.bool_], penalty: float) -> F32:
    """A copy of `logits` (float32 [V]) with those of `seen` tokens (bool [V]) divided by `penalty`, or multiplied if negative."""
    scores = logits.copy()
    marked = logits[seen]
    scores[seen] = np.where(marked < 0, marked * np.float32(penalty), marked / np.float32(penalty))
    return scores


def distribution(scores: F32, options: SamplingOptions) -> tuple[npt.NDArray[np.intp], F64]:
    """The tokens that survive the filters, and their probabilities (float64, sum 1), for a temperature above 0.

    Each filter works on the distribution renormalised over what the one before it left. Tokens whose probabilities tie at
    a boundary stay together.
    """
    scaled = scores / np.float32(options.temperature)
    tokens = np.arange(scaled.size)
    if 0 < options.top_k < scaled.size:
        kth = np.partition(scaled, scaled.size - options.top_k)[scaled.size - options.top_k]
        tokens = np.flatnonzero(scaled >= kth)
        scaled = scaled[tokens]
    probabilities = _softmax(scaled)
    if options.top_p < 1.0:
        keep = probabilities >= _nucleus_floor(probabilities, options.top_p)
        tokens, probabilities = tokens[keep], probabilities[keep] / probabilities[keep].sum()
    if options.min_p > 0.0:
        keep = probabilities >= options.min_p * probabilities.max()
        tokens, probabilities = tokens[keep], probabilities[keep] / probabilities[keep].sum()
    return tokens, probabilities


def _softmax(scores: F32) -> F64:
    shifted = np.exp(scores - scores.max())
    normalised: F64 = shifted / shifted.sum(dtype=np.float64)
    return normalised


def _nucleus_floor(probabilities: F64, top_p: float) -> float:
    """The smallest probability in the nucleus: going down from the largest, those whose predecessors sum to less than top_p."""
    head = probabilities
    if probabilities.size > HEAD:
        head = np.partition(probabilities, probabilities.size - HEAD)[-HEAD:]
        if head.sum() < top_p:
            head = probabilities
    descending = np.sort(head)[::-1]
    before = descending.cumsum() - descending
    return float(descending[max(int(np.count_nonzero(before < top_p)), 1) - 1])
