"""Worker processes that do one job after the other, tell their progress, and may die without taking the others along.

    with Workers(2, train_one, progress) as workers:
        for outcome in workers.run([("uniform, seed 0", job), ...]):
            ...

A worker ends when its parent does, however that ends, so that two runs never write the same folder. Ctrl-C reaches the parent
alone, which ends the workers. concurrent.futures does neither, and loses all jobs with one dead process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from edgestill.runtime.cli import EX_SOFTWARE, describe
from edgestill.runtime.progress import Progress, Task

TELL_EVERY_S = 0.5
END_WITHIN_S = 10.0
PARENT_GONE = 1


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its value, or one line that says why there is none."""

    label: str
    value: Any = None
    error: str | None = None
    trace: str | None = None
    """The traceback of an error that is not one of ours."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    label: str | None = None
    """The job it is at."""
    tasks: dict[int, tuple[Task, float]] = field(default_factory=dict)
    """Its open tasks by their number there: as shown here, and how much of each is done."""


class Workers:
    """`count` processes that call `function(job, progress)`; function, jobs and values are pickled.

    Args:
        threads: of torch, in each worker; None leaves it alone.
    """

    def __init__(
        self, count: int, function: Callable[[Any, Progress], Any], progress: Progress, *, threads: int | None = None
    ) -> None:
        self._count, self._function, self._threads = count, function, threads
        self._progress = progress
        self._context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of torch, mid-air
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in (*self._idle, *self._busy):
            self._close_tasks(worker)
            worker.process.terminate()
        for worker in (*self._idle, *self._busy):
            worker.process.join(END_WITHIN_S)
            worker.connection.close()
        self._idle, self._busy = [], []

    def run(self, jobs: Sequence[tuple[str, Any]]) -> Iterator[Outcome]:
        """Outcomes of (label, job) pairs as they come; a failed one does not keep the others from running."""
        waiting = deque(jobs)
        while waiting or self._busy:
            while waiting and len(self._busy) < self._count:
                worker = self._idle.pop() if self._idle else self._start()
                worker.label, job = waiting.popleft()
                worker.connection.send(job)
                self._busy.append(worker)
            ready = wait([worker.connection for worker in self._busy])
            for worker in [w for w in self._busy if w.connection in ready]:
                outcome = self._hear(worker)
                if outcome is not None:
                    self._busy.remove(worker)
                    if worker.process.is_alive():
                        self._idle.append(worker)
                    yield outcome

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._function, self._threads), daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the child keeps this mask: Ctrl-C is ours
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that the death of the worker ends the connection
        return _Worker(process, ours)

    def _hear(self, worker: _Worker) -> Outcome | None:
        """One message of a worker; an outcome when it ends its job."""
        label = worker.label or ""
        try:
            kind, *facts = worker.connection.recv()
        except (EOFError, ConnectionError):
            worker.process.join(END_WITHIN_S)
            self._close_tasks(worker)
            return Outcome(label, error=_death(worker.process.exitcode))
        if kind == "done":
            self._close_tasks(worker)
            return Outcome(label, *facts)
        if kind == "say":
            self._progress.say(f"{label}: {facts[0]}")
        else:
            self._show(worker, kind, *facts)
        return None

    def _show(
        self, worker: _Worker, kind: str, number: int, name: str, total: float, unit: str, done: float, note: str
    ) -> None:
        if kind == "open":
            task = self._progress.task(f"{worker.label}: {name}", total, unit)
            worker.tasks[number] = (task, 0.0)
            task.__enter__()
            return
        task, before = worker.tasks[number]
        task.advance(done - before, note)
        worker.tasks[number] = (task, done)
        if kind == "close":
            task.__exit__(None, None, None)
            del worker.tasks[number]

    def _close_tasks(self, worker: _Worker) -> None:
        for task, _ in worker.tasks.values():
            task.__exit__(KeyboardInterrupt, None, None)  # shown as stopped
        worker.tasks.clear()


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; the system may be out of memory: lower --jobs" if -code == signal.SIGKILL else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended (exit code {code})"


# in the worker -------------------------------------------------------------------------------------------------------


class _Teller:
    """Where a worker's progress goes: the pipe to its parent, a few times a second."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.last: dict[int, float] = {}

    def say(self, line: str) -> None:
        self.connection.send(("say", line))

    def stage(self, title: str) -> None:
        """Rows run side by side: a headline would belong to none of them."""

    def open(self, task: Task) -> None:
        self._send("open", task)

    def update(self, task: Task, now: float) -> None:
        if now - self.last.get(id(task), 0.0) >= TELL_EVERY_S:
            self.last[id(task)] = now
            self._send("update", task)

    def close(self, task: Task, *, finished: bool) -> None:
        self.last.pop(id(task), None)
        self._send("close", task)

    def _send(self, kind: str, task: Task) -> None:
        self.connection.send((kind, id(task), task.label, task.total, task.unit, task.done, task.note))


class _Told(Progress):
    """The calls of Progress, for the parent to show."""

    def __init__(self, connection: Connection) -> None:
        self._clock = time.monotonic
        self._sink = _Teller(connection)


def _work(connection: Connection, function: Callable[[Any, Progress], Any], threads: int | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    progress = _Told(connection)
    while True:
        job = connection.recv()
        try:
            connection.send(("done", function(job, progress)))
        except Exception as error:  # noqa: BLE001 (the outermost boundary of this process: its parent reports what it is)
            code, lines = describe(error)
            if code != EX_SOFTWARE:
                connection.send(("done", None, "; ".join(lines)))
            else:
                words = " ".join(f"{type(error).__name__}: {error}".split())
                connection.send(("done", None, words, traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(PARENT_GONE)
