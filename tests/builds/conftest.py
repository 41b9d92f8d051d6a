"""The command in this process, and one tiny finished build for all tests of this folder."""

from __future__ import annotations

import fcntl
import os

import pytest
from building import Build, Command, Done
from recipes import write_profile, write_recipe

from edgestill.runtime.cli import run


@pytest.fixture
def edgestill(capfd: pytest.CaptureFixture[str]) -> Command:
    """`edgestill("build", recipe, ...)` in this process."""

    def command(*arguments: object) -> Done:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return Done(code, *capfd.readouterr())

    return command


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A build that passed, one for all workers. Read it, copy it; do not write into it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    build = Build(shared / "finished")
    with (shared / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker builds, the others wait for it
        if not build.bundle.exists():
            write_recipe(build.folder)
            write_profile(build.folder)
            assert run(build.arguments) == 0
    return build
