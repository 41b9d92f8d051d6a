"""Under torchrun: one copy of everything that is written, one word of an error, and nobody waits for a process that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from recipes import write_recipe
from safetensors.torch import load_file
from training import Ended, alone, furthest, together

from edgestill.compress import distill_student
from edgestill.compress.processes import from_first, is_first, joined, wait_for_all, world
from edgestill.runtime.cli import run
from edgestill.runtime.errors import BadInput

TRAIN = {"tokens": 4 * 4 * 2 * 32, "gradient_accumulation": 2, "teacher_cache": "always"}


def distill(recipe: Path, out: Path) -> int:
    return run(["distill", str(recipe), "--out", str(out)])


def complaints(ended: list[Ended]) -> list[str]:
    """What the processes say of an error, all together."""
    return [line for end in ended for line in end.text.splitlines() if line.startswith("edgestill: ")]


@pytest.mark.timeout(240)
def test_torchrun_distills_and_one_process_takes_it_up(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train=TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "edgestill.runtime.cli", "distill", str(recipe), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("== train: the student") == done.stderr.count("training: 1,024 tokens in") == 1
    assert done.stderr.count("edgestill/") == 0
    (tmp_path / "one").mkdir()
    again = alone(tmp_path, distill, recipe, tmp_path / "two")
    assert again.code == 0 and "==" not in again.text and "train: the student: done before" in again.text, again.text
    one = alone(tmp_path, distill, recipe, tmp_path / "one")
    assert one.code == 0, one.text
    ours, theirs = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("two", "one"))
    assert furthest(ours, theirs) < 2e-6  # after 4 steps of 1e-3: the sums are made in another order
    assert not list((tmp_path / "two").glob("work/*.partial")) and not (tmp_path / "two" / "student.tmp").exists()


def test_bad_input_is_said_once(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"batch_size": 3})
    ended = together(2, tmp_path, distill, recipe, tmp_path / "out")
    assert [end.code for end in ended] == [2, 2]
    assert complaints(ended) == [
        "edgestill: train.batch_size: 3 windows do not divide over 2 processes; make it a multiple of 2 or start another "
        "number (--nproc_per_node)"
    ]
    assert not (tmp_path / "out").exists()


def fail_in_the_second(recipe: Path, out: Path, how: str) -> int:
    """`distill`, in which the second process fails while the first is already training."""
    plain = distill_student.train

    def failing(*arguments: Any, **words: Any) -> Any:
        if world()[1] == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise BadInput("the second process has no memory left; free some")
        return plain(*arguments, **words)

    distill_student.train = failing
    return distill(recipe, out)


@pytest.mark.parametrize(
    ("how", "codes", "said"),
    [
        ("raises", [2, 2], "the second process has no memory left; free some"),
        ("killed", [2, -signal.SIGKILL], "another process ended without a word; the same command goes on from here"),
    ],
)
def test_an_error_in_one_process_ends_all(how: str, codes: list[int], said: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    ended = together(2, tmp_path, fail_in_the_second, recipe, tmp_path / "out", how)
    assert [end.code for end in ended] == codes, ended
    assert complaints(ended) == [f"edgestill: {said}"]
    assert alone(tmp_path, distill, recipe, tmp_path / "out").code == 0  # nothing is in its way


def one_process_only(command: str, recipe: Path, out: Path) -> int:
    profile = ["--profile", "cpu-x86"] if command == "build" else []
    return run([command, str(recipe), *profile, "--out", str(out)])


@pytest.mark.parametrize("command", ["build", "ablate"])
def test_other_commands_are_for_one_process(command: str, tmp_path: Path) -> None:
    ended = together(2, tmp_path, one_process_only, command, tmp_path / "recipe.yaml", tmp_path / "out")
    assert [end.code for end in ended] == [2, 2]
    (said,) = complaints(ended)
    assert said.startswith(
        f"edgestill: edgestill {command} works in one process, torchrun started 2; train with torchrun"
    )


def test_spreading_needs_several_processes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"sharding": "full"})
    ended = alone(tmp_path, distill, recipe, tmp_path / "out")
    assert ended.code == 2
    assert complaints([ended]) == [
        "edgestill: train.sharding: full spreads the student over processes; start them with torchrun (--nproc_per_node N) or "
        "use sharding: none"
    ]


# meetings -----------------------------------------------------------------------------------------------------------


def meet(out: Path) -> int:
    with joined():
        asked = []

        def ask() -> list[int]:
            asked.append(1)
            return [7, *world()]

        answers = [from_first(ask) for _ in range(2)]
        wait_for_all()
        rank = world()[1]
        (out / f"{rank}").write_text("here")
        wait_for_all()
        seen = sorted(path.name for path in out.iterdir())
        print(answers, len(asked), seen)
    return 0


def test_meetings(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ended = together(3, tmp_path, meet, tmp_path / "out")
    assert [end.code for end in ended] == [0, 0, 0], ended
    first = [[7, 3, 0]] * 2
    assert [end.text.splitlines()[-1] for end in ended] == [f"{first} {asked} ['0', '1', '2']" for asked in (2, 0, 0)]


def test_alone_everything_is_a_no_op() -> None:
    with joined():
        assert world() == (1, 0) and is_first()
        assert from_first(lambda: (1, 2)) == (1, 2)
        wait_for_all()
