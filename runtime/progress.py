"""Progress of long work: bars with the time left on a terminal, plain lines in a log, nothing in a library.

    progress = Progress()                                  # to stderr
    progress.stage("training")
    with progress.task("student", total=1000, unit="steps") as task:
        task.advance(note="loss 3.21")

In a log a task writes at most one line per 10 s, and a last one when it ends. Tasks may be nested. `QuietProgress`
takes the same calls and is silent.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_EVERY_S = 10.0
BAR_EVERY_S = 0.1
LABEL, BAR = 24, 16
"""Widths on a terminal; facts take the rest of the line and are cut, for a bar that wraps cannot be redrawn."""
RATE_WINDOW_S = 60.0
"""Rate and time left come from this much of the latest past."""


class Task:
    """One piece of work with a known amount. Use as a context manager; `advance` may be called from any thread."""

    def __init__(self, sink: _Sink, label: str, total: float, unit: str, clock: Callable[[], float]) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self.note = ""
        self._sink, self._clock = sink, clock
        self._lock = threading.Lock()
        self._samples: deque[tuple[float, float]] = deque()
        self.started = clock()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """`amount` more is done; `note` is shown beside it until the next one."""
        with self._lock:
            self.done += amount
            self.note = note or self.note
            now = self._clock()
            # the first sample is taken after the first amount: what a resumed run skips must not count as speed
            if not self._samples or now - self._samples[-1][0] >= 1.0:
                self._samples.append((now, self.done))
            while now - self._samples[0][0] > RATE_WINDOW_S and len(self._samples) > 2:
                self._samples.popleft()
            self._sink.update(self, now)

    @property
    def rate(self) -> float | None:
        """Amount per second over the latest minute; None before it can be told."""
        if not self._samples:
            return None
        then, before = self._samples[0]
        passed = self._clock() - then
        return (self.done - before) / passed if passed > 0 and self.done > before else None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the task began."""
        return self._clock() - self.started

    def __enter__(self) -> Task:
        self._sink.open(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sink.close(self, finished=kind is None)


class _Sink(Protocol):
    """Where progress goes."""

    def say(self, line: str) -> None: ...
    def stage(self, title: str) -> None: ...
    def open(self, task: Task) -> None: ...
    def update(self, task: Task, now: float) -> None: ...
    def close(self, task: Task, *, finished: bool) -> None: ...


class Progress:
    """What long work reports to. `stream`: default stderr; bars when it is a terminal."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        target = stream if stream is not None else sys.stderr
        self._clock = clock
        self._sink: _Sink = _Bars(target) if target.isatty() else _Lines(target)

    def say(self, line: str) -> None:
        """One line of news."""
        self._sink.say(line)

    def stage(self, title: str) -> None:
        """A headline."""
        self._sink.stage(title)

    def task(self, label: str, total: float, unit: str = "") -> Task:
        """A task of `total` units (0: unknown); enter it to show it."""
        return Task(self._sink, label, total, unit, self._clock)


class QuietProgress(Progress):
    """The same calls, no output."""

    def __init__(self) -> None:
        self._clock = time.monotonic
        self._sink = _Nothing()


class _Nothing:
    def say(self, line: str) -> None:
        pass

    def stage(self, title: str) -> None:
        pass

    def open(self, task: Task) -> None:
        pass

    def update(self, task: Task, now: float) -> None:
        pass

    def close(self, task: Task, *, finished: bool) -> None:
        pass


class _Lines:
    """Plain lines, flushed one by one, so that a log can be followed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last: dict[int, float] = {}

    def say(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def stage(self, title: str) -> None:
        self.say(f"== {title}")

    def open(self, task: Task) -> None:
        self._last[id(task)] = task.started

    def update(self, task: Task, now: float) -> None:
        if now - self._last.get(id(task), now) >= LINE_EVERY_S:
            self._last[id(task)] = now
            self.say(f"{task.label}: {', '.join(_facts(task))}")

    def close(self, task: Task, *, finished: bool) -> None:
        self._last.pop(id(task), None)
        self.say(f"{task.label}: {_ending(task, finished)}")


class _Bars:
    """rich bars. Inner tasks vanish when they end and leave a line; the display ends with the outermost one."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(file=stream, highlight=False)
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=BAR),
            TextColumn("{task.fields[facts]}", markup=False),
            console=self._console,
            transient=True,
        )
        self._ids: dict[int, TaskID] = {}
        self._last: dict[int, float] = {}

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def stage(self, title: str) -> None:
        self._console.print(title, style="bold", markup=False, soft_wrap=True)

    def open(self, task: Task) -> None:
        if not self._ids:
            self._bars.start()
        self._ids[id(task)] = self._bars.add_task(task.label[:LABEL], total=task.total or None, facts="")

    def update(self, task: Task, now: float) -> None:
        if id(task) in self._ids and now - self._last.get(id(task), 0.0) >= BAR_EVERY_S:
            self._last[id(task)] = now
            room = max(self._console.width - LABEL - BAR - 4, 16)
            self._bars.update(self._ids[id(task)], completed=task.done, facts=", ".join(_facts(task))[:room])

    def close(self, task: Task, *, finished: bool) -> None:
        self._last.pop(id(task), None)
        bar = self._ids.pop(id(task))
        if not self._ids:
            self._bars.stop()
        self._bars.remove_task(bar)
        self.say(f"{task.label}: {_ending(task, finished)}")


def _facts(task: Task) -> list[str]:
    """`120/1,000 steps`, `3 min 35 s left`, `4.1 steps/s`, the note."""
    amount = f"{_number(task.done)}/{_number(task.total)}" if task.total else _number(task.done)
    facts = [f"{amount} {task.unit}".rstrip()]
    rate = task.rate
    if rate:
        if task.total > task.done:
            facts.append(f"{duration((task.total - task.done) / rate)} left")
        facts.append(f"{_number(rate)} {task.unit}/s".replace(" /s", "/s"))
    if task.note:
        facts.append(task.note)
    return facts


def _ending(task: Task, finished: bool) -> str:
    amount = _number(task.done) if finished or not task.total else f"{_number(task.done)}/{_number(task.total)}"
    words = [f"{amount} {task.unit}".rstrip() + f" in {duration(task.elapsed_s)}", *([task.note] if task.note else [])]
    return ("" if finished else "stopped after ") + ", ".join(words)


def _number(value: float) -> str:
    """At least three figures, thousands separated."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 35 s`, `2 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
