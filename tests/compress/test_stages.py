"""The build folder: reuse exactly when nothing changed, resume partial work, refuse foreign and busy folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgestill.compress.stages import Workspace
from edgestill.runtime.errors import OutputRefused
from edgestill.runtime.progress import QuietProgress


def space(root: Path, **words: bool) -> Workspace:
    return Workspace(root, QuietProgress(), **words)


def write(content: str, runs: list[str]) -> object:
    def run(folder: Path) -> dict[str, int]:
        runs.append(content)
        (folder / "out.txt").write_text(content)
        return {"length": len(content)}

    return run


def test_a_stage_runs_once_per_input(tmp_path: Path) -> None:
    runs: list[str] = []
    with space(tmp_path / "b").locked() as work:
        first = work.stage("s", "s", {"words": 1}, write("one", runs))  # type: ignore[arg-type]
        again = work.stage("s", "s", {"words": 1}, write("one", runs))  # type: ignore[arg-type]
        other = work.stage("s", "s", {"words": 2}, write("two", runs))  # type: ignore[arg-type]
    assert runs == ["one", "two"]
    assert (first.reused, again.reused, again.info, other.folder != first.folder) == (False, True, {"length": 3}, True)


def test_a_stage_whose_files_changed_is_made_again(tmp_path: Path) -> None:
    runs: list[str] = []
    with space(tmp_path / "b").locked() as work:
        stage = work.stage("s", "s", {}, write("one", runs))  # type: ignore[arg-type]
        (stage.folder / "out.txt").write_text("tampered")
        again = work.stage("s", "s", {}, write("one", runs))  # type: ignore[arg-type]
    assert runs == ["one", "one"]
    assert (again.folder / "out.txt").read_text() == "one"


def test_force_runs_again(tmp_path: Path) -> None:
    runs: list[str] = []
    for force in (False, True):
        with space(tmp_path / "b", force=force).locked() as work:
            work.stage("s", "s", {}, write("one", runs))  # type: ignore[arg-type]
    assert runs == ["one", "one"]


def test_an_interrupted_stage_goes_on_from_what_it_left(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("kept")
        raise KeyboardInterrupt

    with space(tmp_path / "b").locked() as work:
        with pytest.raises(KeyboardInterrupt):
            work.stage("s", "s", {}, interrupted)
        assert not list((tmp_path / "b" / "work").glob("s-????????????"))

        def resumed(folder: Path) -> dict[str, str]:
            return {"found": (folder / "half").read_text()}

        assert work.stage("s", "s", {}, resumed).info == {"found": "kept"}
    assert not list((tmp_path / "b" / "work").glob("*.partial"))


def test_a_folder_that_is_not_a_build_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputRefused, match=r"is not empty and not a build \(no build.json\); give another --out"):
        space(tmp_path).locked().__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputRefused, match="is a file, not a folder"):
        space(tmp_path / "file").locked().__enter__()


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from edgestill.compress.stages import Workspace\n"
        "from edgestill.runtime.progress import QuietProgress\n"
        "with Workspace(Path(sys.argv[1]), QuietProgress()).locked(): pass\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "b")]
    with space(tmp_path / "b").locked():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"another build is running in this folder (process {os.getpid()})" in done.stderr
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(OutputRefused, match="cannot be written"):
        space(tmp_path / "b").locked().__enter__()
