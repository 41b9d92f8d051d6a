"""The process that measures: `python -m edgestill.runtime.measuring_process BUNDLE --task T --request JSON --out FILE`.

It writes its samples to FILE as JSON (`{"error": line}` for a known error) and its progress to stdout (child.py reads both).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.child import Emit, emit_line
from edgestill.runtime.errors import EdgestillError
from edgestill.runtime.quality import measure_quality
from edgestill.runtime.reference import FOLDER, HELD_OUT, PARITY, load_parity, load_reference
from edgestill.runtime.sweep import sweep_task
from edgestill.runtime.tune import tune_task
from edgestill.runtime.workload import Workload, run_workload


def resources_task(bundle: Path, request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Samples of the workload whose fields are `request`."""
    return run_workload(bundle, Workload(**request), emit)


def quality_task(bundle: Path, request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Estimates by metric name, the table beside the teachers and the paths' differences; `request`: {"threads": int}."""
    from edgestill.runtime import load, open_bundle

    opened = open_bundle(bundle)
    reference = load_reference(opened.path(f"{FOLDER}/{HELD_OUT}").parent)
    model = load(bundle, verify=True, threads=request["threads"])
    V = model.facts.vocab_size
    parity = (np.zeros((0, 2), np.int32), np.zeros((0, V), np.float32))
    if f"{FOLDER}/{PARITY}" in opened:
        parity = load_parity(opened.path(f"{FOLDER}/{PARITY}").parent)
    done, total = 0, 2 * reference.token_ids.size

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        emit(done, total, "tokens")

    estimates, beside, paths = measure_quality(model, reference, parity, V, advance)
    rows = {name: dataclasses.asdict(estimate) for name, estimate in estimates.items()}
    return {"estimates": rows, "beside": beside, "paths": paths}


def engine_task(bundle: Path, request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Build the engine of `bundle` for the card at hand, or `ahead` for another; `request`: compute_capability, ahead, verify."""
    from edgestill.runtime import open_bundle
    from edgestill.runtime.engines.cuda import Cuda
    from edgestill.runtime.engines.flavour import open_library
    from edgestill.runtime.engines.opening import target_ahead, target_here
    from edgestill.runtime.engines.plan import plan_of
    from edgestill.runtime.engines.store import build_engine

    opened = open_bundle(bundle, verify=request["verify"])
    library = open_library(plan_of(opened.manifest).flavour)
    ahead = request["ahead"]
    target = target_ahead(opened, request["compute_capability"]) if ahead else target_here(Cuda().card())
    return build_engine(opened, library, target, emit).record


TASKS = {
    "resources": resources_task,
    "quality": quality_task,
    "sweep": sweep_task,
    "tune": tune_task,
    "engine": engine_task,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one task; a known error is a result too, anything else ends the process with its traceback."""
    parser = argparse.ArgumentParser(prog="python -m edgestill.runtime.measuring_process")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--task", choices=tuple(TASKS), required=True)
    parser.add_argument("--request", type=json.loads, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        result = TASKS[given.task](given.bundle, given.request, emit_line)
    except EdgestillError as known:
        result = {"error": str(known)}
    given.out.write_text(json.dumps(result, allow_nan=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
