"""The exported file against torch, and the quantized file against the weights it ships, in every way of running it (ways.py).

Nothing is raised for a difference: each way gives a row with its verdict, and the caller stops the build.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgestill.export.blockwise import decibels
from edgestill.export.graph_io import load_graph, save_graph
from edgestill.export.onnx_export import ExportedGraph
from edgestill.export.ways import WAYS
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.backends.ort import OrtBackend
from edgestill.runtime.errors import EdgestillError, PromptTooLong
from edgestill.runtime.manifest import Graph, ModelFacts

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
Ids = npt.NDArray[np.integer[Any]]

PARITY_FLOAT_MAX_ABS = 1e-4
"""Largest difference of two float32 computations of one model whose logits stay within 10; see `float_limit`."""
LOSSY_SQNR_DB = 25.0
"""Floor for accuracy_level 4, which rounds activations to 8 bits. Measured 33.9 to 41.8 dB (five families with random
weights, 2 to 30 layers, and two trained models; blocks of 32 and 128, int4 and int8), so the floor allows eight times the
noise power; a weight in the wrong place gives less than 10 dB."""
LOSSY_SHARE = 0.1
"""Largest difference over the largest logit at accuracy_level 4: measured 0.009 to 0.026 on the same models."""

NARROW_SQNR_DB = 50.0
"""Floor for float16 against float32 of the same weights. Measured 61 to 69 dB (tiny random models, two trained ones)."""
NARROW_SHARE = {"float16": 0.02, "bfloat16": 0.15}
"""Largest difference of an engine over the largest logit: 40 times the rounding of one number (2^-11, 2^-8), since
errors of layers add up; on a CPU float16 stayed below 0.004."""


@dataclass(frozen=True)
class ParityRow:
    """One way of running the file, compared with the reference.

    `limit` is in `unit`: a maximum of `max_abs_delta` (logit), a minimum of `sqnr_db` (dB), or the length that must be
    refused (tokens). SQNR is taken on rows less their mean, which softmax ignores.
    """

    path: str
    limit: float
    unit: Literal["logit", "dB", "tokens"]
    passed: bool
    positions: int = 0
    equal_argmax: int = 0
    max_abs_delta: float | None = None
    sqnr_db: float | None = None
    """None without any difference."""
    reason: str = ""
    """Why it failed, where that is no number."""

    def words(self) -> str:
        """The row as a line of progress."""
        if self.unit == "tokens":
            refused = "refused, as it must be" if self.passed else "NOT refused"
            return f"parity, {self.path}: {refused} ({self.limit:.0f} tokens)"
        value = self.max_abs_delta if self.unit == "logit" else self.sqnr_db
        measured = "no value" if value is None else f"{value:.3g}"
        what = "max |delta logit|" if self.unit == "logit" else "SQNR in dB"
        return f"parity, {self.path}: {what} {measured} (limit {self.limit:g}){'' if self.passed else ' FAILED'}"


def check_parity(checkpoint: Path, exported: ExportedGraph, token_ids: Ids, label: str = "") -> list[ParityRow]:
    """Compare the float32 file with torch on `token_ids` [W, T], T >= 2; the limit is `float_limit` of torch's logits."""
    reference = torch_logits(checkpoint, token_ids)
    limit = float_limit(reference)
    return _compare(exported.path, exported.facts, exported.graph, token_ids, reference, limit, "logit", label)


def check_quantized_parity(
    quantized: Path, dequantized: Path, facts: ModelFacts, graph: Graph, token_ids: Ids
) -> list[ParityRow]:
    """Compare the quantized file with the float32 graph of the same weights on `token_ids` [W, T].

    At accuracy_level 0 (in a copy) the limit is `float_limit`; as shipped, where the level is 4, the floor is LOSSY_SQNR_DB.
    Paths are named `accuracy_level 0: prefill` and so on.
    """
    reference = ort_logits(dequantized, facts, graph, token_ids)
    limit = float_limit(reference)
    with tempfile.TemporaryDirectory(prefix="edgestill-parity-") as folder:
        exact = Path(folder) / quantized.name
        level = _write_at_level_0(quantized, exact)
        rows = _compare(exact, facts, graph, token_ids, reference, limit, "logit", "accuracy_level 0: ")
    if level:
        label = f"accuracy_level {level}: "
        rows += _compare(quantized, facts, graph, token_ids, reference, LOSSY_SQNR_DB, "dB", label)
    return rows


def check_narrow_parity(shipped: ExportedGraph, yardstick: ExportedGraph, token_ids: Ids) -> list[ParityRow]:
    """Compare a graph in float16 with the float32 graph of the same weights on `token_ids` [W, T]; the floor is NARROW_SQNR_DB."""
    reference = ort_logits(yardstick.path, yardstick.facts, yardstick.graph, token_ids)
    label = "engine, as shipped: "
    return _compare(shipped.path, shipped.facts, shipped.graph, token_ids, reference, NARROW_SQNR_DB, "dB", label)


def narrow_limit(precision: PrecisionSpec, logits: F32) -> float:
    """The limit of `parity_max_abs_logit` for an engine whose parity rows are `logits` [r, V]: NARROW_SHARE of the largest."""
    kind = "bfloat16" if precision.weights == "bfloat16" else "float16"
    if precision.weights == "float32":
        return 10 * float_limit(logits)
    return NARROW_SHARE[kind] * float(np.abs(logits).max())


def parity_rows(
    dequantized: Path, facts: ModelFacts, graph: Graph, token_ids: Ids, rows: int, seed: int
) -> tuple[I32, F32]:
    """`rows` random places of `token_ids` [W, T] and the float32 logits there, for reference/parity.safetensors.

    Returns positions int32 [r, 2] (window, position; ascending) and logits float32 [r, V].
    """
    windows, length = token_ids.shape
    chosen = np.random.default_rng(seed).choice(windows * length, size=min(rows, windows * length), replace=False)
    positions = np.stack(np.unravel_index(np.sort(chosen), (windows, length)), axis=1).astype(np.int32)
    logits = np.empty((len(positions), facts.vocab_size), np.float32)
    needed, index = np.unique(positions[:, 0], return_inverse=True)
    backend = OrtBackend(dequantized, facts, graph)
    for i, window in enumerate(needed):
        step = backend.step(backend.new_state(1, length), token_ids[window : window + 1].astype(np.int64))[0]
        logits[index == i] = step[positions[index == i, 1]]
    return positions, logits


def parity_limit(precision: PrecisionSpec, logits: F32) -> float:
    """The limit of `parity_max_abs_logit` for a bundle of this precision whose parity rows are `logits` [r, V].

    `float_limit` for float32 weights; ten times that for integers at accuracy_level 0, whose kernels differ more between
    processors; 0.1 max |logit| at accuracy_level 4 (LOSSY_SHARE).
    """
    if precision.weights == "float32":
        return float_limit(logits)
    if not precision.rounds_activations:
        return 10 * float_limit(logits)
    return LOSSY_SHARE * float(np.abs(logits).max())


def float_limit(logits: F32) -> float:
    """1e-4 x max(1, max |logit| / 10): what sums in another order may change.

    Measured against torch: 1.2e-6 at max |logit| 3 (five families), 3.0e-5 at 19 (trained, 8 layers, 256 tokens). A float32
    of 100 has steps of 8e-6, so a fixed limit would refuse sound models with large logits.
    """
    return PARITY_FLOAT_MAX_ABS * max(1.0, float(np.abs(logits).max()) / 10)


def torch_logits(checkpoint: Path, token_ids: Ids) -> F32:
    """Logits [W, T, V] of the checkpoint in float32 by torch, one window at a time, without a cache."""
    import torch

    from edgestill.compress.low_rank import load_student

    model: Any = load_student(checkpoint, torch.float32)
    with torch.no_grad():
        windows = [model(torch.from_numpy(w[None].astype(np.int64)), use_cache=False).logits[0] for w in token_ids]
    return np.stack([window.numpy() for window in windows])


def ort_logits(path: Path, facts: ModelFacts, graph: Graph, token_ids: Ids) -> F32:
    """Logits [W, T, V] of the graph file in `path`, one window at a time in one step."""
    backend = OrtBackend(path, facts, graph)
    length = token_ids.shape[1]
    windows = [backend.step(backend.new_state(1, length), w[None].astype(np.int64))[0].copy() for w in token_ids]
    return np.stack(windows)


def _compare(
    path: Path,
    facts: ModelFacts,
    graph: Graph,
    token_ids: Ids,
    reference: F32,
    limit: float,
    unit: Literal["logit", "dB"],
    label: str = "",
) -> list[ParityRow]:
    """One row per way, and one for the over-long prompt."""
    ids = token_ids.astype(np.int64)
    try:
        backend = OrtBackend(path, facts, graph)
    except EdgestillError as refusal:
        return [ParityRow(f"{label}opening", limit, unit, passed=False, reason=str(refusal))]
    rows = []
    refusals: tuple[type[Exception], ...] = (EdgestillError, *_onnxruntime_errors())
    for name, way in WAYS.items():
        difference = _Difference()
        try:
            for window, start, logits in way(backend, ids):
                difference.add(reference[window, start : start + len(logits)], logits)
        except refusals as refusal:
            rows.append(ParityRow(label + name, limit, unit, passed=False, reason=str(refusal)[:200]))
        else:
            rows.append(difference.row(label + name, limit, unit))
    return [*rows, _over_long(backend, ids.shape[1], label)]


def _over_long(backend: OrtBackend, length: int, label: str) -> ParityRow:
    """A state longer than the model, and a prompt longer than its state, must raise PromptTooLong."""
    longest = backend.facts.max_tokens
    name, limit = f"{label}over-long prompt", float(longest + 1)
    accepted = []
    try:
        backend.new_state(1, longest + 1)
        accepted.append(f"a state of {longest + 1} tokens")
    except PromptTooLong:
        pass
    length = min(length, longest)
    try:
        backend.step(backend.new_state(1, length), np.zeros((1, length + 1), np.int64))
        accepted.append(f"{length + 1} tokens in a state of {length}")
    except PromptTooLong:
        pass
    reason = f"accepted {' and '.join(accepted)}" if accepted else ""
    return ParityRow(name, limit, "tokens", passed=not accepted, reason=reason)


class _Difference:
    """Running comparison of logits [n, V] with their reference."""

    def __init__(self) -> None:
        self.positions = 0
        self.equal_argmax = 0
        self.max_abs_delta = 0.0
        self._signal = 0.0
        self._noise = 0.0

    def add(self, reference: F32, logits: F32) -> None:
        """Count both [n, V]."""
        delta = logits.astype(np.float64) - reference
        centred = reference - reference.mean(axis=1, keepdims=True, dtype=np.float64)
        self.positions += len(reference)
        self.equal_argmax += int((logits.argmax(axis=1) == reference.argmax(axis=1)).sum())
        self.max_abs_delta = float(np.maximum(self.max_abs_delta, np.abs(delta).max()))  # NaN stays NaN, unlike max()
        self._signal += float(np.square(centred).sum())
        self._noise += float(np.square(delta - delta.mean(axis=1, keepdims=True)).sum())

    def row(self, path: str, limit: float, unit: Literal["logit", "dB"]) -> ParityRow:
        """The verdict."""
        if not math.isfinite(self.max_abs_delta):
            return ParityRow(
                path, limit, unit, False, self.positions, self.equal_argmax, reason="logits that are no numbers"
            )
        sqnr = decibels(self._signal, self._noise)
        passed = self.max_abs_delta <= limit if unit == "logit" else sqnr is None or sqnr >= limit
        return ParityRow(path, limit, unit, passed, self.positions, self.equal_argmax, self.max_abs_delta, sqnr)


def _write_at_level_0(source: Path, target: Path) -> int:
    """Copy the graph with accuracy_level 0 throughout; returns the highest level it had."""
    model = load_graph(source)
    level = 0
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            level = max(level, node.attributes.get_int("accuracy_level", 0))
            node.attributes.pop("accuracy_level", None)
    save_graph(model, target)
    return level


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    return states.Fail, states.InvalidArgument, states.RuntimeException, states.NotImplemented
