"""onnxruntime on the CPU: every input and output bound by address, nothing allocated in proportion to the cache.

Names follow Optimum's graphs: `input_ids`, `attention_mask`, `position_ids`, `past_key_values.{i}.key` / `.value` in;
`logits`, `present.{i}.key` / `.value` out; `logits_to_keep` where the graph can leave logits out. Only the inputs that the
graph has are bound.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgestill.runtime.backends import F32, I64, PREFILL_CHUNK, new_state_limits
from edgestill.runtime.backends.fixed_cache import STEP_INPUTS, FixedState
from edgestill.runtime.backends.ort_fixed import OrtFixedState
from edgestill.runtime.backends.ort_states import KEEP, GrowingState, OrtState, SharedState, Wiring
from edgestill.runtime.backends.pages import release_after_opening
from edgestill.runtime.errors import BadInput, BundleError, MissingPart
from edgestill.runtime.manifest import Graph, ModelFacts, TensorSpec

ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
}
AnyState = OrtState | OrtFixedState
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
EXACT_DEQUANTIZED = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Products of dequantized weights in float32: onnxruntime would fuse them and round activations to int8, as no engine does."""


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
        prefill_chunk: int = PREFILL_CHUNK,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        """Open `graph_path` on `device` with `threads` intra-op threads (None: every processor of this process).

        `session_options`: onnxruntime's session config entries, such as `session.intra_op.allow_spinning`.
        `device` "cuda": the CUDA provider, for graphs with a cache of fixed length, which stays in the GPU's memory.

        Raises:
            MissingPart: this onnxruntime has no CUDA provider.
            BundleError: onnxruntime can't open the graph, or its inputs and outputs are not those of `graph`.
        """
        self.facts = facts
        self.graph = graph
        self.prefill_chunk = prefill_chunk
        threads = threads or available_cpus()
        self.session = {"threads": threads, "prefill_chunk": prefill_chunk, **(session_options or {})}
        exact = EXACT_DEQUANTIZED if graph.cache == "fixed" else {}
        self._device = device
        session = _open_session(graph_path, threads, exact | dict(session_options or {}), PROVIDERS[device])
        optional = session.get_overridable_initializers()  # inputs that have a default
        inputs = _checked_specs(graph_path, "input", [*session.get_inputs(), *optional], graph.inputs)
        outputs = _checked_specs(graph_path, "output", session.get_outputs(), graph.outputs)
        sides = [f"{i}.{side}" for i in range(facts.n_layers) for side in ("key", "value")]
        past, present = [f"past_key_values.{side}" for side in sides], [f"present.{side}" for side in sides]
        beside = {"attention_mask", "position_ids", KEEP} if graph.cache != "fixed" else {*STEP_INPUTS, "key_positions"}
        _check_names(graph_path, "input", inputs, {"input_ids", *past}, beside)
        _check_names(graph_path, "output", outputs, {"logits", *present}, set())
        cache_dtype = _one_dtype(graph_path, [inputs[n] for n in past] + [outputs[n] for n in present])
        logits_dtype = _one_dtype(graph_path, [outputs["logits"]])
        release_after_opening(graph_path.with_name(f"{graph_path.name}.data"))
        self._wiring = Wiring(session, facts, inputs, past, present, cache_dtype, logits_dtype)

    def new_state(self, batch_size: int, max_tokens: int, left_padding: Sequence[int] | None = None) -> AnyState:
        """See `Backend.new_state`. Memory: 2 x n_layers x B x Hkv x max_tokens x D values, twice where the cache grows."""
        padding = new_state_limits(self.facts, batch_size, max_tokens, left_padding)
        if self.graph.cache == "fixed":
            return OrtFixedState(self._wiring, self.graph, batch_size, max_tokens, padding, self._device)
        kind = SharedState if self.graph.cache == "shared" else GrowingState
        return kind(self._wiring, batch_size, max_tokens, padding)

    def step(self, state: AnyState, token_ids: I64, keep: int | None = None) -> F32:
        """See `Backend.step`."""
        return state.advance(token_ids, state.check_step(token_ids, keep))

    def rewind(self, state: AnyState, length: int) -> None:
        """See `Backend.rewind`."""
        if not isinstance(state, SharedState | FixedState):
            raise BadInput("a cache that grows can't be rewound; build the bundle with fused attention")
        state.rewind(length)

    @property
    def rewinds(self) -> bool:
        """See `Backend.rewinds`."""
        return self.graph.cache != "growing"


def available_cpus() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _open_session(graph_path: Path, threads: int, entries: Mapping[str, str], provider: str) -> Any:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if provider not in onnxruntime.get_available_providers():
        raise MissingPart(
            f"this onnxruntime has no {provider}",
            "pip uninstall onnxruntime, then pip install 'edgestill[cuda]', on a machine with an NVIDIA driver",
        )
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
        return onnxruntime.InferenceSession(str(graph_path), options, providers=[provider])
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
