"""A TensorRT engine on an NVIDIA GPU: the cache stays on the device and is updated in place.

A `Lane` is what one batch of rows needs: two execution contexts (prefill, decode), a stream, the cache, and a CUDA graph of the
decode step, recorded anew where the number of attended slots changes. Lanes are kept and used again, so a text after the first
allocates nothing.
Several states may be stepped from several threads; each has lanes of its own.

No torch: memory, streams and graphs come from NVIDIA's bindings (engines/cuda.py).
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from edgestill.runtime.backends import F32, I64, new_state_limits
from edgestill.runtime.backends.fixed_cache import FixedState
from edgestill.runtime.backends.tensorrt_lane import Lane
from edgestill.runtime.engines.cuda import Device
from edgestill.runtime.engines.flavour import Library
from edgestill.runtime.engines.plan import EnginePlan
from edgestill.runtime.errors import BundleError, MissingPart, PromptTooLong
from edgestill.runtime.manifest import Graph, ModelFacts, TensorSpec


class Kernels(Protocol):
    """Where kernels that were compiled on this card wait for the next process."""

    def read(self) -> bytes:
        """What was kept, empty when there is nothing that may be used."""
        ...

    def write(self, data: bytes) -> None:
        """Keep `data`; a place that can't be written keeps nothing."""
        ...


class TensorRTBackend:
    """One engine on one GPU. Safe to step from several threads, each with its own state."""

    def __init__(
        self,
        data: bytes,
        library: Library,
        device: Device,
        plan: EnginePlan,
        graph: Graph,
        facts: ModelFacts,
        kernels: Kernels | None = None,
    ) -> None:
        """Open the engine in `data`. `kernels`: where those that this card's runtime compiles are kept.

        Raises:
            MissingPart: TensorRT refuses it on this card.
            BundleError: its inputs and outputs are not those of `graph`.
        """
        self.facts, self.graph, self.plan = facts, graph, plan
        self.lines: deque[str] = deque(maxlen=20)
        self.prefill_chunk = plan.prefill_tokens
        self.library, self.device = library, device
        self.engine = _open_engine(data, library, self._keep_line)
        _check_engine(self.engine, graph, library)
        self._kernels = kernels
        compiled = b"" if kernels is None else kernels.read()
        self.running = library.running(self.engine, compiled)
        self.ran: set[tuple[int, ...]] = set()
        """Shapes that lanes ran, for each of which kernels may have been compiled."""
        self._kept_bytes, self._kept_shapes = len(compiled), 0
        self.session: dict[str, Any] = {
            "engine": f"{library.flavour.name} {library.version}",
            "prefill_chunk": self.prefill_chunk,
            "cuda_graph": "by the runtime" if self.running.captures else "decode step captured",
        }
        self._free: dict[int, deque[Lane]] = {}
        """Idle lanes by their rows. No lock: lanes come back from the garbage collector, which may run inside of any other."""

    def _keep_line(self, line: str) -> None:
        """The last messages of TensorRT, for an error to name."""
        self.lines.append(line)

    def new_state(self, batch_size: int, max_tokens: int, left_padding: Sequence[int] | None = None) -> EngineState:
        """See `Backend.new_state`. Device memory: 2 x n_layers x B x Hkv x capacity x D values.

        Rows beyond the engine's largest batch run in turn.
        """
        padding = new_state_limits(self.facts, batch_size, max_tokens, left_padding)
        if max_tokens > self.plan.capacity:
            raise PromptTooLong(
                f"{max_tokens} tokens exceed the {self.plan.capacity} of this engine's cache; send fewer tokens"
            )
        most = self.plan.max_batch
        sizes = [min(most, batch_size - start) for start in range(0, batch_size, most)]
        lanes = [self._take(size) for size in sizes]
        state = EngineState(self, lanes, batch_size, max_tokens, padding)
        weakref.finalize(state, self._give_back, lanes)
        return state

    def step(self, state: EngineState, token_ids: I64, keep: int | None = None) -> F32:
        """See `Backend.step`."""
        return state.advance(token_ids, state.check_step(token_ids, keep))

    @property
    def rewinds(self) -> bool:
        """See `Backend.rewinds`."""
        return True

    def rewind(self, state: EngineState, length: int) -> None:
        """See `Backend.rewind`."""
        state.rewind(length)

    def inspect(self) -> list[str]:
        """What the engine is made of, one line per layer: kernels and types where it was built to say so."""
        inspector = self.engine.create_engine_inspector()
        form = self.library.trt.LayerInformationFormat.ONELINE
        return str(inspector.get_engine_information(form)).splitlines()

    def compile_first(self) -> None:
        """From the next lane on: kernels of a new shape are compiled before it runs, not beside it (TensorRT-RTX).

        For measurements: until a specialized kernel is ready a general one runs in its place, and would be what is measured.
        Where nobody measures, a text begins at once, and is as fast when the kernels are there.
        """
        self.running = self.library.running(self.engine, b"", self.running)

    def _take(self, rows: int) -> Lane:
        try:
            return self._free[rows].pop()
        except (KeyError, IndexError):
            return Lane(self, rows)

    def _give_back(self, lanes: list[Lane]) -> None:
        for lane in lanes:
            self._free.setdefault(lane.rows, deque()).append(lane)
        self._keep_kernels()

    def _keep_kernels(self) -> None:
        """After a text, when nobody waits: keep what was compiled for the next process.

        Asked for only after shapes that are new, and until it no longer grows: kernels may be finished after the text.
        """
        shapes = len(self.ran)
        if self._kernels is None or shapes == self._kept_shapes:
            return
        compiled = self.running.compiled()
        if len(compiled) > self._kept_bytes:
            self._kernels.write(compiled)
            self._kept_bytes = len(compiled)
        else:
            self._kept_shapes = shapes


class EngineState(FixedState):
    """A batch of sequences, its rows spread over lanes."""

    def __init__(
        self, backend: TensorRTBackend, lanes: list[Lane], batch_size: int, max_tokens: int, left_padding: I64 | None
    ) -> None:
        super().__init__(batch_size, max_tokens, left_padding, backend.plan.capacity)
        self._backend, self._lanes = backend, lanes

    def advance(self, token_ids: I64, keep: int) -> F32:
        """Append `token_ids` (int64 [B, n], checked); logits of the last `keep` of them, float32 [B, keep, V]."""
        new, plan = token_ids.shape[1], self._backend.plan
        if new <= plan.prefill_tokens and keep <= plan.kept_tokens:
            return self._one(token_ids, keep)
        parts, start = [], 0
        while start < new:
            first_kept = max(start, new - keep)
            end = min(new, start + plan.prefill_tokens, first_kept + plan.kept_tokens)
            logits = self._one(token_ids[:, start:end], max(end - first_kept, 1))
            if end > first_kept:
                parts.append(logits.copy())
            start = end
        return np.concatenate(parts, axis=1)

    def _one(self, token_ids: I64, keep: int) -> F32:
        """One run of the engine per lane."""
        inputs = self.place(token_ids, keep)
        first, found = 0, []
        for lane in self._lanes:
            lane.start(inputs.rows(slice(first, first + lane.rows)))
            first += lane.rows
        for lane in self._lanes:
            found.append(lane.finish())
        self.commit(token_ids.shape[1])
        return found[0] if len(found) == 1 else np.concatenate(found)


def _open_engine(data: bytes, library: Library, line: Callable[[str], None]) -> Any:
    lines: list[str] = []

    def keep(text: str) -> None:
        lines.append(text)
        line(text)

    runtime = library.runtime(keep)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        why = next((text for text in lines if "error" in text.partition(":")[0]), "no reason was given")
        raise MissingPart(
            f"{library.flavour.name} {library.version} can't open this engine ({' '.join(why.split())[:200]})",
            "delete local/engines in the bundle, and it is built anew",
        )
    with contextlib.suppress(AttributeError):
        engine._edgestill_runtime = runtime  # the runtime must outlive it
    return engine


def _check_engine(engine: Any, graph: Graph, library: Library) -> None:
    """The engine's tensors are those of the graph, and its caches are updated in place.

    Raises:
        BundleError: they are not.
    """
    declared: dict[str, TensorSpec] = {spec.name: spec for spec in (*graph.inputs, *graph.outputs)}
    names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    if names != declared.keys():
        odd = ", ".join(sorted(names ^ declared.keys()))
        raise BundleError(f"the engine and the manifest differ in {odd}; delete local/engines in the bundle")
    for name, spec in declared.items():
        kind = library.numpy_name(engine.get_tensor_dtype(name))
        if kind != spec.dtype:
            raise BundleError(
                f"the engine's {name} is {kind}, the manifest says {spec.dtype}; delete local/engines in the bundle"
            )
    for spec in graph.outputs:
        if spec.name.startswith("present."):
            past = spec.name.replace("present.", "past_key_values.")
            aliased = engine.get_aliased_input_tensor(spec.name)
            if aliased != past:
                raise BundleError(f"the engine writes {spec.name} over {aliased}, not over {past}; upgrade TensorRT")
