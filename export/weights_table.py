"""What each way to store the weights costs: perplexity, distance from the float student, size and speed, from the files.

Windows are scored whole through onnxruntime at the accuracy_level that ships. The mean over domains gives each the same share.
Differences are paired by window, their standard errors clustered by block of text and by seed (compress/ablate_statistics.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgestill.compress.ablate_statistics import Scores, difference, perplexity
from edgestill.compress.packing import Part
from edgestill.export.onnx_export import ExportedGraph
from edgestill.runtime.backends.ort import OrtBackend

F32 = npt.NDArray[np.float32]
PROMPT, NEW, RUNS = 128, 64, 15
"""Decode speed: tokens in the cache, tokens timed, counted runs after the one that warms up."""


@dataclass(frozen=True)
class Judged:
    """One file: sums over the tokens of each window, nats, and the bytes that ship (graph, tokenizer)."""

    nll: Sequence[float]
    kl: Sequence[float]
    """KL(float student || this)."""
    graph_bytes: int
    tokenizer_bytes: int


def open_graph(exported: ExportedGraph, threads: int) -> OrtBackend:
    """The file in onnxruntime."""
    return OrtBackend(exported.path, exported.facts, exported.graph, threads=threads)


def counted(part: Part, window: int) -> npt.NDArray[np.bool_]:
    """bool [T - 1]: labels of a window that count."""
    if part.loss_mask is None:
        return np.ones(part.token_ids.shape[1] - 1, bool)
    return np.asarray(part.loss_mask[window, 1:] != 0)


def judge_windows(
    backend: OrtBackend, plain: OrtBackend, part: Part, windows: Sequence[int] | npt.NDArray[np.int64]
) -> tuple[list[float], list[float]]:
    """(negative log-likelihood, KL(plain || backend)) of each window, sums in nats."""
    nll, divergence = [], []
    for window in windows:
        ids = part.token_ids[window].astype(np.int64)
        log_q, log_p = (log_softmax(b, ids) for b in (backend, plain))
        rows = counted(part, int(window)).nonzero()[0]
        nll.append(-float(log_q[rows, ids[rows + 1]].sum(dtype=np.float64)))
        apart = np.exp(log_p[rows]) * (log_p[rows] - log_q[rows])
        divergence.append(float(apart.sum(dtype=np.float64)))
    return nll, divergence


def log_softmax(backend: OrtBackend, ids: npt.NDArray[np.int64]) -> F32:
    """float32 [T - 1, V] of the predictions of all but the first token; sums in float64, exponentials in float32 for speed."""
    logits = backend.step(backend.new_state(1, len(ids)), ids[None, :])[0, :-1].astype(np.float32)
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return np.asarray(logits)


def decode_speeds(graphs: Mapping[str, ExportedGraph], prompt: npt.NDArray[np.int64], threads: int) -> dict[str, float]:
    """Median tokens per second of each, batch 1, after at most PROMPT tokens of `prompt` [T]; they take turns."""
    longest = min(exported.facts.max_tokens for exported in graphs.values())
    new = min(NEW, longest // 2)
    prompt = prompt[: min(PROMPT, longest - new)]
    backends = {name: open_graph(exported, threads) for name, exported in graphs.items()}
    found: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(RUNS + 1):
        for name, backend in backends.items():
            state = backend.new_state(1, len(prompt) + new)
            token = backend.step(state, prompt[None])[0, -1].argmax()
            started = time.perf_counter()
            for _ in range(new - 1):
                token = backend.step(state, np.array([[token]], np.int64))[0, -1].argmax()
            found[name].append((new - 1) / (time.perf_counter() - started))
    return {name: round(statistics.median(values[1:]), 1) for name, values in found.items()}


def table(
    part: Part,
    windows: npt.NDArray[np.int64],
    cells: Mapping[str, Mapping[int, Judged]],
    speeds: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One row per cell, the first is the float student.

    With one seed the standard error of a perplexity is that of the text, else that over seeds.

    Args:
        windows: those of `part` that were judged.
        cells: by name, then by seed.
    """
    tokens = np.array([int(counted(part, int(window)).sum()) for window in windows])
    domains = sorted({int(d) for d in part.domain[windows]})

    def scores(judged: Mapping[int, Judged], what: str) -> Scores:
        values = np.array([getattr(one, what) for one in judged.values()], np.float64)
        return Scores(tuple(judged), values, tokens, part.domain[windows], part.block[windows])

    first = next(iter(cells))
    floats = scores(cells[first], "nll")
    nothing = replace(floats, nll=np.zeros_like(floats.nll))
    rows = []
    for name, judged in cells.items():
        reached, alone = perplexity(scores(judged, "nll"), domains), difference(scores(judged, "nll"), nothing, domains)
        error = reached.standard_error
        if error is None and alone is not None and alone.standard_error is not None:
            error = reached.value * alone.standard_error  # delta method
        over = difference(scores(judged, "nll"), floats, domains) if name != first else None
        kl = difference(scores(judged, "kl"), nothing, domains) if name != first else None
        one = next(iter(judged.values()))
        rows.append(
            {
                "cell": name,
                "perplexity": round(reached.value, 3),
                "perplexity_standard_error": _rounded(error, 3),
                "over_float_nats": None if over is None else round(over.nats, 5),
                "standard_error": None if over is None else _rounded(over.standard_error, 5),
                "kl_nats": 0.0 if kl is None else round(kl.nats, 6),
                "kl_standard_error": None if kl is None else _rounded(kl.standard_error, 6),
                "graph_mib": round(one.graph_bytes / 2**20, 3),
                "bundle_mib": round((one.graph_bytes + one.tokenizer_bytes) / 2**20, 3),
                "decode_tokens_per_s": speeds[name],
            }
        )
    return rows


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
