"""What one batch of rows needs on the GPU: two execution contexts, a stream, the cache, buffers, the CUDA graph of its decode step.

One allocation holds all device memory of a lane; uploads and downloads run from pinned memory; nothing is allocated by a step.

One graph is kept, that of the newest number of attended slots. A graph is tied to the state of the execution context it was
recorded from: once that takes another shape, TensorRT wants a new recording. A context for each number would keep all graphs, and
take the scratch memory of a step for each; recording anew costs one step in `ATTENDED_STEP`.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgestill.runtime.backends import F32, I64
from edgestill.runtime.backends.fixed_cache import STEP_INPUTS, StepInputs
from edgestill.runtime.engines.cuda import CudaError, Device, Recorded
from edgestill.runtime.engines.plan import DECODE, PREFILL
from edgestill.runtime.errors import BundleError, MissingPart

if TYPE_CHECKING:
    from edgestill.runtime.backends.tensorrt import TensorRTBackend

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4}
ALIGNMENT = 256
"""Bytes: what cudaMalloc aligns to, kept for each tensor of one allocation."""


class Held:
    """What a lane holds on the GPU, given back in an order in which nothing is used after it is gone."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.stream = device.stream()
        self.memory: int | None = None
        self.contexts: list[Any] = []
        self.graph: tuple[int, Recorded] | None = None
        """(attended slots, the decode step recorded for them)."""

    def forget_graph(self) -> None:
        """Give the recorded step back; the stream must be idle."""
        graph, self.graph = self.graph, None
        if graph is not None:
            graph[1].close()

    def release(self) -> None:
        """Wait, then give everything back. A card that was lost refuses all of it, and nobody is there to hear of it."""
        steps: list[Callable[[], None]] = [
            partial(self._device.wait, self.stream),
            self.forget_graph,
            self.contexts.clear,
            *([] if self.memory is None else [partial(self._device.free, self.memory)]),
            partial(self._device.close_stream, self.stream),
        ]
        for step in steps:
            with contextlib.suppress(CudaError):
                step()


class Lane:
    """Contexts, stream, buffers and the CUDA graph for `rows` rows."""

    def __init__(self, backend: TensorRTBackend, rows: int) -> None:
        self.rows = rows
        self._backend, self._device = backend, backend.device
        plan, facts = backend.plan, backend.facts
        self._held = Held(self._device)
        weakref.finalize(self, self._held.release)
        self._stream, self._contexts = self._held.stream, self._held.contexts
        for number in (PREFILL, DECODE):
            self._contexts.append(self._context(number))
        most, vocab = plan.prefill_tokens, facts.vocab_size
        counts = {"write_indices": 1, "logit_positions": plan.kept_tokens}
        self._host = {name: _pinned(self._device, np.int64, rows * counts.get(name, most)) for name in STEP_INPUTS}
        self._logits = _pinned(self._device, np.float32, rows * plan.kept_tokens * vocab)
        sizes = {name: array.nbytes for name, array in self._host.items()}
        sizes |= {"key_positions": 8 * plan.capacity, "logits": self._logits.nbytes}
        for spec in backend.graph.inputs:
            if spec.name.startswith("past_key_values."):
                sizes[spec.name] = rows * math.prod(map(int, spec.shape[1:])) * ITEM_BYTES[spec.dtype]
        self._addresses, self._held.memory = _placed(self._device, sizes, self._stream)
        positions = np.arange(plan.capacity, dtype=np.int64)
        self._device.upload(self._addresses["key_positions"], positions, self._stream)
        self._device.wait(self._stream)
        for context in self._contexts:
            self._bind(context)
        self._running = (0, 0)

    def start(self, step: StepInputs) -> None:
        """Put one step on the stream."""
        self._device.wait(
            self._stream
        )  # a step that nobody finished (Ctrl-C, another lane's error) still reads the buffers
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
        graph = self._held.graph
        if graph is not None and graph[0] == attended:
            graph[1].replay()
            return
        self._held.forget_graph()
        self._run(DECODE, 1, 1, attended)
        if not self._backend.running.captures:
            # recording wants a run of the same shape before it, which loads kernels and takes scratch memory
            self._device.wait(self._stream)
            record = partial(self._put, DECODE, self._shapes(1, 1, attended))
            self._held.graph = (attended, self._device.capture(record, self._stream))

    def _run(self, number: int, new: int, keep: int, attended: int) -> None:
        """One step of optimization profile `number` on the stream."""
        shapes = self._shapes(new, keep, attended)
        for name, shape in shapes.items():
            if name in self._inputs:
                self._contexts[number].set_input_shape(name, shape)
        self._put(number, shapes)
        self._backend.ran.add((number, self.rows, new, keep, attended))

    def _put(self, number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        """Upload, execute, download: all that a recording of a step holds."""
        for name, host in self._host.items():
            self._device.upload(self._addresses[name], host[: math.prod(shapes[name])], self._stream)
        if not self._contexts[number].execute_async_v3(self._stream):
            rows, new = shapes["input_ids"]
            why = " ".join(self._backend.lines[-1].split())[:200] if self._backend.lines else "no reason was given"
            raise BundleError(
                f"the engine refuses a step of {rows} x {new} tokens ({why}); delete local/engines in the bundle"
            )
        found = math.prod(shapes["logit_positions"]) * self._backend.facts.vocab_size
        self._device.download(self._logits[:found], self._addresses["logits"], self._stream)

    def _shapes(self, new: int, keep: int, attended: int) -> dict[str, tuple[int, ...]]:
        """Of the inputs that differ from step to step."""
        return {
            "input_ids": (self.rows, new),
            "position_ids": (self.rows, new),
            "write_indices": (self.rows,),
            "logit_positions": (self.rows, keep),
            "key_positions": (attended,),
        }

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


def _placed(device: Device, sizes: dict[str, int], stream: int) -> tuple[dict[str, int], int]:
    """(address of each tensor, the one allocation that holds them)."""
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    base = device.allocate(end, stream)
    return {name: base + offset for name, offset in offsets.items()}, base


def _pinned(device: Device, kind: Any, count: int) -> npt.NDArray[Any]:
    return device.pinned(count * np.dtype(kind).itemsize).view(kind)
