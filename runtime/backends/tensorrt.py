"""A TensorRT engine on an NVIDIA GPU: cache on the device and updated in place, one upload and one download a step.

A `Lane` is what one batch of rows needs: two execution contexts (prefill, decode), a stream, the cache, and CUDA graphs of the
decode step, one for each number of attended slots. Lanes are kept and used again, so a text after the first allocates nothing.
Several states may be stepped from several threads; each has lanes of its own.

No torch: memory, streams and graphs come from NVIDIA's bindings (engines/cuda.py).
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgestill.runtime.backends import F32, I64, new_state_limits
from edgestill.runtime.backends.fixed_cache import FixedState, StepInputs
from edgestill.runtime.engines.cuda import Device
from edgestill.runtime.engines.flavour import Library
from edgestill.runtime.engines.plan import DECODE, PREFILL, EnginePlan
from edgestill.runtime.errors import BundleError, MissingPart, PromptTooLong
from edgestill.runtime.manifest import Graph, ModelFacts, TensorSpec

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4}
ALIGNMENT = 256
"""Bytes: what cudaMalloc aligns to, kept for each tensor of one allocation."""
STEP_INPUTS = ("input_ids", "position_ids", "write_indices", "logit_positions")
"""Uploaded at every step; key_positions never changes."""


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
        self._kernels, self._kept_bytes = kernels, 0
        compiled = b"" if kernels is None else kernels.read()
        self.running = library.running(self.engine, compiled)
        self._kept_bytes = len(compiled)
        self.session: dict[str, Any] = {
            "engine": f"{library.flavour.name} {library.version}",
            "prefill_chunk": self.prefill_chunk,
            "cuda_graph": "by the runtime" if self.running.captures else "decode step captured",
        }
        self._free: dict[int, list[Lane]] = {}
        self._lock = threading.Lock()

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

    def _take(self, rows: int) -> Lane:
        with self._lock:
            kept = self._free.get(rows)
            if kept:
                return kept.pop()
        return Lane(self, rows)

    def _give_back(self, lanes: list[Lane]) -> None:
        with self._lock:
            for lane in lanes:
                self._free.setdefault(lane.rows, []).append(lane)
        self._keep_kernels()

    def _keep_kernels(self) -> None:
        """After a text, when nobody waits: keep what was compiled for the next process."""
        if self._kernels is None:
            return
        compiled = self.running.compiled()
        if len(compiled) > self._kept_bytes:
            self._kernels.write(compiled)
            self._kept_bytes = len(compiled)


class EngineState(FixedState):
    """A batch of sequences, its rows spread over lanes."""

    def __init__(
        self, backend: TensorRTBackend, lanes: list[Lane], batch_size: int, max_tokens: int, left_padding: I64 | None
    ) -> None:
        super().__init__(batch_size, max_tokens, left_padding, backend.plan.capacity)
        self._backend, self._lanes = backend, lanes

    def advance(self, token_ids: I64, keep: int) -> F32:
        """Append `token_ids` (int64 [B, n], checked); logits of the last `keep` of them, float32 [B, keep, V]."""
        new, most = token_ids.shape[1], self._backend.plan.prefill_tokens
        if new <= most:
            return self._one(token_ids, keep)
        parts = []
        for start in range(0, new, most):
            chunk = token_ids[:, start : start + most]
            after = new - start - chunk.shape[1]
            kept = min(chunk.shape[1], keep - after)
            logits = self._one(chunk, max(kept, 1))
            if kept > 0:
                parts.append(logits.copy())
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


class Lane:
    """Contexts, stream, buffers and CUDA graphs for `rows` rows."""

    def __init__(self, backend: TensorRTBackend, rows: int) -> None:
        self.rows = rows
        self._backend, self._device = backend, backend.device
        plan, facts = backend.plan, backend.facts
        self._stream = self._device.stream()
        self._contexts = [self._context(number) for number in (PREFILL, DECODE)]
        most, vocab = plan.prefill_tokens, facts.vocab_size
        self._host = {
            name: _pinned(self._device, np.int64, rows * (1 if name == "write_indices" else most))
            for name in STEP_INPUTS
        }
        self._logits = _pinned(self._device, np.float32, rows * most * vocab)
        sizes = {name: array.nbytes for name, array in self._host.items()}
        sizes |= {"key_positions": 8 * plan.capacity, "logits": self._logits.nbytes}
        for spec in backend.graph.inputs:
            if spec.name.startswith("past_key_values."):
                sizes[spec.name] = rows * math.prod(map(int, spec.shape[1:])) * ITEM_BYTES[spec.dtype]
        self._addresses, self._memory = _placed(self._device, sizes)
        weakref.finalize(self, self._device.free, self._memory)
        positions = np.arange(plan.capacity, dtype=np.int64)
        self._device.upload(self._addresses["key_positions"], positions, self._stream)
        self._device.wait(self._stream)
        for context in self._contexts:
            self._bind(context)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._running = (0, 0)

    def start(self, step: StepInputs) -> None:
        """Put one step on the stream."""
        (rows, new), keep = step.input_ids.shape, step.logit_positions.shape[1]
        for name in STEP_INPUTS:
            array: I64 = getattr(step, name)
            host = self._host[name][: array.size]
            host[:] = array.reshape(-1)
        if (new, keep) == (1, 1):
            self._decode(step.attended)
        else:
            self._run(PREFILL, new, keep, step.attended)
        self._running = (rows, keep)

    def finish(self) -> F32:
        """Wait for the step; float32 [rows, kept, V], valid until the next."""
        self._device.wait(self._stream)
        rows, keep = self._running
        vocab = self._backend.facts.vocab_size
        logits: F32 = self._logits[: rows * keep * vocab].reshape(rows, keep, vocab)
        return logits

    def _decode(self, attended: int) -> None:
        """One token a row: the first time as it is, and recorded behind that; later replayed."""
        if attended in self._graphs:
            self._graphs[attended]()
            return
        self._run(DECODE, 1, 1, attended)
        if not self._backend.running.captures:
            # recording wants a run of the same shape before it, which loads kernels and takes scratch memory
            self._device.wait(self._stream)
            record = partial(self._run, DECODE, 1, 1, attended)
            self._graphs[attended] = self._device.capture(record, self._stream)

    def _run(self, number: int, new: int, keep: int, attended: int) -> None:
        """Upload, execute, download, all on the stream."""
        context = self._contexts[number]
        rows, vocab = self.rows, self._backend.facts.vocab_size
        shapes = {
            "input_ids": (rows, new),
            "position_ids": (rows, new),
            "write_indices": (rows,),
            "logit_positions": (rows, keep),
            "key_positions": (attended,),
        }
        for name, shape in shapes.items():
            if name in self._inputs:
                context.set_input_shape(name, shape)
            if name in self._host:
                self._device.upload(self._addresses[name], self._host[name][: int(np.prod(shape))], self._stream)
        if not context.execute_async_v3(self._stream):
            why = " ".join(self._backend.lines[-1].split())[:200] if self._backend.lines else "no reason was given"
            raise BundleError(
                f"the engine refuses a step of {rows} x {new} tokens ({why}); delete local/engines in the bundle"
            )
        self._device.download(self._logits[: rows * keep * vocab], self._addresses["logits"], self._stream)

    def _context(self, number: int) -> Any:
        """An execution context with optimization profile `number`."""
        context = self._backend.running.context()
        if context is None or not context.set_optimization_profile_async(number, self._stream):
            raise MissingPart(
                "TensorRT makes no execution context of this engine", "free device memory, or build the engine again"
            )
        self._device.wait(self._stream)
        return context

    def _bind(self, context: Any) -> None:
        """Addresses and the shapes that never change."""
        engine_shape = {spec.name: spec for spec in self._backend.graph.inputs}
        for name, spec in engine_shape.items():
            context.set_tensor_address(name, self._addresses[name])
            if name.startswith("past_key_values."):
                context.set_input_shape(name, (self.rows, *spec.shape[1:]))
        for spec in self._backend.graph.outputs:
            name = spec.name.replace("present.", "past_key_values.")  # written where it is read
            context.set_tensor_address(spec.name, self._addresses[name])

    @property
    def _inputs(self) -> set[str]:
        return {spec.name for spec in self._backend.graph.inputs}


def _placed(device: Device, sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """(address of each tensor, the one allocation that holds them)."""
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    base = device.allocate(end)
    return {name: base + offset for name, offset in offsets.items()}, base


def _pinned(device: Device, kind: Any, count: int) -> npt.NDArray[Any]:
    return device.pinned(count * np.dtype(kind).itemsize).view(kind)


def _open_engine(data: bytes, library: Library, line: Callable[[str], None]) -> Any:
    lines: list[str] = []

    def keep(text: str) -> None:
        lines.append(text)
        line(text)

    runtime = library.trt.Runtime(library.logger(keep))
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
