"""`edgestill bench --sweep`: latency over batch, prompt length and cache depth, of one bundle or of several in turn.

    first token     prompt to first token, per (batch, prompt length)
    between tokens  a decode step with so many tokens in the cache, per (batch, depth)

Each cell is a median over runs with its bounds; warm-up runs are made and left out. Each bundle is measured in a process of its
own. Prompts and depths that a model is too short for are left out. A batch beyond what an engine was built for runs in several
turns, and its cells are marked.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.backends import Backend, prefill_last
from edgestill.runtime.bundle import read_manifest
from edgestill.runtime.child import Emit, run_child
from edgestill.runtime.device import conditions, environment
from edgestill.runtime.engines.flavour import is_engine, on_gpu
from edgestill.runtime.engines.plan import plan_of
from edgestill.runtime.errors import BadInput
from edgestill.runtime.gpu import open_gpu, watched_gpu
from edgestill.runtime.gpu_watch import GpuWatch
from edgestill.runtime.manifest import Manifest, ModelFacts
from edgestill.runtime.progress import Progress
from edgestill.runtime.statistics import Estimate, median
from edgestill.runtime.workload import compile_before_measuring

PROMPTS = (16, 64, 128, 256, 512, 1024, 2048)
DEPTHS = PROMPTS
BATCHES = (1,)
WARM_UP, RUNS = 2, 9
STEPS = 16
"""Decode steps of one run at a depth."""


@dataclass(frozen=True)
class Grid:
    """What is swept; empty: what the model has room for."""

    batches: tuple[int, ...] = BATCHES
    prompts: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()

    def cells(self, facts: ModelFacts) -> list[tuple[str, int, int]]:
        """("prompt" or "depth", batch, tokens) that fit into the model."""
        longest = facts.max_tokens
        prompts = [n for n in self.prompts or PROMPTS if n < longest]
        depths = [n for n in self.depths or DEPTHS if n + STEPS + WARM_UP <= longest]
        return [("prompt", b, n) for b in self.batches for n in prompts] + [
            ("depth", b, n) for b in self.batches for n in depths
        ]


def sweep_bundles(bundles: list[Path], grid: Grid, progress: Progress | None = None) -> dict[str, Any]:
    """Measure each bundle over `grid`: {"environment", "rows": one per bundle and cell, "engines"}.

    Raises:
        BadInput: two bundles of one name, or nothing in the grid fits.
        MeasurementFailed: a measuring process gave no result.
    """
    names = [label_of(path) for path in bundles]
    if len(set(names)) != len(names):
        raise BadInput(f"two bundles are called {next(n for n in names if names.count(n) > 1)}; give each once")
    manifests = [read_manifest(path) for path in bundles]
    surroundings = environment(", ".join(dict.fromkeys(manifest.engine for manifest in manifests)))
    rows: list[dict[str, Any]] = []
    engines: dict[str, Any] = {}
    for name, path, manifest in zip(names, bundles, manifests, strict=True):
        cells = grid.cells(manifest.model)
        if not cells:
            raise BadInput(
                f"{path}: no prompt or depth of the sweep fits into {manifest.model.max_tokens} tokens; give smaller ones"
            )
        threads = int(manifest.profile.get("device", {}).get("threads", 1))
        found = run_child("sweep", path, {"cells": cells, "threads": threads}, f"sweep of {name}", progress)
        most = plan_of(manifest).max_batch if is_engine(manifest.engine) else None
        engines[name] = {
            "engine": manifest.engine,
            "session": found["session"],
            "precision": dataclasses.asdict(manifest.precision),
            "max_batch": most,
            "gpu": found["gpu"],
        }
        rows += [{"bundle": name, **_about(manifest, most, row["batch"]), **row} for row in found["rows"]]
    surroundings["end"] = conditions()
    return {"environment": surroundings, "engines": engines, "rows": rows}


def _about(manifest: Manifest, max_batch: int | None, batch: int) -> dict[str, Any]:
    """What a row says beside its numbers: precision, and in how many turns an engine runs a batch that is too large for it."""
    turns = 1 if max_batch is None else -(-batch // max_batch)
    return {"precision": manifest.precision.weights, "turns": turns}


def label_of(bundle: Path) -> str:
    """Engine and precision of a bundle behind its name."""
    manifest = read_manifest(bundle)
    return f"{manifest.name} ({manifest.engine} {manifest.precision.weights})"


def sweep_task(bundle: Path, request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """The measuring process's part."""
    from edgestill.runtime import load

    model = load(bundle, threads=request["threads"])
    compile_before_measuring(model.backend)
    watch = GpuWatch(watched_gpu(open_gpu()) if on_gpu(read_manifest(bundle).engine) else None)
    rows = []
    for done, (kind, batch, tokens) in enumerate(request["cells"]):
        measure = prompt_ms if kind == "prompt" else depth_ms
        with watch.timed():
            times = measure(model.backend, batch, tokens)
        rows.append(_row(kind, batch, tokens, times))
        if not done:  # behind the first cell, so that the card is warm
            watch.begin()
        emit(done + 1, len(request["cells"]), "cells")
    watch.end()
    return {"session": model.backend.session, "rows": rows, "gpu": watch.found()}


def prompt_ms(backend: Backend, batch: int, tokens: int) -> list[float]:
    """Milliseconds from a prompt to its first token, one per run."""
    rng = np.random.default_rng(0)
    times = []
    for run in range(WARM_UP + RUNS):
        prompt = rng.integers(0, backend.facts.vocab_size, (batch, tokens))
        start = time.perf_counter()
        state = backend.new_state(batch, tokens + 1)
        prefill_last(backend, state, prompt).argmax(axis=-1)
        took = (time.perf_counter() - start) * 1e3
        del state  # now: beside the next one it would make an engine allocate a second cache inside its time
        if run >= WARM_UP:
            times.append(took)
    return times


def depth_ms(backend: Backend, batch: int, tokens: int) -> list[float]:
    """Milliseconds of decode steps behind `tokens` tokens, one median per run."""
    rng = np.random.default_rng(0)
    state = backend.new_state(batch, tokens + STEPS + WARM_UP)
    prefill_last(backend, state, rng.integers(0, backend.facts.vocab_size, (batch, tokens)))
    times = []
    for run in range(WARM_UP + RUNS):
        if backend.rewinds and run:
            backend.rewind(state, tokens)
        elif run:
            del state
            state = backend.new_state(batch, tokens + STEPS + WARM_UP)
            prefill_last(backend, state, rng.integers(0, backend.facts.vocab_size, (batch, tokens)))
        token = rng.integers(0, backend.facts.vocab_size, (batch, 1))
        steps = []
        for _ in range(STEPS):
            start = time.perf_counter()
            token = backend.step(state, token, keep=1)[:, 0].argmax(axis=-1)[:, None]
            steps.append((time.perf_counter() - start) * 1e3)
        if run >= WARM_UP:
            times.append(float(np.median(steps)))
    return times


def _row(kind: str, batch: int, tokens: int, times: list[float]) -> dict[str, Any]:
    found: Estimate = median(np.array(times))
    assert found.value is not None
    rate = batch * (tokens if kind == "prompt" else 1) * 1e3 / found.value
    return {
        "kind": kind,
        "batch": batch,
        "tokens": tokens,
        "ms": round(found.value, 4),
        "ms_lower": found.lower if found.lower is None else round(found.lower, 4),
        "ms_upper": found.upper if found.upper is None else round(found.upper, 4),
        "tokens_per_s": round(rate, 1),
        "runs": len(times),
    }


def torch_rows(speeds: list[dict[str, Any]], checkpoint: str) -> list[dict[str, Any]]:
    """Rows of the torch student beside the bundles, from what compress/torch_speed.py measured."""
    rows = []
    for speed in speeds:
        prompt = speed["prompt_tokens"]
        how = f"torch {speed['precision']}" + (", CUDA graphs" if speed["compiled"] else "")
        for kind, tokens, ms in (
            ("prompt", prompt, speed["first_token_ms_p50"]),
            ("depth", prompt, speed["inter_token_ms_p50"]),
        ):
            about = {"bundle": f"{checkpoint} ({how})", "precision": speed["precision"], "turns": 1}
            rows.append({**about, **_row(kind, 1, tokens, [ms]), "runs": speed["runs"]})
    return rows


# ---------------------------------------------------------------------------------------------------------------- to see


def table_lines(result: dict[str, Any]) -> list[str]:
    """The sweep as text, 80 columns wide: one block per kind and batch, one column per bundle."""
    rows, lines = result["rows"], []
    names = list(dict.fromkeys(row["bundle"] for row in rows))
    letters = {name: chr(ord("A") + i) for i, name in enumerate(names)}
    lines += [f"{letter}  {name}" for name, letter in letters.items()]
    for kind, title in (("prompt", "first token, ms"), ("depth", "between tokens, ms")):
        for batch in sorted({row["batch"] for row in rows if row["kind"] == kind}):
            some = [row for row in rows if (row["kind"], row["batch"]) == (kind, batch)]
            lines += ["", f"{title}, batch {batch}"]
            lines.append(f"{kind + ' tokens':>14}" + "".join(f"{letters[n]:>11} {'tokens/s':>10}" for n in names))
            for tokens in sorted({row["tokens"] for row in some}):
                cells = {row["bundle"]: row for row in some if row["tokens"] == tokens}
                lines.append(f"{tokens:>14,}" + "".join(_cell(cells.get(name)) for name in names))
    if any(row["turns"] > 1 for row in rows):
        lines += [
            "",
            "*  a batch beyond the engine's largest, the profile's: it runs in turns",
        ]
    return lines


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return f"{'–':>11} {'–':>10}"
    ms = f"{row['ms']:.3f}{'*' if row['turns'] > 1 else ''}"
    return f"{ms:>11} {row['tokens_per_s']:>10,.0f}"


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Both families of curves as a picture, with the bounds as bands.

    Raises:
        MissingPart: matplotlib is not installed.
    """
    from edgestill.runtime.plots import COLOURS, style

    with style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2)
        curves = list(dict.fromkeys((row["bundle"], row["batch"]) for row in result["rows"]))
        for axes, (kind, title) in zip(
            panels,
            (("prompt", "first token, ms, by prompt length"), ("depth", "between tokens, ms, by cache depth")),
            strict=True,
        ):
            for i, (name, batch) in enumerate(curves):
                some = [r for r in result["rows"] if (r["bundle"], r["batch"], r["kind"]) == (name, batch, kind)]
                x, y = [r["tokens"] for r in some], [r["ms"] for r in some]
                turns = max((r["turns"] for r in some), default=1)
                label = f"{name}, batch {batch}" + (f" in {turns} turns" if turns > 1 else "")
                axes.plot(x, y, "o-", ms=3, color=COLOURS[i % len(COLOURS)], label=label)
                if all(r["ms_lower"] is not None and r["ms_upper"] is not None for r in some):
                    low, high = [r["ms_lower"] for r in some], [r["ms_upper"] for r in some]
                    axes.fill_between(x, low, high, color=COLOURS[i % len(COLOURS)], alpha=0.15, lw=0)
            axes.set_title(title, fontsize=9, loc="left")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_ylim(bottom=0)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", fontsize=7, ncols=1)
        figure.savefig(path, dpi=150)
