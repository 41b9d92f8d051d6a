"""Measurements in processes of their own that take turns: all are ready, one works at a time, so that slow minutes hit every side.

The parent starts a process per side (`Side`), which prepares itself, says so, and then answers each "go" with the facts of one
piece of work as a line of JSON. `alternate` gives the turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgestill.runtime.device import environment
from edgestill.runtime.workload import peak_resident_mib, resident_mib

MIB = 1 << 20


class Side:
    """A process that waits for its turns, in the interpreter `python`. A context manager: it ends with its parent."""

    def __init__(self, name: str, command: Sequence[str], *, python: str = sys.executable) -> None:
        self.name = name
        self._process = subprocess.Popen([python, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def heard(self) -> dict[str, Any]:
        """The next line it says."""
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise SystemExit(f"side {self.name!r} ended with status {self._process.wait()}; its message is above")
        return dict(json.loads(line))

    def turn(self) -> dict[str, Any]:
        """One piece of work."""
        if self._process.stdin is not None:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        return self.heard()


def alternate(commands: Mapping[str, Sequence[str]], *, warm_up: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """`rounds` pieces of work of every side, in turn; `warm_up` pieces each before them are not among the answers."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(name, command)) for name, command in commands.items()]
        for side in sides:
            side.heard()  # all are ready before the first turn
        for number in range(warm_up + rounds):
            for side in sides:
                facts = side.turn()
                if number >= warm_up:
                    found[side.name].append(facts)
    return found


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and n."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "n": len(values),
    }


class PeakMemory:
    """Highest memory above what is in use when this is made: resident memory on a CPU, the allocator's on a GPU."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        if on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / MIB
        else:
            self.reset = _reset_peak()
            self._before = resident_mib()

    def mib(self) -> float:
        """MiB above the start."""
        if self.on_gpu:
            import torch

            return float(torch.cuda.max_memory_allocated()) / MIB - self._before
        return (peak_resident_mib() or resident_mib()) - self._before


def _reset_peak() -> bool:
    """Start VmHWM anew from the present resident size; False where the kernel refuses."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def software() -> dict[str, Any]:
    """`environment()` with what training depends on beside it."""
    import torch

    return {
        **environment(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def measured(doc: str | None, result: Path, sides: Sequence[str]) -> argparse.ArgumentParser:
    """The command line of a benchmark whose sides are the script itself, started again with --side."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", type=json.loads, default={}, help='JSON, for example {"batch": 4}')
    parser.add_argument("--json", type=Path, default=result)
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, help=argparse.SUPPRESS)
    return parser


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Indented JSON at `path`, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
