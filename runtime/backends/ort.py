"""onnxruntime: every input and output bound by address, nothing allocated in proportion to the cache.

Names follow Optimum's graphs: `input_ids`, `attention_mask`, `position_ids`, `past_key_values.{i}.key` / `.value` in;
`logits`, `present.{i}.key` / `.value` out; `logits_to_keep` where the graph can leave logits out. Only the inputs that the
graph has are bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.backends import F32, I64, PREFILL_CHUNK, new_state_limits
from edgestill.runtime.backends.fixed_cache import STEP_INPUTS, FixedState
from edgestill.runtime.backends.ort_fixed import OrtFixedState, Pool
from edgestill.runtime.backends.ort_session import Place, open_session
from edgestill.runtime.backends.ort_states import KEEP, GrowingState, OrtState, SharedState, Wiring
from edgestill.runtime.backends.pages import MappedWeights, trim_heap
from edgestill.runtime.errors import BadInput, BundleError
from edgestill.runtime.manifest import Graph, ModelFacts, TensorSpec
from edgestill.runtime.processor import allowed_cpus

ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
}
AnyState = OrtState | OrtFixedState
MEMORY = {"cpu": "cpu", "cuda": "cuda"}
"""Place of the session -> where what it reads and writes lies."""
PROMPT_TOKENS = 32
"""Tokens of a step from which it is taken for a prompt's, which looks up rows all over the embedding; guesses are fewer."""
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
        device: Place = "cpu",
    ) -> None:
        """Open `graph_path` on `device` with `threads` intra-op threads (None: every processor of this process).

        `session_options`: onnxruntime's session config entries, such as `session.intra_op.allow_spinning`.
        `device` "cuda": the CUDA provider, for graphs with a cache of fixed length, which stays in the GPU's memory.

        Raises:
            MissingPart: this onnxruntime has no CUDA provider, or it does not start.
            BundleError: onnxruntime can't open the graph, or not all of it on the GPU, or its inputs and outputs are not those
                of `graph`.
        """
        self.facts = facts
        self.graph = graph
        self.prefill_chunk = prefill_chunk
        threads = threads or len(allowed_cpus())
        self.session: dict[str, Any] = {"threads": threads, "prefill_chunk": prefill_chunk, **(session_options or {})}
        exact = EXACT_DEQUANTIZED if graph.cache == "fixed" else {}
        entries = exact | dict(session_options or {})
        opened = open_session(graph_path, threads, entries, device)
        self._wiring = _wiring(graph_path, opened.session, facts, graph)
        self._weights = MappedWeights(graph_path.with_name(f"{graph_path.name}.data"))
        self._weights.release()
        trim_heap()
        if graph.cache != "fixed":
            return
        self._pool = Pool(self._wiring, graph, MEMORY[device], opened.captures)
        why_not = opened.why_not
        if opened.captures and (why_not := self._pool.why_no_capture()):
            # a session that failed to record is of no use any more
            opened = open_session(graph_path, threads, entries, device, capture=False)
            self._wiring = _wiring(graph_path, opened.session, facts, graph)
            self._pool = Pool(self._wiring, graph, MEMORY[device], captures=False)
        if device == "cuda":
            self.session["cuda_graph"] = why_not or "decode step captured by onnxruntime"

    def new_state(self, batch_size: int, max_tokens: int, left_padding: Sequence[int] | None = None) -> AnyState:
        """See `Backend.new_state`. Memory: 2 x n_layers x B x Hkv x max_tokens x D values, twice where the cache grows."""
        padding = new_state_limits(self.facts, batch_size, max_tokens, left_padding)
        if self.graph.cache == "fixed":
            return OrtFixedState(self._pool, batch_size, max_tokens, padding)
        kind = SharedState if self.graph.cache == "shared" else GrowingState
        return kind(self._wiring, batch_size, max_tokens, padding)

    def step(self, state: AnyState, token_ids: I64, keep: int | None = None) -> F32:
        """See `Backend.step`."""
        logits = state.advance(token_ids, state.check_step(token_ids, keep))
        if token_ids.shape[1] >= PROMPT_TOKENS and self._weights.worth_it:
            self._weights.release()
        return logits

    def rewind(self, state: AnyState, length: int) -> None:
        """See `Backend.rewind`."""
        if not isinstance(state, SharedState | FixedState):
            raise BadInput("a cache that grows can't be rewound; build the bundle with fused attention")
        state.rewind(length)

    @property
    def rewinds(self) -> bool:
        """See `Backend.rewinds`."""
        return self.graph.cache != "growing"


def _wiring(graph_path: Path, session: Any, facts: ModelFacts, graph: Graph) -> Wiring:
    """The session's inputs and outputs, which are those of `graph`.

    Raises:
        BundleError: they are not.
    """
    optional = session.get_overridable_initializers()  # inputs that have a default
    inputs = _checked_specs(graph_path, "input", [*session.get_inputs(), *optional], graph.inputs)
    outputs = _checked_specs(graph_path, "output", session.get_outputs(), graph.outputs)
    sides = [f"{i}.{side}" for i in range(facts.n_layers) for side in ("key", "value")]
    past, present = [f"past_key_values.{side}" for side in sides], [f"present.{side}" for side in sides]
    beside = {"attention_mask", "position_ids", KEEP} if graph.cache != "fixed" else {*STEP_INPUTS, "key_positions"}
    _check_names(graph_path, "input", inputs, {"input_ids", *past}, beside)
    _check_names(graph_path, "output", outputs, {"logits", *present}, set())
    cache_dtype = _one_dtype(graph_path, [inputs[n] for n in past] + [outputs[n] for n in present])
    return Wiring(session, facts, inputs, past, present, cache_dtype, _one_dtype(graph_path, [outputs["logits"]]))


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
