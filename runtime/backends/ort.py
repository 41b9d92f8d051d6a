"""onnxruntime on the CPU: every input and output bound by address, nothing allocated in proportion to the cache.

Names follow Optimum's graphs: `input_ids`, `attention_mask`, `position_ids`, `past_key_values.{i}.key` / `.value` in;
`logits`, `present.{i}.key` / `.value` out. Only the inputs that the graph has are bound.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.backends import F32, I64, DecodeState, new_state_limits
from edgestill.runtime.errors import BadInput, BundleError
from edgestill.runtime.kv_cache import KVCache, aligned_zeros
from edgestill.runtime.manifest import Graph, ModelFacts, TensorSpec

ONNX_TYPES = {"float32": 1, "int32": 6, "int64": 7, "float16": 10}
"""numpy name -> TensorProto.DataType. Binding by this number is faster than by numpy type, and there are 4 per layer."""
ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
}


@dataclass
class OrtState(DecodeState):
    """A decode state with its cache, its binding and its small input buffers."""

    cache: KVCache = field(kw_only=True)
    binding: Any = field(kw_only=True)
    mask: Any = field(kw_only=True)
    """[B * max_tokens] ones, rewritten per step only where rows are padded; None when the graph takes no mask."""
    ids: I64 = field(kw_only=True)
    positions: Any = field(kw_only=True)
    logits: Any = field(kw_only=True)
    """Flat, in the graph's type; grows to the largest step seen."""
    logits32: F32 | None = None
    """Flat copy in float32 when the graph's logits are float16."""


class OrtBackend:
    """One ONNX graph in one InferenceSession. Safe to step from several threads, each with its own state."""

    def __init__(
        self,
        graph_path: Path,
        facts: ModelFacts,
        graph: Graph,
        *,
        threads: int | None = None,
        session_options: Mapping[str, str] | None = None,
    ) -> None:
        """Open `graph_path` with `threads` intra-op threads (None: every processor of this process).

        `session_options`: onnxruntime's session config entries, such as `session.intra_op.allow_spinning`.

        Raises:
            BundleError: onnxruntime can't open the graph, or its inputs and outputs are not those of `graph`.
        """
        self.facts = facts
        self.graph = graph
        self._session = _open_session(graph_path, threads or available_cpus(), session_options or {})
        self._inputs = _checked_specs(graph_path, "input", self._session.get_inputs(), graph.inputs)
        outputs = _checked_specs(graph_path, "output", self._session.get_outputs(), graph.outputs)
        sides = [f"{i}.{side}" for i in range(facts.n_layers) for side in ("key", "value")]
        self._past = [f"past_key_values.{side}" for side in sides]
        self._present = [f"present.{side}" for side in sides]
        _check_names(graph_path, "input", self._inputs, {"input_ids", *self._past}, {"attention_mask", "position_ids"})
        _check_names(graph_path, "output", outputs, {"logits", *self._present}, set())
        self._cache_dtype = _one_dtype(
            graph_path, [self._inputs[n] for n in self._past] + [outputs[n] for n in self._present]
        )
        self._logits_dtype = _one_dtype(graph_path, [outputs["logits"]])

    def new_state(self, batch_size: int, max_tokens: int, left_padding: Sequence[int] | None = None) -> OrtState:
        """See `Backend.new_state`. Memory: 2 x n_layers x B x Hkv x max_tokens x D values, twice unless shared."""
        padding = new_state_limits(self.facts, batch_size, max_tokens, left_padding)
        shared = self.graph.cache == "shared"
        if padding is not None and (shared or "attention_mask" not in self._inputs):
            raise BadInput(
                f"left_padding {padding.tolist()}: this graph's attention can't mask padding; send rows of equal length"
            )
        shape = (batch_size, self.facts.n_kv_heads, max_tokens, self.facts.head_size)
        cache = KVCache(len(self._past), shape, self._cache_dtype, shared=shared)
        state = OrtState(
            batch_size,
            max_tokens,
            padding,
            cache=cache,
            binding=self._session.io_binding(),
            mask=self._buffer("attention_mask", batch_size * max_tokens),
            ids=np.empty(0, np.int64),
            positions=None,
            logits=np.empty(0, self._logits_dtype),
        )
        if shared:
            self._bind_cache(state, shape, shape)
        return state

    def step(self, state: OrtState, token_ids: I64) -> F32:
        """See `Backend.step`."""
        state.check_step(token_ids)
        B, n = token_ids.shape
        if state.cache.shared and B > 1 and n > 1 and state.length > 0:
            return self._step_one_by_one(state, token_ids)
        if B * n * self.facts.vocab_size > state.logits.size:
            self._grow(state, n)
        self._bind_tokens(state, token_ids)
        if not state.cache.shared:
            H, D = self.facts.n_kv_heads, self.facts.head_size
            self._bind_cache(state, (B, H, state.length, D), (B, H, state.length + n, D))
        self._session.run_with_iobinding(state.binding)
        state.cache.swap()
        state.length += n
        logits = state.logits[: B * n * self.facts.vocab_size]
        if state.logits32 is not None:
            np.copyto(state.logits32[: logits.size], logits)
            logits = state.logits32[: logits.size]
        view: F32 = logits.reshape(B, n, self.facts.vocab_size)
        return view

    def _step_one_by_one(self, state: OrtState, token_ids: I64) -> F32:
        """The fused operator's CPU kernel takes several tokens after a past only for a batch of one."""
        logits = np.empty((*token_ids.shape, self.facts.vocab_size), np.float32)
        for t in range(token_ids.shape[1]):
            logits[:, t] = self.step(state, token_ids[:, t : t + 1])[:, 0]
        return logits

    def _buffer(self, name: str, size: int) -> Any:
        """Ones of the graph's type for input `name`, or None where the graph has no such input."""
        return np.ones(size, self._inputs[name].dtype) if name in self._inputs else None

    def _grow(self, state: OrtState, n: int) -> None:
        """Make the per-step buffers large enough for n tokens a row, and bind nothing to the old ones any more."""
        B, V = state.batch_size, self.facts.vocab_size
        state.ids = np.empty(B * n, np.int64)
        state.positions = self._buffer("position_ids", B * n)
        state.logits = aligned_zeros(B * n * V * self._logits_dtype.itemsize).view(self._logits_dtype)
        if self._logits_dtype != np.float32:
            state.logits32 = np.empty(B * n * V, np.float32)

    def _bind_tokens(self, state: OrtState, token_ids: I64) -> None:
        B, n = token_ids.shape
        end = state.length + n
        state.ids[: B * n].reshape(B, n)[:] = token_ids
        self._bind_input(state, "input_ids", state.ids, (B, n))
        if state.mask is not None:
            if state.left_padding is not None:
                mask = state.mask[: B * end].reshape(B, end)
                mask[:] = 1
                for row, padding in enumerate(state.left_padding.tolist()):
                    mask[row, :padding] = 0
            self._bind_input(state, "attention_mask", state.mask, (B, end))
        if state.positions is not None:
            positions = state.positions[: B * n].reshape(B, n)
            positions[:] = np.arange(state.length, end)
            if state.left_padding is not None:
                positions -= state.left_padding[:, None]
                np.maximum(positions, 0, out=positions)
            self._bind_input(state, "position_ids", state.positions, (B, n))
        element = ONNX_TYPES[self._logits_dtype.name]
        shape = (B, n, self.facts.vocab_size)
        state.binding.bind_output("logits", "cpu", 0, element, shape, state.logits.ctypes.data)

    def _bind_input(self, state: OrtState, name: str, buffer: Any, shape: tuple[int, ...]) -> None:
        state.binding.bind_input(name, "cpu", 0, ONNX_TYPES[self._inputs[name].dtype], shape, buffer.ctypes.data)

    def _bind_cache(self, state: OrtState, past: tuple[int, ...], present: tuple[int, ...]) -> None:
        element = ONNX_TYPES[self._cache_dtype.name]
        bind_input, bind_output = state.binding.bind_input, state.binding.bind_output
        for name, address in zip(self._past, state.cache.past, strict=True):
            bind_input(name, "cpu", 0, element, past, address)
        for name, address in zip(self._present, state.cache.present, strict=True):
            bind_output(name, "cpu", 0, element, present, address)


def available_cpus() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _open_session(graph_path: Path, threads: int, entries: Mapping[str, str]) -> Any:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = (
        False  # it keeps a plan per input shape, and every step of a growing cache is a new shape
    )
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    refusals = (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NoSuchFile,
        state.NotImplemented,
        state.RuntimeException,
    )
    try:
        return onnxruntime.InferenceSession(str(graph_path), options, providers=["CPUExecutionProvider"])
    except refusals as refusal:
        why = " ".join(str(refusal).split())
        raise BundleError(
            f"{graph_path}: onnxruntime {onnxruntime.__version__} can't open it ({why}); "
            "upgrade onnxruntime or build the bundle again"
        ) from refusal


def _checked_specs(graph_path: Path, kind: str, found: Any, declared: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    """The declared specs by name, after comparing names and types with what onnxruntime reports."""
    specs = {spec.name: spec for spec in declared}
    types = {value.name: ORT_TYPES.get(value.type, value.type) for value in found}
    for name in sorted(specs.keys() | types.keys()):
        ours, theirs = specs[name].dtype if name in specs else "absent", types.get(name, "absent")
        if ours != theirs:
            raise BundleError(
                f"{graph_path}: {kind} {name} is {theirs} in the graph and {ours} in the manifest; build the bundle again"
            )
    return specs


def _check_names(graph_path: Path, kind: str, specs: Mapping[str, Any], needed: set[str], optional: set[str]) -> None:
    missing, unknown = sorted(needed - specs.keys()), sorted(specs.keys() - needed - optional)
    if missing or unknown:
        what = [f"has no {kind} {name}" for name in missing] + [f"has an unknown {kind} {name}" for name in unknown]
        raise BundleError(f"{graph_path}: the graph {', '.join(what)}; export it with task text-generation-with-past")


def _one_dtype(graph_path: Path, specs: Sequence[TensorSpec]) -> np.dtype[Any]:
    dtypes = {spec.dtype for spec in specs}
    if len(dtypes) != 1 or not dtypes <= {"float32", "float16"}:
        raise BundleError(
            f"{graph_path}: {specs[0].name} and its like are {', '.join(sorted(dtypes))}; all must be float32 or all float16"
        )
    return np.dtype(dtypes.pop())
