"""A graph with a cache of fixed length in onnxruntime: the yardstick of an engine on a CPU, or the CUDA provider on a GPU.

`Buffers` are what one batch of rows needs on the device: the cache, the inputs and logits of a decode step, a binding for each
number of attended slots. A decode step finds all of it at the same addresses, so that onnxruntime can record it as a CUDA graph
(`gpu_graph_id`, one for each buffers and attended slots) and replay it. Buffers are kept and used again: a text after the first
uploads no zeros. Any other step brings inputs of its own and is never recorded.

On both devices the same bindings are made; only the provider differs.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np

from edgestill.runtime.backends import F32, I64
from edgestill.runtime.backends.fixed_cache import STEP_INPUTS, FixedState, StepInputs, capacity_of
from edgestill.runtime.backends.ort_session import refusals
from edgestill.runtime.backends.ort_states import Wiring
from edgestill.runtime.errors import PromptTooLong
from edgestill.runtime.manifest import Graph

GRAPH_ID = "gpu_graph_id"
NEVER = -1
"""The id of a run that is not to be recorded."""


class Pool:
    """The buffers of one session, in `memory` ("cpu" or "cuda")."""

    def __init__(self, wiring: Wiring, graph: Graph, memory: str, captures: bool) -> None:
        self.wiring, self.memory, self.capacity = wiring, memory, capacity_of(graph)
        self.ids = itertools.count(1)
        self._free: dict[int, deque[Buffers]] = {}
        # onnxruntime wants one thread at a time in a session that records
        self._turn: Any = threading.Lock() if captures else contextlib.nullcontext()
        self._unrecorded = run_options(NEVER)

    def take(self, rows: int) -> Buffers:
        """Buffers for `rows` rows; what they held before stays behind what a new text attends to."""
        try:
            return self._free[rows].pop()
        except (KeyError, IndexError):
            return Buffers(self, rows)

    def give_back(self, buffers: Buffers) -> None:
        """Keep for the next text; takes no lock, for the garbage collector calls it."""
        self._free.setdefault(buffers.rows, deque()).append(buffers)

    def run(self, binding: Any, options: Any = None) -> None:
        """One run of the session, not recorded unless `options` name a graph."""
        with self._turn:
            self.wiring.session.run_with_iobinding(binding, options or self._unrecorded)

    def value(self, array: np.ndarray[Any, Any]) -> Any:
        """`array` in the device's memory."""
        made = self.empty(array.shape, array.dtype)
        made.update_inplace(np.ascontiguousarray(array))
        return made

    def empty(self, shape: tuple[int, ...], kind: Any) -> Any:
        """Room in the device's memory."""
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(kind), self.memory, 0)

    def why_no_capture(self) -> str:
        """Record one decode step and replay it; what onnxruntime says where it can't, else nothing."""
        buffers = self.take(1)
        zeros = np.zeros((1, 1), np.int64)
        try:
            for _ in range(2):
                buffers.run(self, StepInputs(zeros, zeros, zeros[0], zeros, 1))
        except refusals() as refusal:
            return f"refused by onnxruntime: {' '.join(str(refusal).split())[:160]}"
        self.give_back(buffers)
        return ""


class Buffers:
    """Cache, inputs and logits of `rows` rows. Memory: 2 x n_layers x rows x Hkv x capacity x D values.

    They know no pool: it holds them, and a ring of the two would keep the session until the garbage collector comes by.
    """

    def __init__(self, pool: Pool, rows: int) -> None:
        self.rows = rows
        self._wiring = pool.wiring
        facts = self._wiring.facts
        zeros = np.zeros((rows, facts.n_kv_heads, pool.capacity, facts.head_size), self._wiring.cache_dtype)
        self._caches = [pool.value(zeros) for _ in self._wiring.past]
        one = np.zeros((rows, 1), np.int64)
        self._inputs = {
            name: pool.value(one[:, 0] if name == "write_indices" else one)
            for name in STEP_INPUTS
            if name in self._wiring.inputs
        }
        self._logits = pool.empty((rows, 1, facts.vocab_size), self._wiring.logits_dtype)
        self._decode: dict[int, tuple[Any, Any]] = {}
        """Attended slots -> (binding, run options that name its graph)."""

    def run(self, pool: Pool, step: StepInputs) -> F32:
        """Logits of one step in the session of `pool`, float32 [rows, kept, V]."""
        rows, keep = step.logit_positions.shape
        if step.input_ids.shape[1] == keep == 1:
            for name, value in self._inputs.items():
                value.update_inplace(getattr(step, name))
            if step.attended not in self._decode:
                binding = self._bound(pool, self._inputs, step.attended, self._logits)
                self._decode[step.attended] = binding, run_options(next(pool.ids))
            pool.run(*self._decode[step.attended])
            return self._logits.numpy().astype(np.float32)  # type: ignore[no-any-return]
        inputs = {name: pool.value(getattr(step, name)) for name in self._inputs}
        logits = pool.empty((rows, keep, self._wiring.facts.vocab_size), self._wiring.logits_dtype)
        pool.run(self._bound(pool, inputs, step.attended, logits))
        return logits.numpy().astype(np.float32)  # type: ignore[no-any-return]

    def _bound(self, pool: Pool, inputs: dict[str, Any], attended: int, logits: Any) -> Any:
        """A binding of the cache, which is read and written in one place, and of these values."""
        binding = self._wiring.session.io_binding()
        for before, after, value in zip(self._wiring.past, self._wiring.present, self._caches, strict=True):
            binding.bind_ortvalue_input(before, value)
            binding.bind_ortvalue_output(after, value)
        if "key_positions" in self._wiring.inputs:
            inputs = {**inputs, "key_positions": pool.value(np.arange(attended))}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("logits", logits)
        return binding


class OrtFixedState(FixedState):
    """A batch of sequences in buffers of its own."""

    def __init__(self, pool: Pool, batch_size: int, max_tokens: int, left_padding: I64 | None) -> None:
        if max_tokens > pool.capacity:
            raise PromptTooLong(
                f"{max_tokens} tokens exceed the {pool.capacity} of this engine's cache; send fewer tokens"
            )
        super().__init__(batch_size, max_tokens, left_padding, pool.capacity)
        self._pool, self._buffers = pool, pool.take(batch_size)
        weakref.finalize(self, pool.give_back, self._buffers)

    def advance(self, token_ids: I64, keep: int) -> F32:
        """Append `token_ids` (int64 [B, n], checked); logits of the last `keep` of them, float32 [B, keep, V]."""
        logits = self._buffers.run(self._pool, self.place(token_ids, keep))
        self.commit(token_ids.shape[1])
        return logits


def run_options(graph_id: int) -> Any:
    """Run options that name the CUDA graph of a run."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(graph_id))
    return options
