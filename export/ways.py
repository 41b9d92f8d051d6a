"""The ways of running a graph that must all give the same logits.

    prefill               all tokens of a window in one step
    chunked prefill       the same in several steps, so that the cache is read
    single steps          one token at a time from an empty cache (the first window only)
    decode after prefill  a prompt in one step, then one token at a time
    left padding          a batch of two rows of which the second starts later; its padding is not compared

Each takes a backend and token ids int64 [W, T], T >= 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from edgestill.runtime.backends import F32, I64, Backend

Steps = Iterator[tuple[int, int, F32]]
"""(window, first position, logits [n, V]) of each step; the logits are valid until the next."""


def _prefill(backend: Backend, ids: I64) -> Steps:
    yield from _stepwise(backend, ids, [ids.shape[1]])


def _chunked(backend: Backend, ids: I64) -> Steps:
    size = max(1, ids.shape[1] // 3 - 1)  # a size that does not divide the window: the last chunk is shorter
    full, rest = divmod(ids.shape[1], size)
    yield from _stepwise(backend, ids, [size] * full + [rest] * (rest > 0))


def _single(backend: Backend, ids: I64) -> Steps:
    yield from _stepwise(backend, ids[:1], [1] * ids.shape[1])


def _decode(backend: Backend, ids: I64) -> Steps:
    steps = min(8, ids.shape[1] - 1)
    yield from _stepwise(backend, ids, [ids.shape[1] - steps, *[1] * steps])


def _stepwise(backend: Backend, ids: I64, sizes: list[int]) -> Steps:
    for window, row in enumerate(ids):
        state, start = backend.new_state(1, len(row)), 0
        for size in sizes:
            yield window, start, backend.step(state, row[None, start : start + size])[0]
            start += size


def _padded(backend: Backend, ids: I64) -> Steps:
    length = ids.shape[1]
    padding, other = length // 3, min(1, len(ids) - 1)
    late = np.concatenate([np.zeros(padding, np.int64), ids[other, : length - padding]])
    batch = np.stack([ids[0], late])
    state, start = backend.new_state(2, length, left_padding=[0, padding]), 0
    for size in [length - 4, 1, 1, 1, 1] if length > 4 else [length]:
        logits = backend.step(state, batch[:, start : start + size])
        yield 0, start, logits[0]
        if start + size > padding:
            yield other, max(start - padding, 0), logits[1, max(padding - start, 0) :]
        start += size


WAYS: dict[str, Callable[[Backend, I64], Steps]] = {
    "prefill": _prefill,
    "chunked prefill": _chunked,
    "single steps": _single,
    "decode after prefill": _decode,
    "left padding": _padded,
}
