"""What a model is to the rest of the runtime: a step that turns token ids into logits and remembers them.

A backend holds the weights and is shared; a `DecodeState` holds one batch of sequences and belongs to one caller. Several
threads may step different states of one backend at the same time; one state is used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgestill.runtime.errors import BadInput, PromptTooLong
from edgestill.runtime.manifest import Graph, ModelFacts

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

MAX_CHUNK = 512
"""Tokens of one step that gives logits for all of them: enough to keep every core busy, and a bound on the logits."""
PREFILL_CHUNK = 128
"""Tokens of one pass through a prompt whose last logits alone are wanted: more are no faster on two cores, and their activations
are memory. `edgestill tune` measures it."""
LOGITS_BYTES = 64 << 20
"""A prefill step computes logits for all its tokens; a large vocabulary makes it shorter than MAX_CHUNK."""


@dataclass
class DecodeState:
    """One batch of sequences in progress.

    `length` counts the tokens seen so far per row, padding included; the first `left_padding[b]` of row b are padding.
    """

    batch_size: int
    max_tokens: int
    left_padding: I64 | None = None
    """int64 [B], or None when no row is padded."""
    length: int = 0

    def check_step(self, token_ids: npt.NDArray[Any], keep: int | None) -> int:
        """Refuse a step of the wrong shape, or one that does not fit; returns how many rows of logits it gives."""
        if token_ids.ndim != 2 or token_ids.shape[0] != self.batch_size or token_ids.shape[1] < 1:
            raise BadInput(
                f"token_ids has shape {token_ids.shape}; this state takes ({self.batch_size}, n) with n >= 1"
            )
        if self.length + token_ids.shape[1] > self.max_tokens:
            raise PromptTooLong(
                f"{self.length} + {token_ids.shape[1]} tokens exceed the {self.max_tokens} of this state; "
                "ask for a longer state or send fewer tokens"
            )
        if keep is not None and not 1 <= keep <= token_ids.shape[1]:
            raise BadInput(f"logits of the last {keep} of {token_ids.shape[1]} tokens; keep 1 or more, at most all")
        return keep or token_ids.shape[1]


class Backend(Protocol):
    """Weights on a device, ready to run."""

    facts: ModelFacts
    graph: Graph
    prefill_chunk: int
    """Tokens of one pass through a prompt."""
    session: dict[str, Any]
    """How it was opened, for reports."""

    def new_state(self, batch_size: int, max_tokens: int, left_padding: Sequence[int] | None = None) -> Any:
        """An empty state (a `DecodeState` of this backend) for `batch_size` rows of at most `max_tokens` tokens.

        Raises:
            PromptTooLong: `max_tokens` exceeds the model's.
        """
        ...

    def step(self, state: Any, token_ids: I64, keep: int | None = None) -> F32:
        """Append `token_ids` (int64 [B, n]) and return the logits of the last `keep` of them (None: all), float32
        [B, keep, V], valid until the next step.

        Raises:
            PromptTooLong: `state.length + n > state.max_tokens`. The state is unchanged.
        """
        ...

    @property
    def rewinds(self) -> bool:
        """Whether `rewind` works, as speculation needs it."""
        ...

    def rewind(self, state: Any, length: int) -> None:
        """Forget all but the first `length` tokens of `state`, as if the others had never been appended.

        Raises:
            BadInput: `rewinds` is false, or there are fewer tokens.
        """
        ...


def new_state_limits(
    facts: ModelFacts, batch_size: int, max_tokens: int, left_padding: Sequence[int] | None
) -> I64 | None:
    """Check the arguments of `new_state`; returns the padding as int64 [B], or None when no row has any."""
    if batch_size < 1 or max_tokens < 1:
        raise BadInput(f"a state of {batch_size} rows x {max_tokens} tokens; both must be at least 1")
    if max_tokens > facts.max_tokens:
        raise PromptTooLong(f"{max_tokens} tokens exceed the {facts.max_tokens} of this model; send fewer tokens")
    if left_padding is None:
        return None
    padding = np.asarray(left_padding, np.int64)
    if padding.shape != (batch_size,) or padding.min() < 0 or padding.max() >= max_tokens:
        raise BadInput(f"left_padding {left_padding} must hold {batch_size} numbers in 0..{max_tokens - 1}")
    return padding if padding.any() else None


def prefill_last(backend: Backend, state: Any, token_ids: I64) -> F32:
    """Append `token_ids` (int64 [B, T], T >= 1) in chunks; returns the logits after the last, float32 [B, V], valid until the
    next step. Those of other positions are not computed where the graph can leave them out."""
    for start in range(0, token_ids.shape[1], backend.prefill_chunk):
        logits = backend.step(state, token_ids[:, start : start + backend.prefill_chunk], keep=1)
    last: F32 = logits[:, -1]
    return last


def chunk_tokens(vocab_size: int, batch_size: int = 1) -> int:
    """Tokens per prefill step that keep float32 [B, chunk, V] within LOGITS_BYTES, at most MAX_CHUNK."""
    return max(1, min(MAX_CHUNK, LOGITS_BYTES // (4 * vocab_size * batch_size)))


def prefill(backend: Backend, state: Any, token_ids: I64, chunk: int | None = None) -> Iterator[tuple[int, F32]]:
    """Step through `token_ids` (int64 [B, T]) in chunks; yields (index of the chunk's first token, logits [B, t, V]).

    The logits are valid until the next item. `chunk` defaults to `chunk_tokens`.
    """
    B, T = token_ids.shape
    size = chunk or chunk_tokens(backend.facts.vocab_size, B)
    for start in range(0, T, size):
        yield start, backend.step(state, token_ids[:, start : start + size])
