"""Two real processes (gloo) capture one cache: the bytes of one process, each asking the teacher for its own shards only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from test_teacher_cache import N, opened, store, teacher_at
from tiny import write_model

PROCESS = """
import json, sys
sys.path[:0] = [{tests!r}, {here!r}]
from pathlib import Path
from edgestill.compress.processes import joined
from edgestill.runtime.progress import QuietProgress
from test_teacher_cache import store, teacher_at

class Counted(QuietProgress):
    windows = []
    def task(self, label, total, unit=""):
        task = super().task(label, total, unit)
        plain = task.advance
        task.advance = lambda amount=1, note="": (self.windows.append(int(amount)), plain(amount, note))
        return task

answered, finished = [], []
with joined():
    teacher = teacher_at(Path(sys.argv[1]))
    for out, words in json.loads(sys.argv[2]):
        Counted.windows = []
        store(teacher, Path(out), progress=Counted(), **words)
        answered.append(Counted.windows)
        finished.append((Path(out) / "cache.json").is_file())  # also for the process that does not write it
print(json.dumps([answered, finished]))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def by_two(model: Path, captures: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """(windows per step of each capture, whether each manifest was there) of both processes."""
    here = Path(__file__).parent
    script = PROCESS.format(tests=str(here.parent), here=str(here))
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(model), json.dumps(captures)],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    return [json.loads(out.splitlines()[-1]) for out, _ in answers]


def test_two_processes_end_in_the_bytes_of_one(tmp_path: Path) -> None:
    model = write_model(tmp_path / "t", width=32)
    teacher = teacher_at(model)
    cases: dict[str, dict[str, Any]] = {"top_k": {}, "sampling": {"mode": "sampling", "seed": 5}, "resumed": {}}
    whole = {name: contents(store(teacher, tmp_path / "one" / name, **words)) for name, words in cases.items()}
    killed = store(teacher, tmp_path / "resumed")
    kept = (killed / "shard-00002.safetensors").stat().st_ino
    for lost in ("cache.json", "shard-00003.safetensors", "shard-00005.safetensors"):
        (killed / lost).unlink()
    found = by_two(model, [(str(tmp_path / name), words) for name, words in cases.items()])
    for name in cases:
        assert contents(tmp_path / name) == whole[name], name
        assert opened(teacher, tmp_path / name).windows.tolist() == list(range(N))
    assert (killed / "shard-00002.safetensors").stat().st_ino == kept
    # six shards of 4 windows, the last of 3, in batches of 2; `resumed` lost two of the second process
    alone = [[2, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2, 1]]
    assert found == [
        [[alone[0], alone[0], [12]], [True, True, True]],
        [[alone[1], alone[1], [4, 2, 2, 2, 1]], [True, True, True]],
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
