"""How fast and how large a torch checkpoint is on this machine, measured in a process of its own.

`python -m edgestill.compress.torch_speed --model DIR --precision float32 --prompt-tokens 128 --new-tokens 32 --threads 2` prints
one JSON object. The same workload as the artifact's (runtime/measure.py): greedy, batch 1, prompts that never repeat, warm-up
runs named and left out. This is the column the verdict table shows beside the artifact.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

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


def measure_in_child(model: Path, precision: str, *, prompt_tokens: int, new_tokens: int, threads: int) -> TorchSpeed:
    """Start a fresh process and return what it measured.

    Raises:
        BadInput: the process failed; its last line of output is in the message.
    """
    command = [sys.executable, "-m", "edgestill.compress.torch_speed", "--model", str(model), "--precision", precision]
    command += ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BadInput(f"{model}: could not be measured with torch (exit {done.returncode}): {last}")
    return TorchSpeed(**json.loads(done.stdout.splitlines()[-1]))


def measure(model_path: Path, precision: str, *, prompt_tokens: int, new_tokens: int, threads: int) -> TorchSpeed:
    """Measure in this process."""
    import numpy as np
    import psutil
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).to(device).eval()
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


def main() -> None:
    """The child's entry."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--precision", required=True)
    for name in ("--prompt-tokens", "--new-tokens", "--threads"):
        parser.add_argument(name, type=int, required=True)
    a = parser.parse_args()
    speed = measure(a.model, a.precision, prompt_tokens=a.prompt_tokens, new_tokens=a.new_tokens, threads=a.threads)
    sys.stdout.write(json.dumps(asdict(speed)) + "\n")


if __name__ == "__main__":
    main()
