"""`kill -9` at random moments of every stage, then the same command: it goes on, and ends with the same student to the bit."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recipes import write_profile, write_recipe

from edgestill.runtime.bundle import verify_bundle

PHASES = {
    "never": [
        "train-*.partial/run",
        "train-*.partial/run/checkpoint-*",
        "reference-*.partial",
        "onnx-*.partial",
        "quantize-*",
    ],
    "always": [
        "corpus-*.partial",
        "cache-verse-*.partial",
        "cache-prose-*.partial",
        "train-*.partial/run/checkpoint-*",
        "speed-*",
    ],
}
"""teacher_cache -> what appears in work/ when the phase begins in which the process is killed, one process each."""


def start(recipe: Path, profile: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    code = "import torch; torch.set_num_threads(1); from edgestill.runtime.cli import main; main()"
    command = [sys.executable, "-c", code, "build", str(recipe), "--profile", str(profile), "--out", str(out)]
    with log.open("wb") as handle:
        return subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT)


def finish(recipe: Path, profile: Path, out: Path, log: Path) -> None:
    assert start(recipe, profile, out, log).wait() == 0, log.read_text()


def student(out: Path) -> str:
    (found,) = out.glob("work/train-*/student/model.safetensors")
    return hashlib.sha256(found.read_bytes()).hexdigest()


def wait_for(process: subprocess.Popen[bytes], out: Path, phase: str, seconds: float = 120) -> bool:
    """Whether `phase` began while the process was alive."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if list(out.glob(f"work/{phase}")):
            return True
        time.sleep(0.002)
    return False


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cache", sorted(PHASES))
def test_a_killed_build_goes_on_and_ends_with_the_same_weights(tmp_path: Path, cache: str) -> None:
    changes = {"train": {"teacher_cache": cache, "tokens": 6000}}
    if cache == "never":  # trained projections and the balance of the losses must come back too
        changes["losses"] = {"features": {"ratio": 0.3}}
    recipe, profile = write_recipe(tmp_path, **changes), write_profile(tmp_path)
    log = tmp_path / "log"
    finish(recipe, profile, tmp_path / "whole", log)
    rng, killed = random.Random(cache), []
    for phase in PHASES[cache]:
        process = start(recipe, profile, tmp_path / "killed", log)
        assert wait_for(process, tmp_path / "killed", phase), f"{phase}: {log.read_text()}"
        time.sleep(rng.uniform(0, 0.15))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed.append(phase)
        process.wait()
    finish(recipe, profile, tmp_path / "killed", log)
    assert killed == PHASES[cache]
    assert student(tmp_path / "killed") == student(tmp_path / "whole")
    assert verify_bundle(tmp_path / "killed" / "device") == []
    assert not list((tmp_path / "killed").glob("work/*.partial"))
    assert not list((tmp_path / "killed").glob("device.tmp-*"))


def test_killed_while_the_bundle_is_written_the_old_one_stays_until_the_new_one_is_there(tmp_path: Path) -> None:
    recipe, profile, log = write_recipe(tmp_path), write_profile(tmp_path), tmp_path / "log"
    finish(recipe, profile, tmp_path / "out", log)
    bundle = tmp_path / "out" / "device"
    before = (bundle / "manifest.json").read_bytes()
    write_profile(tmp_path, workload={"new_tokens": 9})
    process = start(recipe, profile, tmp_path / "out", log)
    while process.poll() is None and not list((tmp_path / "out").glob("device.tmp-*")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert (bundle / "manifest.json").read_bytes() == before
    assert verify_bundle(bundle) == []
    finish(recipe, profile, tmp_path / "out", log)
    assert (bundle / "manifest.json").read_bytes() != before
    assert not list((tmp_path / "out").glob("device.*"))
