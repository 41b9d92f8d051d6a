"""`edgestill tune`: the session settings under which this machine runs a bundle's workload fastest.

One word after the other: threads, spinning, prefill chunk. Candidates of a word take turns, so that slow minutes hit all; each
turn opens a session, warms it up, and times the profile's workload. A candidate must beat the setting it replaces by more than
MARGIN: below that, the machine's mood decides, and the default is what others measured.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.backends import PREFILL_CHUNK
from edgestill.runtime.bundle import Bundle, open_bundle
from edgestill.runtime.child import Emit, run_child
from edgestill.runtime.device import ENGINE
from edgestill.runtime.errors import BadInput
from edgestill.runtime.measure import workload_of
from edgestill.runtime.model import open_with
from edgestill.runtime.progress import Progress
from edgestill.runtime.settings import SessionSettings, default_threads, write_settings
from edgestill.runtime.workload import Workload, generate_once

ROUNDS = 5
MARGIN = 0.02
CHUNKS = (PREFILL_CHUNK, 64, 256, 512)


def tune_bundle(path: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Choose settings in a process of its own, and keep them in local/: {"settings", "measured": one row per candidate}.

    Raises:
        MeasurementFailed: the measuring process gave no result. OutputRefused: local/ can't be written.
    """
    bundle = open_bundle(path)
    engine = bundle.manifest.engine
    if engine != ENGINE:
        raise BadInput(f"{path}: threads and spinning are settings of {ENGINE}; engine {engine} has none to tune")
    work = workload_of(bundle.manifest)
    found = run_child("tune", path, dataclasses.asdict(work), "tuning", progress)
    write_settings(bundle, SessionSettings(**found["settings"]), found["measured"])
    return found


def tune_task(path: Path, request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """The measuring process's part; `request`: the fields of a Workload."""
    bundle, work = open_bundle(path), Workload(**request)
    best = SessionSettings(threads=default_threads(bundle))
    words: list[tuple[str, Sequence[Any]]] = [
        ("threads", range(best.threads, 0, -1)),
        ("spinning", (True, False)),
        ("prefill_chunk", [c for c in CHUNKS if c < work.prompt_tokens or c == CHUNKS[0]]),
    ]
    total = ROUNDS * sum(len(values) for _, values in words)
    measured: list[dict[str, Any]] = []
    done = 0
    for word, values in words:
        candidates = [dataclasses.replace(best, **{word: value}) for value in values]
        times: list[list[float]] = [[] for _ in candidates]
        for _ in range(ROUNDS):
            for candidate, seen in zip(candidates, times, strict=True):
                seen.append(_workload_s(bundle, candidate, work))
                done += 1
                emit(done, total, "runs")
        medians = [statistics.median(seen) for seen in times]
        measured += [
            {**dataclasses.asdict(c), "word": word, "workload_ms": round(1e3 * median, 3)}
            for c, median in zip(candidates, medians, strict=True)
        ]
        fastest = int(np.argmin(medians))
        if medians[fastest] < (1 - MARGIN) * medians[0]:
            best = candidates[fastest]
    return {"settings": dataclasses.asdict(best), "measured": measured}


def _workload_s(bundle: Bundle, settings: SessionSettings, work: Workload) -> float:
    """Seconds of prompt and decode under `settings`, warm."""
    backend = open_with(bundle, settings)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, backend.facts.vocab_size, (work.batch_size, work.prompt_tokens))
    generate_once(backend, prompt, 2)
    run = generate_once(backend, prompt, work.new_tokens)
    return (run.first_ms + sum(run.inter_ms)) / 1e3
