"""Workers that fail, die and are outlived; the functions at the top run in them."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edgestill.compress.ablate_workers import Outcome, Workers
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import Progress, QuietProgress


def work(job: str, progress: Progress) -> str:
    """Does what the job says."""
    if job == "known":
        raise BadInput("3 is above 2; lower it")
    if job == "bug":
        raise RuntimeError("no\nwhere")
    if job == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "leaves":
        os._exit(3)
    if job == "told":
        with progress.task("training", 10, "steps") as task:
            task.advance(4)
            task.advance(6, "loss 1")
        progress.say("well done")
    if job.startswith("sleep"):
        Path(job.removeprefix("sleep ")).write_text(str(os.getpid()))
        time.sleep(60)
    return f"{job} done"


def test_each_job_has_its_outcome_whatever_becomes_of_the_others() -> None:
    jobs = ["a", "known", "killed", "b", "bug", "leaves", "c"]
    with Workers(2, work, QuietProgress()) as workers:
        found = {outcome.label: outcome for outcome in workers.run([(f"job {job}", job) for job in jobs])}
    for job in "abc":
        assert found[f"job {job}"] == Outcome(f"job {job}", f"{job} done")
    assert found["job known"].error == "3 is above 2; lower it"
    assert found["job known"].trace is None
    assert found["job bug"].error == "RuntimeError: no where"
    assert "in work" in (found["job bug"].trace or "")
    assert "SIGKILL" in (found["job killed"].error or "")
    assert "exit code 3" in (found["job leaves"].error or "")


def test_progress_of_a_worker_is_shown_by_its_parent() -> None:
    stream = io.StringIO()
    with Workers(1, work, Progress(stream)) as workers:
        list(workers.run([("row, seed 0", "told")]))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("row, seed 0: training: 10 steps in ")
    assert lines[0].endswith("loss 1")
    assert lines[1] == "row, seed 0: well done"


PARENT = """
import sys
sys.path[:0] = [{tests!r}]
from test_ablate_workers import work
from edgestill.compress.ablate_workers import Workers
from edgestill.runtime.progress import QuietProgress
if __name__ == "__main__":
    with Workers(1, work, QuietProgress()) as workers:
        list(workers.run([("row", "sleep {pid}")]))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, end: signal.Signals) -> None:
    pid = tmp_path / "pid"
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(tests=str(Path(__file__).parent), pid=pid))
    parent = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True)
    while not (pid.exists() and pid.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    worker = psutil.Process(int(pid.read_text()))
    parent.send_signal(end)
    _, errors = parent.communicate(timeout=30)
    assert errors.count("Traceback") == (0 if end == signal.SIGKILL else 1)  # the parent's own, none of the worker
    worker.wait(timeout=30)
