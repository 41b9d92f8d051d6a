"""How fast and how large torch checkpoints are on this machine, each measured in a process of its own.

`python -m edgestill.compress.torch_speed` reads {"models": [[path, precision], ...], "prompt_tokens", "new_tokens", "threads"}
from stdin and prints a JSON list. The same workload as the artifact's (runtime/measure.py): greedy, batch 1, prompts that never
repeat, warm-up runs named and left out. This is the column the verdict table shows beside the artifact.

The libraries are imported once and every model is measured in a fork of that process: a fork starts with its own peak memory
(the kernel sets the high-water mark of a copy to its present size), so peaks do not mix and the import is paid once.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgestill.runtime.errors import BadInput

WARM_UP_RUNS = 2
RUNS = 8


@dataclass(frozen=True)
class TorchSpeed:
    """Medians over `runs`; memory is the peak of the whole process, torch included."""

    first_token_ms_p50: float
    inter_token_ms_p50: float
    decode_tokens_per_s: float
    peak_rss_mib: float
    prompt_tokens: int
    new_tokens: int
    runs: int
    warm_up_runs: int
    threads: int
    precision: str
    device: str


def measure_apart(
    models: Sequence[tuple[Path, str]], *, prompt_tokens: int, new_tokens: int, threads: int
) -> list[TorchSpeed]:
    """Measure (checkpoint, precision) pairs, each in a fresh process.

    Raises:
        BadInput: a process failed; its last line of output is in the message.
    """
    request = {
        "models": [[str(path), precision] for path, precision in models],
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "threads": threads,
    }
    command = [sys.executable, "-m", "edgestill.compress.torch_speed"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BadInput(f"the checkpoints could not be measured with torch (exit {done.returncode}): {last}")
    return [TorchSpeed(**found) for found in json.loads(done.stdout.splitlines()[-1])]


def measure(model_path: Path, precision: str, *, prompt_tokens: int, new_tokens: int, threads: int) -> TorchSpeed:
    """Measure in this process."""
    import numpy as np
    import psutil
    import torch

    from edgestill.compress.low_rank import load_student

    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    model: Any = load_student(model_path, dtype).to(device)
    rng = np.random.default_rng(0)
    first: list[float] = []
    between: list[float] = []
    with torch.inference_mode():
        for run in range(WARM_UP_RUNS + RUNS):
            ids = torch.from_numpy(rng.integers(0, model.config.vocab_size, (1, prompt_tokens))).to(device)
            started = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            token.cpu()
            stamps = [time.perf_counter()]
            for _ in range(new_tokens - 1):
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
                token.cpu()
                stamps.append(time.perf_counter())
            if run >= WARM_UP_RUNS:
                first.append((stamps[0] - started) * 1e3)
                between += [(b - a) * 1e3 for a, b in itertools.pairwise(stamps)]
    memory = psutil.Process().memory_info()
    peak = _peak_rss_bytes() or memory.rss
    inter = float(np.median(between))
    return TorchSpeed(
        round(float(np.median(first)), 3),
        round(inter, 3),
        round(1e3 / inter, 1),
        round(peak / 2**20, 1),
        prompt_tokens,
        new_tokens,
        RUNS,
        WARM_UP_RUNS,
        threads,
        precision,
        str(device),
    )


def _peak_rss_bytes() -> int | None:
    """VmHWM of this process, where the system has it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _in_a_fork(path: str, precision: str, request: dict[str, int]) -> TorchSpeed:
    """`measure` in a copy of this process, which ends with it.

    Raises:
        ChildProcessError: the copy died; what it said is on stderr.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            found = measure(Path(path), precision, **request)
            with os.fdopen(write, "w") as out:
                json.dump(asdict(found), out)
            status = 0
        finally:
            os._exit(status)  # nothing of the parent's clean-up may run twice
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise ChildProcessError(f"measuring {path} ended with status {os.waitstatus_to_exitcode(status)}")
    return TorchSpeed(**json.loads(text))


def main() -> None:
    """The child's entry."""
    import psutil  # noqa: F401  (imported here so that every fork has it)
    import torch  # noqa: F401

    import edgestill.compress.low_rank  # noqa: F401

    request = json.load(sys.stdin)
    models = request.pop("models")
    found = [asdict(_in_a_fork(path, precision, request)) for path, precision in models]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
