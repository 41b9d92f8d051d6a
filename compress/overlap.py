"""Is held-out text new to the student? Runs of 32 tokens are looked up, at every alignment, in what it was trained on.

Every run is hashed by doubling (a run of 2m is mixed from two runs of m), 64 bits, vectorised: five passes over the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgestill.compress.packing import Ints, Part
from edgestill.runtime.errors import BadInput

RUN = 32
"""Tokens per run: longer than phrases and quotations that texts share by chance."""
LIMIT = 0.01
BLOCK = 1 << 20
"""Tokens hashed at a time, so that memory stays flat."""

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Overlap:
    """Share of a part's runs that occur in the parts named before it, between 0 and LIMIT."""

    validation: float
    held_out: float


def check_disjoint(training: Part, validation: Part, held_out: Part, decode: Callable[[list[int]], str]) -> Overlap:
    """Refuse validation text that occurs in training, and held-out text that occurs in either.

    Only runs at least half of whose tokens are labels that count are looked up: a system prompt common to all rows is no
    overlap.

    Raises:
        BadInput: more than LIMIT of the runs occur; quotes the first.
    """
    shares = []
    for name, part, others in (
        ("validation", validation, [("training", training)]),
        ("held-out", held_out, [("training", training), ("validation", validation)]),
    ):
        chunks = _chunks(part)
        found = occurring(chunks, [other.token_ids.reshape(-1) for _, other in others])
        share = float(found.mean()) if len(found) else 0.0
        if share > LIMIT:
            first = " ".join(decode(chunks[int(np.argmax(found))].tolist()).split())[:120]
            where = " or ".join(other for other, _ in others)
            raise BadInput(
                f"{100 * share:.1f} % of the {name} text occurs in the {where} text (limit {100 * LIMIT:g} % of its "
                f"{RUN}-token runs), first {first!r}; remove it from one of them"
            )
        shares.append(share)
    return Overlap(*shares)


def occurring(chunks: Ints, texts: Sequence[Ints]) -> npt.NDArray[np.bool_]:
    """bool [m]: which of `chunks` [m, RUN] occur in any of `texts` (1-D token ids), at any alignment."""
    needles, where = np.unique(_hash(chunks.reshape(-1))[::RUN], return_inverse=True)
    seen = np.zeros(len(needles), bool)
    for text in texts:
        for start in range(0, max(0, len(text) - RUN + 1), BLOCK):
            hashes = _hash(text[start : start + BLOCK + RUN - 1])
            at = np.searchsorted(needles, hashes)
            at[at == len(needles)] = 0
            if len(needles):
                seen[at[needles[at] == hashes]] = True
    return seen[where] if len(needles) else np.zeros(0, bool)


def _chunks(part: Part) -> Ints:
    """[m, RUN]: the part's runs side by side (windows follow each other), without those most of whose tokens do not count."""
    m = part.token_ids.size // RUN
    chunks = np.asarray(part.token_ids).reshape(-1)[: m * RUN].reshape(m, RUN)
    if part.loss_mask is None:
        return chunks
    counted = np.asarray(part.loss_mask).reshape(-1)[: m * RUN].reshape(m, RUN).sum(axis=1)
    kept: Ints = chunks[counted * 2 >= RUN]
    return kept


def _mix(x: U64) -> U64:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(tokens: Ints) -> U64:
    """uint64 [n - RUN + 1]: one hash per run of RUN tokens. Arithmetic is modulo 2**64."""
    h = _mix(tokens.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    m = 1
    while m < RUN and len(h) > m:
        h = _mix(h[:-m] * np.uint64(0x9E3779B97F4A7C15) + h[m:])
        m *= 2
    return h if m == RUN else h[:0]
