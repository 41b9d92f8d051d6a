"""How likely a text is under the model: log-probabilities and logits of given tokens, on either path through the graph.

`prefill` runs many tokens per step, `cached` one at a time through the cache, as generation does; a graph that is right gives
the same numbers both ways, and the gate looks at both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from edgestill.runtime.backends import F32, I64, Backend, prefill

ScorePath = Literal["prefill", "cached"]


def label_logprobs(logits: F32, labels: I64) -> F32:
    """log softmax(logits)[label]: float32 [..., V] and int64 [...] -> float32 [...], nats."""
    peak = logits.max(axis=-1, keepdims=True)
    total = np.exp(logits - peak).sum(axis=-1, dtype=np.float64)
    chosen = np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    result: F32 = (chosen.astype(np.float64) - peak[..., 0] - np.log(total)).astype(np.float32)
    return result


def score(backend: Backend, token_ids: I64) -> F32:
    """log p(token i | tokens before) for i = 1 .. n - 1: int64 [n] -> float32 [n - 1], nats. Memory: one chunk of logits."""
    n = token_ids.shape[0]
    scores = np.empty(max(n - 1, 0), np.float32)
    if n < 2:
        return scores
    state = backend.new_state(1, n - 1)
    for start, logits in prefill(backend, state, token_ids[None, :-1]):
        end = start + logits.shape[1]
        scores[start:end] = label_logprobs(logits[0], token_ids[start + 1 : end + 1])
    return scores


def forward_windows(backend: Backend, token_ids: I64, *, path: ScorePath) -> Iterator[tuple[int, F32]]:
    """Logits of every position of `token_ids` (int64 [B, T]), in order; each window is a row with a cache of its own.

    Yields (start, logits): float32 [B, t, V] for positions start .. start + t - 1, valid until the next item. `cached` gives
    t = 1 throughout.
    """
    B, T = token_ids.shape
    state = backend.new_state(B, T)
    yield from prefill(backend, state, token_ids, chunk=1 if path == "cached" else None)
