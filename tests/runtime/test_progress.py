"""Progress in a log, on a terminal (a pseudo-terminal), and nowhere."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest

from edgestill.runtime.progress import Progress, QuietProgress, duration


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(amounts: list[tuple[float, float]], total: float, unit: str = "steps") -> list[str]:
    """The lines of a task that advances by (amount) after (seconds)."""
    clock, stream = Clock(), io.StringIO()
    with Progress(stream, clock=clock).task("train", total, unit) as task:
        for seconds, amount in amounts:
            clock.now += seconds
            task.advance(amount)
    return stream.getvalue().splitlines()


def test_a_log_gets_a_line_every_ten_seconds_and_the_last_one() -> None:
    assert run([(1, 1)] * 25, 25) == [
        "train: 10/25 steps, 15 s left, 1 steps/s",
        "train: 20/25 steps, 5.0 s left, 1 steps/s",
        "train: 25 steps in 25 s",
    ]


def test_slow_steps_each_get_their_line() -> None:
    assert run([(30, 1), (30, 1), (30, 1)], 4) == [
        "train: 1/4 steps",
        "train: 2/4 steps, 1 min 00 s left, 0.0333 steps/s",
        "train: 3/4 steps, 30 s left, 0.0333 steps/s",
        "train: 3 steps in 1 min 30 s",
    ]


def test_what_a_resumed_run_skips_is_not_speed() -> None:
    assert run([(0, 1000)] + [(1, 1)] * 10, 1100) == [
        "train: 1,010/1,100 steps, 1 min 30 s left, 1 steps/s",
        "train: 1,010 steps in 10 s",
    ]


def test_the_rate_is_that_of_the_latest_minute() -> None:
    lines = run([(1, 1)] * 100 + [(10, 1)] * 20, 200)
    assert lines[-2] == "train: 120/200 steps, 13 min 20 s left, 0.1 steps/s"


def test_unknown_total_no_unit_and_a_note() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(stream, clock=clock).task("read", 0) as task:
        task.advance(5)
        clock.now += 10
        task.advance(5, note="loss 3.21")
    assert stream.getvalue().splitlines() == ["read: 10, 0.5/s, loss 3.21", "read: 10 in 10 s, loss 3.21"]


def test_a_task_that_breaks_off_says_where() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(stream, clock=Clock()).task("train", 4, "steps") as task:
        task.advance(3)
        raise KeyboardInterrupt
    assert stream.getvalue() == "train: stopped after 3/4 steps in 0.0 s\n"


def test_nested_tasks_news_and_headlines() -> None:
    stream = io.StringIO()
    progress = Progress(stream, clock=Clock())
    progress.stage("distil")
    with progress.task("outer", 1) as outer:
        with progress.task("inner", 2) as inner:
            inner.advance(2)
        progress.say("saved [bold]")
        outer.advance()
    assert stream.getvalue().splitlines() == ["== distil", "inner: 2 in 0.0 s", "saved [bold]", "outer: 1 in 0.0 s"]


def test_quiet_progress_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    progress = QuietProgress()
    progress.stage("distil")
    progress.say("news")
    with progress.task("train", 2) as task:
        task.advance()
    assert task.done == 1
    assert capfd.readouterr() == ("", "")


def test_the_default_is_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().say("news")
    assert capsys.readouterr() == ("", "news\n")


SCRIPT = """
from edgestill.runtime.progress import Progress
progress = Progress()
progress.stage("distil")
with progress.task("outer [b]", 2, "steps") as outer:
    with progress.task("a label that is longer than its column", 3, "tokens") as inner:
        for _ in range(3):
            inner.advance(note="a note that is much longer than the rest of an eighty column line can be")
    progress.say("saved [bold]")
    outer.advance(2)
"""


def test_bars_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm-256color"}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=theirs, env=environment) as child:
        os.close(theirs)
        written = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # Linux reports the end of a pseudo-terminal as an error
                break
            if not chunk:
                break
            written += chunk
    os.close(ours)
    text = written.decode()
    assert child.returncode == 0
    assert "━" in text
    assert "\x1b[?25h" in text  # the cursor is back
    for line in ("distil", "saved [bold]", "outer [b]: 2 steps in"):
        assert line in text
    assert "a label that is longer than its column: 3 tokens in" in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (215, "3 min 35 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
