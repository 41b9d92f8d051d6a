"""One workload, run and timed inside the measuring process: load, named warm-up, generations, loads again.

What is timed is what a user waits for: the state of a generation, the graph and the choice of the token (greedy). Prompts are
held-out tokens in a random order, another one for every run, so that nothing a run leaves behind helps the next.
"""

from __future__ import annotations

import gc
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgestill.runtime.backends import Backend, prefill_last
from edgestill.runtime.bundle import read_manifest
from edgestill.runtime.child import Emit
from edgestill.runtime.energy import Counter, open_counter
from edgestill.runtime.engines.flavour import on_gpu
from edgestill.runtime.errors import BadInput
from edgestill.runtime.gpu import open_gpu, open_gpu_energy, watched_gpu, watched_memory
from edgestill.runtime.gpu_watch import GpuWatch
from edgestill.runtime.manifest import ModelFacts
from edgestill.runtime.reference import FOLDER, HELD_OUT
from edgestill.runtime.statistics import MIN_TAIL_SAMPLES

if TYPE_CHECKING:
    from edgestill.runtime.model import Model

WARM_UP_RUNS = 2
MIN_RUNS = 5
"""The median of fewer runs has no 95 % bound."""
BUDGET_S = 20.0
FIRST_TOKENS = ((0.025, 300), (0.1, MIN_TAIL_SAMPLES))
"""(seconds, samples): a first token cheaper than this is sampled so often, at most 10 s in all, even where whole generations are
too slow for that. The upper bound of a p95 is the second largest of 100 samples, but the ninth largest of 300."""
RSS_PERIOD_S = 0.02
LOADS = 5
LOAD_BUDGET_S = 10.0
MIB = 1 << 20

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Workload:
    """What is generated, and how often (`repeats` None: as often as a time-box of about 20 s allows, at least 5)."""

    prompt_tokens: int
    new_tokens: int
    batch_size: int
    threads: int
    repeats: int | None = None


def check_workload(work: Workload, model: ModelFacts) -> None:
    """Refuse a workload that the model cannot run.

    Raises:
        BadInput: a count is too small, or prompt and new tokens exceed the model's length.
    """
    if work.prompt_tokens < 1 or work.new_tokens < 2 or work.batch_size < 1 or work.threads < 1:
        raise BadInput(f"{work}: needs at least 1 prompt token, 2 new tokens, batch 1, 1 thread")
    length = work.prompt_tokens + work.new_tokens
    if length > model.max_tokens:
        raise BadInput(
            f"{work.prompt_tokens} prompt + {work.new_tokens} new tokens = {length} exceed the model's {model.max_tokens}; "
            "lower prompt_tokens or new_tokens"
        )


@dataclass(frozen=True)
class Run:
    """One generation. Times in ms; `joules` is what the decode window of `decode_s` seconds drew, None without a counter."""

    first_ms: float
    inter_ms: list[float]
    joules: float | None
    decode_s: float


class RssSampler:
    """Resident memory of this process over time, sampled by a thread (about 20 microseconds every 20 ms)."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stop = threading.Event()
        self.points: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def now(self) -> float:
        """Seconds since the sampler started."""
        return time.perf_counter() - self._start

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(RSS_PERIOD_S):
            self.points.append((round(self.now(), 3), round(resident_mib(), 2)))


def resident_mib() -> float:
    """Resident memory of this process now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB
    import psutil

    return float(psutil.Process().memory_info().rss) / MIB


def peak_resident_mib() -> float | None:
    """Highest resident memory of this process so far (VmHWM).

    ru_maxrss is not used on Linux: a process inherits it from its parent through exec, so a large parent would be reported.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return None


def plan_runs(first_s: float, step_s: float, work: Workload) -> tuple[int, int]:
    """(whole generations, further first tokens) for a time-box of BUDGET_S, from the warm-up's times."""
    if work.repeats is not None:
        return work.repeats, 0
    generation = first_s + (work.new_tokens - 1) * step_s
    wanted = next((samples for cheaper_than, samples in FIRST_TOKENS if first_s < cheaper_than), 0)
    whole = int((BUDGET_S - wanted * first_s) / max(generation, 1e-9))
    whole = min(max(whole, MIN_RUNS), MIN_TAIL_SAMPLES)
    return whole, max(wanted - whole, 0)


def prompts(bundle: Path, work: Workload, vocab_size: int, seed: int = 0) -> Iterator[I64]:
    """Endless prompts int64 [B, prompt_tokens], never the same twice in a row.

    Stretches of the held-out tokens, permuted; random tokens without a reference.
    """
    rng = np.random.default_rng(seed)
    held_out = bundle / FOLDER / HELD_OUT
    tokens: npt.NDArray[np.integer] | None = None
    if held_out.is_file():
        from safetensors import safe_open

        # only the ids: the answers would count as the workload's memory
        with safe_open(held_out, framework="numpy") as handle:
            tokens = handle.get_tensor("token_ids").reshape(-1)
    shape = (work.batch_size, work.prompt_tokens)
    before: I64 | None = None
    while True:
        if tokens is None:
            prompt = rng.integers(0, vocab_size, shape, dtype=np.int64)
        else:
            starts = rng.integers(0, len(tokens), work.batch_size)
            rows = tokens[(starts[:, None] + np.arange(work.prompt_tokens)) % len(tokens)]
            prompt = rng.permuted(rows, axis=1).astype(np.int64)
        if before is not None and np.array_equal(prompt, before):  # happens to prompts of one or two tokens
            prompt[:, 0] = (prompt[:, 0] + 1) % vocab_size
        before = prompt
        yield prompt


def generate_once(backend: Backend, prompt: I64, new_tokens: int, counter: Counter | None = None) -> Run:
    """Prompt int64 [B, n] to `new_tokens` greedy tokens; `new_tokens` 1 stops at the first."""
    start = time.perf_counter()
    state = backend.new_state(prompt.shape[0], prompt.shape[1] + new_tokens)
    token = prefill_last(backend, state, prompt).argmax(axis=-1)[:, None]
    begin = before = time.perf_counter()
    energy = counter.joules() if counter is not None else 0.0
    inter: list[float] = []
    for _ in range(new_tokens - 1):
        token = backend.step(state, token, keep=1)[:, 0].argmax(axis=-1)[:, None]
        now = time.perf_counter()
        inter.append((now - before) * 1e3)
        before = now
    joules = counter.joules() - energy if counter is not None and inter else None
    return Run((begin - start) * 1e3, inter, joules, time.perf_counter() - begin)


def run_workload(bundle: Path, work: Workload, emit: Emit) -> dict[str, Any]:
    """Everything the measuring process finds out, as JSON-able samples (ms, MiB, J, s)."""
    import onnxruntime  # noqa: F401  (outside the timer: its import happens once per process, loads happen often)
    import tokenizers  # noqa: F401

    import edgestill.runtime as runtime

    gpu_engine = on_gpu(read_manifest(bundle).engine)
    gpu = open_gpu() if gpu_engine else None
    device = watched_memory(gpu) if gpu_engine else None
    watch, sampler = GpuWatch(watched_gpu(gpu) if gpu_engine else None, device), RssSampler()
    load_ms, model = _timed_load(runtime.load, bundle, work.threads)
    compile_before_measuring(model.backend)
    phases = [(round(sampler.now(), 3), "loaded")]
    check_workload(work, model.facts)
    counter: Counter | str = open_gpu_energy(gpu) if gpu_engine else open_counter()
    meter = None if isinstance(counter, str) else counter
    idle = meter.idle_watts() if meter is not None else 0.0
    source = prompts(bundle, work, model.facts.vocab_size)
    warm_up = [generate_once(model.backend, next(source), work.new_tokens) for _ in range(WARM_UP_RUNS)]
    phases.append((round(sampler.now(), 3), "warm"))
    last = warm_up[-1]
    whole, extra = plan_runs(last.first_ms / 1e3, float(np.median(last.inter_ms)) / 1e3, work)
    runs: list[Run] = []
    first_only: list[float] = []
    watch.begin()
    for i in range(whole):
        with watch.timed():
            runs.append(generate_once(model.backend, next(source), work.new_tokens, meter))
            # spread over the generations, so that both see the same heat
            for _ in range(math.ceil(extra * (i + 1) / whole) - len(first_only)):
                first_only.append(generate_once(model.backend, next(source), 1).first_ms)
        watch.look()
        emit(i + 1, whole, "runs")
    watch.end()
    peak = peak_resident_mib()
    sampler.stop()
    session = model.backend.session
    del model
    loads = [load_ms, *_loads_again(runtime.load, bundle, work.threads, load_ms)]
    return {
        "load_ms": loads,
        "session": session,
        "warm_up": [
            {"first_token_ms": run.first_ms, "inter_token_ms": float(np.median(run.inter_ms))} for run in warm_up
        ],
        "first_token_ms": [run.first_ms for run in runs] + first_only,
        "inter_token_ms": [run.inter_ms for run in runs],
        "energy_j": [run.joules for run in runs] if meter is not None else None,
        "decode_s": [run.decode_s for run in runs],
        "energy_reason": counter if isinstance(counter, str) else None,
        "energy_of": None if meter is None else meter.what,
        "idle_watts": idle if meter is not None else None,
        "peak_rss_mib": peak,
        "peak_device_mib": None if device is None else device.peak_mib,
        "device_reason": None if device is None else device.reason,
        "gpu": watch.found(),
        "rss": sampler.points,
        "phases": phases,
    }


def compile_before_measuring(backend: Backend) -> None:
    """Have an engine's kernels ready before they are timed, not some steps later."""
    from edgestill.runtime.backends.tensorrt import TensorRTBackend

    if isinstance(backend, TensorRTBackend):
        backend.compile_first()


def _timed_load(load: Any, bundle: Path, threads: int) -> tuple[float, Model]:
    """(ms, model): opening the bundle with every check on."""
    start = time.perf_counter()
    model: Model = load(bundle, verify=True, threads=threads)
    return (time.perf_counter() - start) * 1e3, model


def _loads_again(load: Any, bundle: Path, threads: int, first_ms: float) -> list[float]:
    """Further load times, after the peak was read (two models at once would be in it), within LOAD_BUDGET_S."""
    count = min(LOADS - 1, int(LOAD_BUDGET_S * 1e3 / max(first_ms, 1e-3)))
    samples: list[float] = []
    for _ in range(count):
        gc.collect()
        samples.append(_timed_load(load, bundle, threads)[0])
    return samples
