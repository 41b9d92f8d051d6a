"""Decode states of onnxruntime graphs: what is bound by address, and what a step rewrites.

    GrowingState   `present` = `past` ++ new tokens: two cache buffers in turn, bound anew at every step
    SharedState    the fused attention writes into the one buffer it reads, which is bound once; rows count their own tokens,
                   so padding is never computed on, and a state can be rewound

A decode step of a shared state binds one thing: the attention mask, whose length grows.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgestill.runtime.backends import F32, I64, DecodeState
from edgestill.runtime.errors import BadInput
from edgestill.runtime.kv_cache import KVCache, aligned_zeros
from edgestill.runtime.manifest import ModelFacts, TensorSpec

ONNX_TYPES = {"float32": 1, "int32": 6, "int64": 7, "float16": 10}
"""numpy name -> TensorProto.DataType. Binding by this number is faster than by numpy type, and there are 4 per layer."""
KEEP = "logits_to_keep"
SHORT = 16
"""Tokens a row of a step that may come again: a token, or one and guesses."""


@dataclass(frozen=True)
class Wiring:
    """A session and the names and types of what goes in and out."""

    session: Any
    facts: ModelFacts
    inputs: dict[str, TensorSpec]
    past: list[str]
    present: list[str]
    cache_dtype: np.dtype[Any]
    logits_dtype: np.dtype[Any]

    @property
    def keeps_some(self) -> bool:
        """Whether the graph can leave out logits."""
        return KEEP in self.inputs


class Binding:
    """Io_bindings with their small buffers, for `rows` rows; what has not changed since the last step is not bound again.

    Short steps keep an io_binding for each of their shapes: one token and a few guesses take turns, and binding everything anew
    would cost a small model several percent of such a step.
    """

    def __init__(self, wiring: Wiring, rows: int, max_tokens: int) -> None:
        self._wiring, self._rows = wiring, rows
        self._binding: Any = None
        self._kept: dict[tuple[int, int], Any] = {}
        self._cache: tuple[list[int], tuple[int, ...], list[int], tuple[int, ...]] | None = None
        self.mask = self._ones("attention_mask", rows * max_tokens)
        """Flat ones, rewritten where rows differ; None when the graph takes no mask."""
        self.ids = np.empty(0, np.int64)
        self.positions: Any = None
        """Flat, of the last step's tokens; None when the graph takes none."""
        self._keep = np.zeros(1, np.int64)
        self._logits = np.empty(0, wiring.logits_dtype)
        self._logits32: F32 | None = None
        self._last = (0, 0)

    def shape_for(self, new: int, keep: int) -> None:
        """Make ready for steps of `new` tokens a row that give `keep` rows of logits each."""
        shape = (new, keep)
        if shape == self._last:
            return
        self._make_room(new, keep)
        self._keep[0] = keep
        self._binding = self._kept.get(shape)
        if self._binding is None:
            self._binding = self._bound(new, keep)
            if new <= SHORT:
                self._kept[shape] = self._binding
        self._last = shape

    def bind_cache(self, past: list[int], before: tuple[int, ...], present: list[int], after: tuple[int, ...]) -> None:
        """Read the cache tensors at addresses `past` in shape `before`, write them at `present` in shape `after`.

        Binds for steps of the present shape and shapes not met before: who changes the cache calls this behind `shape_for`.
        """
        self._cache = (past, before, present, after)
        if self._binding is not None:
            self._bind_cache(*self._cache)

    def run(self, length: int) -> F32:
        """Run with `length` tokens seen after the step; logits float32 [rows, keep, V], valid until the next run."""
        if self.mask is not None:  # by array: quicker than by address, and every token pays it
            self._binding.bind_cpu_input("attention_mask", self.mask[: self._rows * length].reshape(self._rows, length))
        self._wiring.session.run_with_iobinding(self._binding)
        keep, vocab = self._last[1], self._wiring.facts.vocab_size
        logits = self._logits[: self._rows * keep * vocab]
        if self._logits32 is not None:
            np.copyto(self._logits32[: logits.size], logits)
            logits = self._logits32[: logits.size]
        view: F32 = logits.reshape(self._rows, keep, vocab)
        return view

    def _make_room(self, new: int, keep: int) -> None:
        """Buffers that hold such a step, and any short one behind it; where they move, all is bound anew."""
        rows, wiring = self._rows, self._wiring
        tokens = rows * max(new, SHORT)
        logits = rows * (max(keep, SHORT) if keep > 1 else 1) * wiring.facts.vocab_size
        if tokens > self.ids.size:
            self.ids = np.empty(tokens, np.int64)
            self.positions = self._ones("position_ids", tokens)
            self._kept.clear()
        if logits > self._logits.size:
            self._logits = aligned_zeros(logits * wiring.logits_dtype.itemsize).view(wiring.logits_dtype)
            self._logits32 = None if wiring.logits_dtype == np.float32 else np.empty(logits, np.float32)
            self._kept.clear()

    def _bound(self, new: int, keep: int) -> Any:
        """A new io_binding for steps of this shape."""
        rows, wiring = self._rows, self._wiring
        self._binding = wiring.session.io_binding()
        self._input("input_ids", self.ids, (rows, new))
        if self.positions is not None:
            self._input("position_ids", self.positions, (rows, new))
        if wiring.keeps_some:
            self._input(KEEP, self._keep, (1,))
        element, shape = ONNX_TYPES[wiring.logits_dtype.name], (rows, keep, wiring.facts.vocab_size)
        self._binding.bind_output("logits", "cpu", 0, element, shape, self._logits.ctypes.data)
        if self._cache is not None:
            self._bind_cache(*self._cache)
        return self._binding

    def _bind_cache(self, past: list[int], before: tuple[int, ...], present: list[int], after: tuple[int, ...]) -> None:
        element = ONNX_TYPES[self._wiring.cache_dtype.name]
        for name, address in zip(self._wiring.past, past, strict=True):
            self._binding.bind_input(name, "cpu", 0, element, before, address)
        for name, address in zip(self._wiring.present, present, strict=True):
            self._binding.bind_output(name, "cpu", 0, element, after, address)

    def _ones(self, name: str, size: int) -> Any:
        """Ones of the graph's type for input `name`, or None where the graph has no such input."""
        return np.ones(size, self._wiring.inputs[name].dtype) if name in self._wiring.inputs else None

    def _input(self, name: str, buffer: Any, shape: tuple[int, ...]) -> None:
        element = ONNX_TYPES[self._wiring.inputs[name].dtype]
        self._binding.bind_input(name, "cpu", 0, element, shape, buffer.ctypes.data)


class OrtState(DecodeState):
    """A decode state with its cache and its binding."""

    cache: KVCache

    def __init__(self, wiring: Wiring, batch_size: int, max_tokens: int, left_padding: I64 | None) -> None:
        super().__init__(batch_size, max_tokens, left_padding)
        self._wiring = wiring
        self._binding = Binding(wiring, batch_size, max_tokens)
        if left_padding is not None and self._binding.mask is None:
            raise BadInput(
                f"left_padding {left_padding.tolist()}: this graph's attention can't mask padding; send rows of equal length"
            )
        heads, size = wiring.facts.n_kv_heads, wiring.facts.head_size
        self._shape = (batch_size, heads, max_tokens, size)

    def advance(self, token_ids: I64, keep: int) -> F32:
        """Append `token_ids` (int64 [B, n], checked) and return the logits of the last `keep` of them, float32 [B, keep, V]."""
        logits = self._advance(token_ids, keep)
        self.length += token_ids.shape[1]
        return logits[:, logits.shape[1] - keep :]

    @abstractmethod
    def _advance(self, token_ids: I64, keep: int) -> F32:
        """The same, `keep` rows of logits or all; `length` is counted by the caller."""

    def _rows_of_logits(self, new: int, keep: int) -> int:
        return keep if self._wiring.keeps_some else new


class GrowingState(OrtState):
    """Two buffers in turn. Memory: 2 x 2 x n_layers x B x Hkv x max_tokens x D values."""

    def __init__(self, wiring: Wiring, batch_size: int, max_tokens: int, left_padding: I64 | None) -> None:
        super().__init__(wiring, batch_size, max_tokens, left_padding)
        self.cache = KVCache(len(wiring.past), self._shape, wiring.cache_dtype, shared=False)

    def _advance(self, token_ids: I64, keep: int) -> F32:
        (rows, new), end = token_ids.shape, self.length + token_ids.shape[1]
        self._binding.shape_for(new, self._rows_of_logits(new, keep))
        self._binding.ids[: rows * new].reshape(rows, new)[:] = token_ids
        self._place(new, end)
        heads, size = self._shape[1], self._shape[3]
        before, after = (rows, heads, self.length, size), (rows, heads, end, size)
        self._binding.bind_cache(self.cache.past, before, self.cache.present, after)
        logits = self._binding.run(end)
        self.cache.swap()
        return logits

    def _place(self, new: int, end: int) -> None:
        """Mask and positions of the step's tokens."""
        rows, padding = self.batch_size, self.left_padding
        if padding is not None:
            mask = self._binding.mask[: rows * end].reshape(rows, end)
            mask[:] = np.arange(end) >= padding[:, None]
        if self._binding.positions is not None:
            positions = self._binding.positions[: rows * new].reshape(rows, new)
            positions[:] = np.arange(end - new, end)
            if padding is not None:
                positions -= padding[:, None]
                np.maximum(positions, 0, out=positions)


class SharedState(OrtState):
    """One buffer. Memory: 2 x n_layers x B x Hkv x max_tokens x D values.

    Rows are stored without their padding. The operator takes several tokens after a past for one row only, so such a step
    of several rows runs row by row.
    """

    def __init__(self, wiring: Wiring, batch_size: int, max_tokens: int, left_padding: I64 | None) -> None:
        super().__init__(wiring, batch_size, max_tokens, left_padding)
        self.cache = KVCache(len(wiring.past), self._shape, wiring.cache_dtype, shared=True)
        self._binding.bind_cache(self.cache.past, self._shape, self.cache.past, self._shape)
        self._single: Binding | None = None
        self._stored = np.zeros(batch_size, np.int64)
        """Tokens of each row in the cache."""

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens, padding included."""
        if not 0 <= length <= self.length:
            raise BadInput(f"a state of {self.length} tokens can't go back to {length}")
        self.length = length
        self._stored = np.maximum(length - self._padding(), 0)

    def _padding(self) -> I64:
        return np.zeros(self.batch_size, np.int64) if self.left_padding is None else self.left_padding

    def _advance(self, token_ids: I64, keep: int) -> F32:
        new = token_ids.shape[1]
        if self.left_padding is None:
            if self.batch_size == 1 or new == 1 or self.length == 0:
                logits = self._level(token_ids, keep)
            else:
                logits = self._row_by_row(token_ids, np.zeros(self.batch_size, np.int64), keep)
            self._stored += new
            return logits
        padding = np.clip(self.left_padding - self.length, 0, new)
        if new == 1:  # a row still in its padding writes where its first token will be
            logits = self._together(token_ids, np.maximum(self._stored + 1 - padding, 1), keep)
        elif self.length == 0:
            logits = self._first(token_ids, padding)
        else:
            logits = self._row_by_row(token_ids, padding, keep)
        self._stored += new - padding
        return logits

    def _level(self, token_ids: I64, keep: int) -> F32:
        """One run of rows of equal length: what most tokens take, so little else is done."""
        (rows, new), binding = token_ids.shape, self._binding
        binding.shape_for(new, self._rows_of_logits(new, keep))
        binding.ids[: rows * new] = token_ids.ravel()
        end = self.length + new
        if binding.positions is not None:
            binding.positions[: rows * new].reshape(rows, new)[:] = np.arange(self.length, end)
        return binding.run(end)

    def _first(self, token_ids: I64, padding: I64) -> F32:
        """The first step of rows of different lengths: padding goes behind the tokens, and the logits come back before it."""
        new = token_ids.shape[1]
        shifted = np.zeros_like(token_ids)
        for row, skipped in enumerate(padding.tolist()):
            shifted[row, : new - skipped] = token_ids[row, skipped:]
        logits = self._together(shifted, np.maximum(new - padding, 1), new)
        for row, skipped in enumerate(padding.tolist()):
            if skipped:
                logits[row, skipped:] = logits[row, : new - skipped].copy()
        return logits

    def _together(self, token_ids: I64, lengths: I64, keep: int) -> F32:
        """One run of all rows, some of them padded; row b has lengths[b] tokens afterwards."""
        (rows, new), binding = token_ids.shape, self._binding
        binding.shape_for(new, self._rows_of_logits(new, keep))
        binding.ids[: rows * new].reshape(rows, new)[:] = token_ids
        end = int(lengths.max())
        if binding.mask is not None:
            binding.mask[: rows * end].reshape(rows, end)[:] = np.arange(end) < lengths[:, None]
        if binding.positions is not None:
            first = np.zeros_like(lengths) if self.length == 0 else lengths - new
            binding.positions[: rows * new].reshape(rows, new)[:] = first[:, None] + np.arange(new)
        return binding.run(end)

    def _row_by_row(self, token_ids: I64, padding: I64, keep: int) -> F32:
        """Several tokens after a past, one row after the other."""
        new, vocab = token_ids.shape[1], self._wiring.facts.vocab_size
        logits = np.zeros((self.batch_size, keep, vocab), np.float32)
        shape = (1, *self._shape[1:])
        row_bytes = int(np.prod(shape)) * self._wiring.cache_dtype.itemsize
        single = self._single = self._single or Binding(self._wiring, 1, self.max_tokens)
        for row, skipped in enumerate(padding.tolist()):
            taken = new - skipped
            if taken == 0:
                continue
            addresses = [address + row * row_bytes for address in self.cache.past]
            kept = min(keep, taken)
            single.shape_for(taken, self._rows_of_logits(taken, kept))
            single.bind_cache(addresses, shape, addresses, shape)
            single.ids[:taken] = token_ids[row, skipped:]
            stored = int(self._stored[row])
            if single.positions is not None:
                single.positions[:taken] = np.arange(stored, stored + taken)
            logits[row, keep - kept :] = single.run(stored + taken)[0, -kept:]
        return logits
