"""Disks that are full, small or read-only, two builds at once, Ctrl-C: one line, finished stages kept, the next run goes on."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from building import Build, Command, Done
from recipes import write_profile, write_recipe


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """As `ulimit -f`, in bytes, for this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


TOO_LARGE = "the file would be larger than this process may write; raise the limit (ulimit -f) or write elsewhere"
LATER = {
    "corpus": (
        "corpus",
        "calibrate-verse",
        "calibrate-prose",
        "student",
        "train",
        "reference",
        "onnx",
        "quantize-device",
    ),
    "train": ("train", "reference", "onnx", "quantize-device"),
    "onnx": ("onnx", "quantize-device"),
    "quantize-device": ("quantize-device",),
    "bundle": (),
}


@pytest.mark.parametrize(
    ("stage", "size"),
    [
        ("corpus", 20_000),
        ("train", 100_000),
        ("train", 200_000),
        ("onnx", 50_000),
        ("quantize-device", 60_000),
        ("bundle", 80_000),
        ("bundle", 150_000),
    ],
)
def test_files_that_may_not_be_written(
    stage: str, size: int, finished: Build, tmp_path: Path, edgestill: Command
) -> None:
    """Within numpy, safetensors, torch.save, the ONNX export, the quantizer, the bundle's files, the bundle's report."""
    build = finished.without(*LATER[stage], folder=tmp_path / "copy")
    before = build.kept()
    with no_file_larger_than(size):
        done = edgestill(*build.arguments)
    assert (done.code, done.out) == (2, "")
    assert len(done.errors) == 1
    assert done.err.endswith(f": {TOO_LARGE}\n")
    assert done.errors[0].startswith(f"edgestill: {build.out}")
    assert build.kept() >= before
    assert sorted(p.name for p in build.out.iterdir()) == [".lock", "build.json", "work"]
    if stage in ("onnx", "bundle"):  # the others end alike, and a build takes seconds
        again = edgestill(*build.arguments)
        assert (again.code, again.errors) == (0, [])
        assert again.err.count(": done before, unchanged\n") == 9 - len(LATER[stage])
        assert edgestill("verify", build.bundle).code == 0


SMALL_DISK = textwrap.dedent(
    """
    import json, subprocess, sys
    from pathlib import Path
    from edgestill.runtime.cli import run

    out, *command = sys.argv[1:]
    def mount(options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", out], check=True)

    mount("size=400k")
    for change in ("remount,size=64m", "remount,ro", None):
        code = run(command)
        print(json.dumps({"code": code, "names": sorted(p.relative_to(out).as_posix() for p in Path(out).glob("work/*"))}))
        print("== next", file=sys.stderr, flush=True)
        if change:
            mount(change)
    """
)


def mounting(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a mount namespace of its own; skips where that is not permitted."""
    prefix = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None:
        pytest.skip("unshare (util-linux) is not installed")
    with_tmpfs = [*prefix, "mount", "-t", "tmpfs", "tmpfs", arguments[0]]
    if subprocess.run(with_tmpfs, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not permitted here")
    command = [*prefix, sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_full_disk_and_a_read_only_one(tmp_path: Path) -> None:
    """First there is room for some stages, then for all; then the finished build cannot be written any more."""
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    out.mkdir()
    done = mounting(SMALL_DISK, str(out), "distill", str(recipe), "--out", str(out))
    assert done.returncode == 0, done.stderr
    first, second, third = (json.loads(line) for line in done.stdout.splitlines())
    full, enough, read_only, _ = done.stderr.split("== next\n")
    assert first["code"] == 2
    assert re.search(
        rf"\nedgestill: {out}[^\n]*: no space is left on the device; free some or write elsewhere\n$", full
    )
    assert full.count("edgestill: ") == 1
    finished = [name for name in first["names"] if not name.endswith(".partial")]
    assert [name.rpartition("-")[0] for name in finished] == [
        "work/calibrate-prose",
        "work/calibrate-verse",
        "work/corpus",
        "work/student",
    ]
    assert second["code"] == 0
    assert set(second["names"]) > set(finished)
    assert enough.count(": done before, unchanged\n") == len(finished)
    assert third["code"] == 2
    assert read_only == f"edgestill: {out}: cannot be written (Read-only file system); give another --out\n"


def test_a_folder_without_permission(tmp_path: Path) -> None:
    """Root is made subject to modes by taking its capability to override them away."""
    recipe, profile, locked = write_recipe(tmp_path), write_profile(tmp_path), tmp_path / "locked"
    locked.mkdir(mode=0o555)
    prefix: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root ignores modes, and setpriv (util-linux) is not installed")
        prefix = ["setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override"]
    code = "from edgestill.runtime.cli import main; main()"
    command = [*prefix, sys.executable, "-c", code, "build", str(recipe), "--profile", str(profile)]
    done = subprocess.run(
        [*command, "--out", str(locked / "out")], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"edgestill: {locked / 'out'}: cannot be written (Permission denied); give another --out\n"
    assert list(locked.iterdir()) == []


# two at once, and Ctrl-C ------------------------------------------------------------------------------------------


def test_a_second_build_is_refused_and_an_interrupted_one_goes_on(tmp_path: Path, edgestill: Command) -> None:
    build = Build(tmp_path)
    recipe = write_recipe(tmp_path, train={"tokens": 16384})
    write_profile(tmp_path)
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from edgestill.runtime.cli import main; main()"
    command = [sys.executable, "-c", code, *build.arguments]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list(build.out.glob("work/train-*.partial/run/checkpoint-*")):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)  # held in the middle of training while the second one comes
        second = edgestill(*build.arguments)
        assert second == Done(
            2,
            "",
            f"edgestill: {build.out}: another build is running in this folder (process {first.pid}); wait for it or give "
            "another --out\n",
        )
        os.killpg(first.pid, signal.SIGINT)  # as a terminal does it, to the whole group
        os.killpg(first.pid, signal.SIGCONT)
        out, err = first.communicate(timeout=60)
    finally:
        if first.poll() is None:
            first.kill()
    assert (first.returncode, out) == (130, ""), err
    assert err.endswith("stopped; the same command goes on from here\n")
    assert "edgestill: " not in err
    assert "Traceback" not in err
    assert build.kept() == {"corpus", "calibrate-verse", "calibrate-prose", "student"}
    resumed = edgestill("distill", recipe, "--out", build.out)
    assert (resumed.code, resumed.errors) == (0, [])
    assert resumed.err.count(": done before, unchanged\n") == 4
    record = json.loads((build.stage("train") / "stage.json").read_text())
    assert record["info"]["resumed_from_step"] >= 4
    assert not list(build.out.glob("work/*.partial"))


def test_an_interrupt_that_a_library_wraps_is_still_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgestill.runtime import cli

    def wrapped(**_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise SystemError("returned a result with an exception set") from interrupt

    monkeypatch.setattr(cli, "app", wrapped)
    assert cli.run([]) == 130


def test_an_interrupt_that_lands_in_a_finalizer_is_not_lost() -> None:
    planted = textwrap.dedent(
        """
        import sys, time
        from edgestill.runtime import cli

        class Interrupted:
            def __del__(self):
                raise KeyboardInterrupt

        @cli.app.command("planted")
        def planted():
            Interrupted()
            time.sleep(60)

        sys.argv = ["edgestill", "planted"]
        cli.main()
        """
    )
    done = subprocess.run([sys.executable, "-c", planted], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
