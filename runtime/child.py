"""Measuring in a process of its own, so that a peak is the workload's and a killed workload is a row without a value.

The parent starts `python -m edgestill.runtime.measuring_process`, reads progress as JSON lines from its stdout and the result
from a file. Whatever ends the child (a known error, an exception, the kernel's out-of-memory killer) becomes one line of reason.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from edgestill.runtime.errors import EdgestillError
from edgestill.runtime.progress import Progress, QuietProgress, Task

MODULE = "edgestill.runtime.measuring_process"
REASON_CHARACTERS = 300

Emit = Callable[[int, int, str], None]
"""Called by the child's work with (done, total, unit)."""


class MeasurementFailed(EdgestillError):
    """The measuring process gave no result; the message is the reason that stands in the report."""


def run_child(
    task: str, bundle: Path, request: dict[str, Any], label: str, progress: Progress | None
) -> dict[str, Any]:
    """Run `task` on `bundle` in a fresh interpreter and return its result.

    Raises:
        MeasurementFailed: the process raised, was killed, or wrote no result.
    """
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder, contextlib.ExitStack() as stack:
        out = Path(folder) / "result.json"
        errors = stack.enter_context((Path(folder) / "stderr").open("w+", encoding="utf-8", errors="replace"))
        command = [sys.executable, "-P", "-m", MODULE, str(bundle), "--task", task, "--request", json.dumps(request)]
        process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            if process.stdout is not None:
                with process.stdout:
                    _forward(process.stdout, label, progress)
            code = process.wait()
        finally:
            if process.poll() is None:  # this process was interrupted: nobody is left to read the answer
                process.kill()
                process.wait()
        if code != 0:
            errors.seek(0)
            raise MeasurementFailed(_death(code, errors.read()))
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if "error" in result:
        raise MeasurementFailed(result["error"])
    return result


def _forward(lines: IO[str], label: str, progress: Progress | None) -> None:
    """Turn the child's progress lines into a bar; any other line on its stdout is dropped."""
    with contextlib.ExitStack() as stack:
        bar: Task | None = None
        before = 0
        for done, total, unit in _progress_lines(lines):
            if bar is None:
                bar = stack.enter_context((progress or QuietProgress()).task(label, total, unit))
            bar.advance(done - before)
            before = done


def _progress_lines(lines: IO[str]) -> Iterator[tuple[int, int, str]]:
    for line in lines:
        try:
            message = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(message, dict) and {"done", "total", "unit"} <= message.keys():
            yield int(message["done"]), int(message["total"]), str(message["unit"])


def _death(code: int, stderr: str) -> str:
    """Why a process with exit status `code` ended, in one line."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = ", as the kernel does when memory runs out" if -code == signal.SIGKILL else ""
        return f"the measuring process was killed by {name}{hint}"
    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "no message")
    return f"the measuring process ended with status {code}: {last[:REASON_CHARACTERS]}"


def emit_line(done: int, total: int, unit: str) -> None:
    """The child's side of the progress protocol."""
    sys.stdout.write(json.dumps({"done": done, "total": total, "unit": unit}) + "\n")
    sys.stdout.flush()
