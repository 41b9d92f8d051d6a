"""Tokens to windows: documents back to back, cut into rows of T, with the labels that count and standard-error blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK_WINDOWS = 4
"""Longest standard-error block, in windows: neighbours in one document are not independent samples."""

Ints = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Part:
    """Training, validation or held-out text as n windows of T tokens.

    token_ids: uint16 or uint32 [n, T]; loss_mask: uint8 [n, T], 1 where token i is a label that counts, None when all do;
    domain int16 [n] (index into Corpus.domains); block int32 [n] (windows of one block are one stretch of one document);
    source int16 [n] (index into Corpus.sources).
    """

    token_ids: npt.NDArray[Any]
    loss_mask: npt.NDArray[np.uint8] | None
    domain: npt.NDArray[np.int16]
    block: npt.NDArray[np.int32]
    source: npt.NDArray[np.int16]

    @property
    def n_windows(self) -> int:
        return int(self.token_ids.shape[0])


@dataclass(frozen=True, eq=False)
class Stream:
    """Tokenised documents back to back: token_ids [n], counts uint8 [n] (labels that count), ends int64 [documents]."""

    token_ids: Ints
    counts: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]
    """Where each document ends, exclusive, in tokens."""

    def between(self, start: int, stop: int) -> Stream:
        """Tokens `start` to `stop`, which lie between documents."""
        ends = self.ends[(self.ends > start) & (self.ends <= stop)] - start
        return Stream(self.token_ids[start:stop], self.counts[start:stop], ends)

    def shuffled(self, rng: np.random.Generator) -> Stream:
        """The same documents in another order: neighbours in a file are often alike, and a window should not be."""
        starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)
        order = rng.permutation(len(self.ends))
        index = np.concatenate([np.arange(starts[i], self.ends[i]) for i in order])
        ends = np.cumsum((self.ends - starts)[order])
        return Stream(self.token_ids[index], self.counts[index], ends.astype(np.int64))


def cut_stream(stream: Stream, shares: dict[str, float]) -> dict[str, Stream]:
    """`training` and the named shares of `stream`, cut at the document ends nearest to them."""
    pieces, stop, left = {}, len(stream.token_ids), 1.0
    inner = stream.ends[:-1]
    for name in reversed(shares):
        left -= shares[name]
        start = int(inner[np.argmin(np.abs(inner - left * len(stream.token_ids)))]) if len(inner) else stop
        pieces[name] = stream.between(min(start, stop), stop)
        stop = min(start, stop)
    return {**pieces, "training": stream.between(0, stop)}


def pack(streams: list[tuple[Stream, int, int]], length: int) -> Part:
    """Windows of `length` tokens from (stream, source index, domain index); what is left at a source's end is dropped."""
    rows, masks, domains, blocks, sources = [], [], [], [], []
    first_block = 0
    for stream, source, domain in streams:
        n = len(stream.token_ids) // length
        rows.append(stream.token_ids[: n * length].reshape(n, length))
        masks.append(stream.counts[: n * length].reshape(n, length))
        block = window_blocks(stream.ends, n, length) + first_block
        first_block = int(block[-1]) + 1 if n else first_block
        blocks.append(block)
        domains.append(np.full(n, domain, np.int16))
        sources.append(np.full(n, source, np.int16))
    mask = np.concatenate(masks)
    return Part(
        token_ids=np.concatenate(rows),
        loss_mask=None if mask.all() else mask,
        domain=np.concatenate(domains),
        block=np.concatenate(blocks).astype(np.int32),
        source=np.concatenate(sources),
    )


def window_blocks(ends: npt.NDArray[np.int64], n: int, length: int) -> npt.NDArray[np.int32]:
    """int32 [n]: at most BLOCK_WINDOWS neighbours that lie in one document share a block; a window of several has its own.

    Documents of 10 windows: blocks 0 0 0 0 1 1 1 1 2 2. `ends` are the documents' exclusive ends in tokens.
    """
    if n == 0:
        return np.zeros(0, np.int32)
    starts = np.arange(n, dtype=np.int64) * length
    first = np.searchsorted(ends, starts, side="right")
    inside = first == np.searchsorted(ends, starts + length - 1, side="right")
    fresh = np.ones(n, bool)
    fresh[1:] = ~inside[1:] | ~inside[:-1] | (first[1:] != first[:-1])
    run_start = np.maximum.accumulate(np.where(fresh, np.arange(n), 0))
    fresh |= (np.arange(n) - run_start) % BLOCK_WINDOWS == 0
    return (np.cumsum(fresh) - 1).astype(np.int32)


def some_of(part: Part, windows: int) -> Part:
    """The part itself, or about this many windows of it as `spread` chooses them."""
    if part.n_windows <= windows:
        return part
    chosen = spread(part, windows)
    mask = None if part.loss_mask is None else part.loss_mask[chosen]
    return Part(part.token_ids[chosen], mask, part.domain[chosen], part.block[chosen], part.source[chosen])


def spread(part: Part, windows: int) -> npt.NDArray[np.int64]:
    """About this many windows of a part, ascending: each domain the same number where it has them, evenly spaced."""
    domains = np.unique(part.domain)
    per_domain = max(1, windows // len(domains))
    chosen = []
    for domain in domains:
        own = np.flatnonzero(part.domain == domain)
        picks = np.linspace(0, len(own) - 1, min(per_domain, len(own))).round().astype(np.int64)
        chosen.append(own[np.unique(picks)])
    return np.sort(np.concatenate(chosen))
