"""How fast and how large torch checkpoints are on this machine, each measured in a process of its own.

`python -m edgestill.compress.torch_speed` reads {"models": [[path, precision], ...], "prompt_tokens", "new_tokens", "threads",
"compiled"} from stdin and prints a JSON list. The same workload as the artifact's (runtime/measure.py): greedy, batch 1, prompts
that never repeat, warm-up runs named and left out. This is the column the verdict table shows beside the artifact.

The libraries are imported once and every model is measured in a fork of that process: a fork starts with its own peak memory
(the kernel sets the high-water mark of a copy to its present size), so peaks do not mix and the import is paid once. Not so
compiled models, since the workers of torch.compile hang in a fork: give each a call of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
    compiled: bool
    """Whether decode steps ran under torch.compile with CUDA graphs over a cache of fixed length."""


def on_cuda() -> bool:
    """Whether torch has a CUDA device here, on which `measure` runs."""
    import torch

    return torch.cuda.is_available()


def measure_apart(
    models: Sequence[tuple[Path, str]], *, prompt_tokens: int, new_tokens: int, threads: int, compiled: bool = False
) -> list[TorchSpeed]:
    """Measure (checkpoint, precision) pairs, each in a fresh process; `compiled`: with CUDA graphs, on a CUDA device.

    Raises:
        BadInput: a process failed; its last line of output is in the message.
    """
    request = {
        "models": [[str(path), precision] for path, precision in models],
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "threads": threads,
        "compiled": compiled,
    }
    command = [sys.executable, "-m", "edgestill.compress.torch_speed"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BadInput(f"the checkpoints could not be measured with torch (exit {done.returncode}): {last}")
    return [TorchSpeed(**found) for found in json.loads(done.stdout.splitlines()[-1])]


def measure(
    model_path: Path, precision: str, *, prompt_tokens: int, new_tokens: int, threads: int, compiled: bool = False
) -> TorchSpeed:
    """Measure in this process."""
    import numpy as np
    import psutil
    import torch

    from edgestill.compress.low_rank import load_student

    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    model: Any = load_student(model_path, dtypes.get(precision, torch.bfloat16)).to(device)
    rng = np.random.default_rng(0)
    first: list[float] = []
    between: list[float] = []
    length = prompt_tokens + new_tokens
    decoder = FixedCache(model, length, torch.compile(mode="reduce-overhead")) if compiled else GrowingCache(model)
    with torch.inference_mode(not compiled), torch.no_grad():  # a compiled graph takes no inference tensors
        for run in range(WARM_UP_RUNS + RUNS):
            ids = torch.from_numpy(rng.integers(0, model.config.vocab_size, (1, prompt_tokens))).to(device)
            started = time.perf_counter()
            token = decoder.prefill(ids)
            token.cpu()
            stamps = [time.perf_counter()]
            for _ in range(new_tokens - 1):
                token = decoder.step(token)
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
        compiled,
    )


class GrowingCache:
    """Greedy decoding as transformers does it by default: the cache grows with every token."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, None

    def prefill(self, ids: Any) -> Any:
        """The first token int64 [1, 1] behind the prompt `ids` [1, n]."""
        self._cache = None
        return self._forward(ids)

    def step(self, token: Any) -> Any:
        """The token behind `token` [1, 1]."""
        return self._forward(token)

    def _forward(self, ids: Any) -> Any:
        out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return out.logits[:, -1:].argmax(-1)


class FixedCache:
    """Greedy decoding over a cache of fixed length, so that every step has the same shapes and addresses and can be compiled.

    The prompt runs as it is: what torch.compile with CUDA graphs is for is the step.
    """

    def __init__(self, model: Any, length: int, compile_step: Callable[[Any], Any]) -> None:
        from transformers import StaticCache

        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self._step = compile_step(self._forward)
        self._position: Any = None

    def prefill(self, ids: Any) -> Any:
        """The first token int64 [1, 1] behind the prompt `ids` [1, n]."""
        import torch

        self._cache.reset()
        self._position = torch.tensor([ids.shape[1]], device=ids.device)
        return self._forward(ids, torch.arange(ids.shape[1], device=ids.device))

    def step(self, token: Any) -> Any:
        """The token behind `token` [1, 1]."""
        import torch

        compiler: Any = torch.compiler  # parts of it have no types
        compiler.cudagraph_mark_step_begin()
        found = self._step(token, self._position).clone()  # the graph writes the next one over it
        self._position += 1
        return found

    def _forward(self, ids: Any, position: Any) -> Any:
        out = self._model(ids, past_key_values=self._cache, cache_position=position, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1)


def _peak_rss_bytes() -> int | None:
    """VmHWM of this process, where the system has it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _in_a_fork(path: Path, precision: str, **request: Any) -> TorchSpeed:
    """`measure` in a copy of this process, which ends with it.

    Raises:
        ChildProcessError: the copy died; what it said is on stderr.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            found = measure(path, precision, **request)
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
    run = measure if request["compiled"] else _in_a_fork
    found = [asdict(run(Path(path), precision, **request)) for path, precision in models]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
