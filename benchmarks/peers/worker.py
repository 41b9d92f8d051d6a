"""One peer in a process of its own, in the interpreter that has its packages: needs numpy and that peer, not edgestill.

    worker.py versions NAME...                 what is installed, as JSON
    worker.py convert NAME CHECKPOINT FOLDER   make FOLDER
    worker.py turns NAME FOLDER JOB            stay loaded; one cell of JOB per "go" on stdin, answered with a line of JSON
    worker.py fresh NAME FOLDER JOB            load, two first tokens, one generation, and what memory that took

JOB is JSON: {"threads", "vocab_size", "max_tokens", "seed", "new_tokens", "first_token_prompt", "cells": [[batch, depth], ...]}.
The prompt of the t-th turn depends on seed and t only, so every peer gets the same, and no two turns get the same.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import by_name, driver, installed

sys.path.append(str(Path(__file__).parents[1]))  # replies.py serves all benchmarks

from replies import Replies

if TYPE_CHECKING:
    from engine import I64, Engine

FRESH_TOKENS = 512
"""Cache of the generation whose peak memory is measured."""


def prompt(job: Mapping[str, Any], turn: int, batch: int, tokens: int) -> I64:
    """int64 [batch, tokens], the same for every peer."""
    import numpy as np

    rng = np.random.default_rng([job["seed"], turn])
    return rng.integers(0, job["vocab_size"], (batch, tokens), dtype=np.int64)


def generation(engine: Engine, ids: I64, new_tokens: int) -> dict[str, Any]:
    """Seconds of prompt and of further tokens; the tokens. Counts are checked, so nobody stops early.

    Raises:
        ValueError: the engine gave another number of tokens.
    """
    start = time.perf_counter()
    first = engine.prefill(ids, new_tokens)
    middle = time.perf_counter()
    further = engine.decode(new_tokens) if new_tokens else None
    end = time.perf_counter()
    wanted = (len(ids), new_tokens)
    if first.shape != wanted[:1] or (further is not None and further.shape != wanted):
        found = None if further is None else further.shape
        raise ValueError(f"{first.shape} first and {found} further tokens instead of {wanted}")
    rows = (
        first[:, None].tolist()
        if further is None
        else [[f, *r] for f, r in zip(first.tolist(), further.tolist(), strict=True)]
    )
    return {"prefill_s": middle - start, "decode_s": end - middle, "tokens": rows}


def serve(replies: Replies, engine: Engine, job: Mapping[str, Any]) -> None:
    """A cell per turn, round and round, the first token's after the others."""
    cells = [*job["cells"], (1, job["first_token_prompt"])]
    replies.say({"ready": True})
    before = time.process_time()
    for turn in replies.turns():
        waiting = time.process_time() - before
        batch, depth = cells[turn % len(cells)]
        new_tokens = job["new_tokens"] if turn % len(cells) < len(job["cells"]) else 0
        facts = generation(engine, prompt(job, turn, batch, depth), new_tokens)
        before = time.process_time()
        replies.say({**facts, "cpu_s_while_waiting": waiting})


def opened(name: str, folder: Path, job: Mapping[str, Any], batch: int, tokens: int) -> tuple[Engine, float, float]:
    """(engine, seconds of imports, seconds of opening the model)."""
    peer = by_name(name)
    start = time.perf_counter()
    module = driver(peer)
    module.imports()
    middle = time.perf_counter()
    engine: Engine = module.load(folder, job["threads"], batch, tokens, peer.variant)
    return engine, middle - start, time.perf_counter() - middle


def fresh(name: str, folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """What a process that does nothing else sees."""
    short = job["first_token_prompt"]
    tokens = min(FRESH_TOKENS, job["max_tokens"])
    depth = tokens - job["new_tokens"]
    engine, import_s, load_s = opened(name, folder, job, 1, max(tokens, short + 1))
    first, second = (generation(engine, prompt(job, turn, 1, short), 0)["prefill_s"] for turn in range(2))
    generation(engine, prompt(job, 2, 1, depth), job["new_tokens"])
    return {
        "import_s": import_s,
        "load_s": load_s,
        "first_token_of_first_prompt_s": first,
        "first_token_of_second_prompt_s": second,
        "peak_rss_mib": peak_rss_mib(),
    }


def peak_rss_mib() -> float:
    """Highest resident memory of this process; ru_maxrss only where there is no /proc, for it outlives an exec."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    """Do what the first argument says."""
    replies = Replies()
    task, *words = sys.argv[1:]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if task == "versions":
        replies.say({name: installed(by_name(name)) for name in words})
        return
    name, *rest = words
    if task == "convert":
        checkpoint, folder = map(Path, rest)
        driver(by_name(name)).convert(checkpoint, folder, by_name(name).variant)
        files = driver(by_name(name)).model_files(folder)
        replies.say({"files": {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}})
        return
    folder, job = Path(rest[0]), json.loads(rest[1])
    os.environ["OMP_NUM_THREADS"] = str(job["threads"])  # before any library reads it
    if task == "fresh":
        replies.say(fresh(name, folder, job))
        return
    batch = max(batch for batch, _ in job["cells"])
    longest = max(max(depth for _, depth in job["cells"]) + job["new_tokens"], job["first_token_prompt"])
    engine, _, _ = opened(name, folder, job, batch, longest + 1)
    serve(replies, engine, job)


if __name__ == "__main__":
    main()
