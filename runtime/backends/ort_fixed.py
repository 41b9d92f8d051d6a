"""A graph with a cache of fixed length in onnxruntime: the yardstick of an engine, on a machine that has no GPU."""

from __future__ import annotations

import numpy as np

from edgestill.runtime.backends import F32, I64
from edgestill.runtime.backends.fixed_cache import STEP_INPUTS, FixedState, capacity_of
from edgestill.runtime.backends.ort_states import ONNX_TYPES, Wiring
from edgestill.runtime.errors import PromptTooLong
from edgestill.runtime.kv_cache import KVCache
from edgestill.runtime.manifest import Graph


class OrtFixedState(FixedState):
    """One buffer that the graph writes in place. Memory: 2 x n_layers x B x Hkv x capacity x D values, on `device`."""

    def __init__(
        self,
        wiring: Wiring,
        graph: Graph,
        batch_size: int,
        max_tokens: int,
        left_padding: I64 | None,
        device: str = "cpu",
    ) -> None:
        capacity = capacity_of(graph)
        if max_tokens > capacity:
            raise PromptTooLong(f"{max_tokens} tokens exceed the {capacity} of this engine's cache; send fewer tokens")
        super().__init__(batch_size, max_tokens, left_padding, capacity)
        self._wiring = wiring
        self._binding = wiring.session.io_binding()
        shape = (batch_size, wiring.facts.n_kv_heads, capacity, wiring.facts.head_size)
        if device == "cuda":
            self._on_device(shape)
            return
        self._cache = KVCache(len(wiring.past), shape, wiring.cache_dtype, shared=True)
        element = ONNX_TYPES[wiring.cache_dtype.name]
        for before, after, address in zip(wiring.past, wiring.present, self._cache.past, strict=True):
            self._binding.bind_input(before, "cpu", 0, element, shape, address)
            self._binding.bind_output(after, "cpu", 0, element, shape, address)

    def _on_device(self, shape: tuple[int, ...]) -> None:
        """The cache in the memory of the GPU, for onnxruntime's CUDA provider."""
        import onnxruntime

        zeros = np.zeros(shape, self._wiring.cache_dtype)
        for before, after in zip(self._wiring.past, self._wiring.present, strict=True):
            tensor = onnxruntime.OrtValue.ortvalue_from_numpy(zeros, "cuda", 0)  # the binding keeps it
            self._binding.bind_ortvalue_input(before, tensor)
            self._binding.bind_ortvalue_output(after, tensor)

    def advance(self, token_ids: I64, keep: int) -> F32:
        """Append `token_ids` (int64 [B, n], checked); logits of the last `keep` of them, float32 [B, keep, V]."""
        step = self.place(token_ids, keep)
        given = {name: getattr(step, name) for name in STEP_INPUTS} | {"key_positions": np.arange(step.attended)}
        for name, array in given.items():
            if name in self._wiring.inputs:
                self._binding.bind_cpu_input(name, array)
        logits = np.empty((self.batch_size, keep, self._wiring.facts.vocab_size), self._wiring.logits_dtype)
        element = ONNX_TYPES[self._wiring.logits_dtype.name]
        self._binding.bind_output("logits", "cpu", 0, element, logits.shape, logits.ctypes.data)
        self._wiring.session.run_with_iobinding(self._binding)
        self.commit(token_ids.shape[1])
        found: F32 = logits.astype(np.float32, copy=False)
        return found
