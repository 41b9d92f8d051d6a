"""Where the tokens of a step go in a cache of fixed length: what graphs for engines ask for as inputs.

    position_ids     int64 [B, n]   of each token in its row, padding not counted
    write_indices    int64 [B]      the slot of the row's first new token
    logit_positions  int64 [B, k]   which of the n tokens give logits
    attended         slots that attention looks at: a multiple of ATTENDED_STEP, so that few shapes occur

Rows are stored without padding. Padding of a step goes behind the row's tokens: it is written into slots that the next tokens
overwrite before anything may attend to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgestill.runtime.backends import I64, DecodeState
from edgestill.runtime.errors import BadInput
from edgestill.runtime.manifest import Graph

STEP_INPUTS = ("input_ids", "position_ids", "write_indices", "logit_positions")
"""What differs from step to step; `key_positions` is always 0, 1, ..."""
ATTENDED_STEP = 128
"""A CUDA graph of the decode step is captured when the number of attended slots changes."""


@dataclass(frozen=True)
class StepInputs:
    """One step of B rows; see the module."""

    input_ids: I64
    position_ids: I64
    write_indices: I64
    logit_positions: I64
    attended: int

    def rows(self, chosen: slice) -> StepInputs:
        """The same step for some of the rows."""
        return StepInputs(
            self.input_ids[chosen],
            self.position_ids[chosen],
            self.write_indices[chosen],
            self.logit_positions[chosen],
            self.attended,
        )


class FixedState(DecodeState):
    """A decode state whose rows count their own tokens."""

    def __init__(self, batch_size: int, max_tokens: int, left_padding: I64 | None, capacity: int) -> None:
        super().__init__(batch_size, max_tokens, left_padding)
        self.capacity = capacity
        self.stored = np.zeros(batch_size, np.int64)
        """Tokens of each row in the cache."""

    def place(self, token_ids: I64, keep: int) -> StepInputs:
        """The inputs of a step of `token_ids` (int64 [B, n], checked) that gives logits of the last `keep`."""
        new = token_ids.shape[1]
        padding = self._padding_of(new)
        ids = token_ids
        if padding.any():
            ids = np.zeros_like(token_ids)
            for row, skipped in enumerate(padding.tolist()):
                ids[row, : new - skipped] = token_ids[row, skipped:]
        chosen = np.arange(new - keep, new)[None, :] - padding[:, None]
        end = int(self.stored.max()) + new
        attended = min(self.capacity, -(-end // ATTENDED_STEP) * ATTENDED_STEP)
        return StepInputs(
            np.ascontiguousarray(ids, np.int64),
            self.stored[:, None] + np.arange(new),
            self.stored.copy(),
            np.maximum(chosen, 0),
            attended,
        )

    def commit(self, new: int) -> None:
        """A step of `new` tokens a row is done."""
        self.stored += new - self._padding_of(new)
        self.length += new

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens, padding included."""
        if not 0 <= length <= self.length:
            raise BadInput(f"a state of {self.length} tokens can't go back to {length}")
        self.length = length
        padding = np.zeros_like(self.stored) if self.left_padding is None else self.left_padding
        self.stored = np.maximum(length - padding, 0)

    def _padding_of(self, new: int) -> I64:
        """How many of the next `new` tokens of each row are padding."""
        if self.left_padding is None:
            return np.zeros(self.batch_size, np.int64)
        padding: I64 = np.clip(self.left_padding - self.length, 0, new)
        return padding


def capacity_of(graph: Graph) -> int:
    """Slots of the cache that a graph of fixed length was made for."""
    shapes: list[tuple[Any, ...]] = [spec.shape for spec in graph.inputs if spec.name.startswith("past_key_values.")]
    sizes = {shape[2] for shape in shapes}
    if len(sizes) != 1 or not isinstance(size := sizes.pop(), int):
        raise BadInput(f"{graph.file}: its caches have no one fixed length; build the bundle again")
    return size
