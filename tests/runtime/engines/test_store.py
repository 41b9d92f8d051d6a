"""Engines on disk, with a builder that only counts: found, sealed, built once, kept where there is room, refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from engines import make_engine_bundle

from edgestill.runtime import gpu
from edgestill.runtime.bundle import open_bundle, verify_bundle
from edgestill.runtime.engines import store, trust
from edgestill.runtime.engines.builder import BuiltEngine
from edgestill.runtime.engines.plan import fingerprint_of, plan_of
from edgestill.runtime.engines.store import Target, build_engine, find_engine, others, places, wanted
from edgestill.runtime.engines.trust import seal
from edgestill.runtime.errors import BadInput, BundleError, OutputRefused
from edgestill.runtime.manifest import MANIFEST

HERE = Target("8.9", "13.0", "NVIDIA card")
LIBRARY: Any = SimpleNamespace(version="1.7", flavour=SimpleNamespace(name="tensorrt-rtx", times_kernels=True))


class Counting:
    """In place of EngineBuilder: notes what it was asked for, and takes a moment."""

    asked: ClassVar[list[tuple[str | None, bytes]]] = []

    def __init__(self, library: Any, log: Any, step: Any = None) -> None:
        log("info: building")

    def build(
        self, path: Path, plan: Any, graph: Any, facts: Any, card: str | None, timing: bytes = b""
    ) -> BuiltEngine:
        self.asked.append((card, timing))
        time.sleep(0.2)
        return BuiltEngine(f"engine {len(self.asked)}".encode(), 10, 2, 0.1, 0.2, b"times")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("EDGESTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(store, "EngineBuilder", Counting)
    Counting.asked = []
    return open_bundle(make_engine_bundle(tmp_path / "bundle"))


def test_built_once_and_found_again(bundle: Any) -> None:
    assert find_engine(bundle, "1.7", HERE) is None
    built = build_engine(bundle, LIBRARY, HERE)
    assert (built.data, built.built_now) == (b"engine 1", True)
    again = build_engine(bundle, LIBRARY, HERE)
    assert (again.data, again.built_now, len(Counting.asked)) == (b"engine 1", False, 1)
    folder = bundle.folder / "local" / "engines" / built.fingerprint.digest
    assert {path.name for path in folder.iterdir()} == {"engine", "engine.json", "build.log"}
    assert (folder / "build.log").read_text() == "info: building\n"
    record = json.loads((folder / "engine.json").read_text())["build"]
    assert record["bytes"] == 8 and record["layers"] == 10 and record["seconds"] >= 0.2
    assert record["peak_rss_mib"] > 0
    assert verify_bundle(bundle.folder) == [], "local/ is not part of what is declared"


class Memory:
    """Device memory of 700 MiB while an engine is built, none before and after."""

    reason = None
    peak_mib = 0.0

    def look(self) -> None:
        self.peak_mib = max(self.peak_mib, 700.0 if Counting.asked else 0.0)


@pytest.mark.parametrize(("ahead", "mib", "of"), [(False, 700.0, "of the building process"), (True, None, None)])
def test_the_record_says_what_the_build_took_of_the_card(
    ahead: bool, mib: float | None, of: str | None, bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ahead nothing runs on a card, even where there is one."""
    monkeypatch.setattr(gpu, "watched_memory", lambda _: Memory())
    record = build_engine(bundle, LIBRARY, Target("8.9", "13.0", ahead=ahead)).record
    assert (record["peak_device_mib"], record["device_memory"]) == (mib, of)


def test_measured_kernel_times_are_used_again_and_never_come_from_a_bundle(bundle: Any, tmp_path: Path) -> None:
    build_engine(bundle, LIBRARY, HERE)
    other = open_bundle(make_engine_bundle(tmp_path / "other", weights="int4"))
    build_engine(other, LIBRARY, HERE)
    assert [timing for _, timing in Counting.asked] == [b"", b"times"]
    assert (tmp_path / "home" / "timing" / "tensorrt-rtx-1.7-8.9-nvidia-card").is_file()


@pytest.mark.parametrize(
    ("target", "version", "why"),
    [
        (Target("8.6", "13.0"), "1.7", "compute_capability: 8.9, here 8.6"),
        (Target("8.9", "12.9"), "1.7", "driver: 13.0, here 12.9"),
        (HERE, "1.8", "version: 1.7, here 1.8"),
    ],
)
def test_another_machines_engine_is_refused_by_name_and_built_anew(
    target: Target, version: str, why: str, bundle: Any
) -> None:
    build_engine(bundle, LIBRARY, HERE)
    assert find_engine(bundle, version, target) is None
    _, fingerprint = wanted(bundle, version, target)
    (line,) = others(bundle, fingerprint)
    assert line.endswith(why)
    library = SimpleNamespace(version=version, flavour=LIBRARY.flavour)
    assert build_engine(bundle, library, target).data == b"engine 2"  # type: ignore[arg-type]


def test_an_engine_that_was_built_ahead_serves_any_driver(bundle: Any) -> None:
    ahead = Target("8.9", None, ahead=True)
    build_engine(bundle, LIBRARY, ahead)
    assert Counting.asked == [("8.9", b"")]
    found = find_engine(bundle, "1.7", HERE)
    assert found is not None and found.data == b"engine 1"


def test_an_engine_from_elsewhere_is_never_opened(bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's key: the same bytes with that machine's seal read as absent."""
    built = build_engine(bundle, LIBRARY, HERE)
    monkeypatch.setenv("EDGESTILL_HOME", str(tmp_path / "another-home"))
    assert find_engine(bundle, "1.7", HERE) is None
    (line,) = others(bundle, built.fingerprint)
    assert line.endswith("not sealed by this machine, or damaged")
    assert build_engine(bundle, LIBRARY, HERE).data == b"engine 2"


def test_a_changed_byte_is_never_opened(bundle: Any) -> None:
    built = build_engine(bundle, LIBRARY, HERE)
    folder = Path(built.record["folder"])
    (folder / "engine").write_bytes(b"engine X")
    assert find_engine(bundle, "1.7", HERE) is None
    for content in (b"", b"{}", b'{"fingerprint": {}, "seal": "", "build": {}}', b"\xff"):
        (folder / "engine.json").write_bytes(content)
        assert find_engine(bundle, "1.7", HERE) is None
        assert others(bundle, built.fingerprint)[0].endswith("its record can't be read")
    assert build_engine(bundle, LIBRARY, HERE).data == b"engine 2"


def test_the_key_stays_with_its_user(bundle: Any, tmp_path: Path) -> None:
    build_engine(bundle, LIBRARY, HERE)
    key = tmp_path / "home" / "machine.key"
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_bytes()) == 32
    key.write_bytes(b"short")
    with pytest.raises(OutputRefused, match=r"holds 5 bytes, not a key of 32; delete it"):
        find_engine(bundle, "1.7", HERE)


def test_the_key_of_two_who_are_first_at_once_is_one_and_nobody_else_can_ever_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGESTILL_HOME", str(tmp_path / "home"))
    modes: set[int] = set()
    real, both = os.link, threading.Barrier(4)

    def link(source: Path, target: Path) -> None:
        both.wait(30)  # all have made theirs
        modes.add(source.stat().st_mode & 0o777)
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    found: list[str] = []
    before = os.umask(0)
    try:
        threads = [threading.Thread(target=lambda: found.append(seal(b"engine", "fingerprint"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os.umask(before)
    assert len(found) == 4 and len(set(found)) == 1 and modes == {0o600}
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["machine.key"]


def test_a_home_that_keeps_no_key_is_refused_before_the_build(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(trust, "_make_key", refuse)
    with pytest.raises(OutputRefused, match=r"key for engines can't be kept \(Permission denied\); set EDGESTILL_HOME"):
        build_engine(bundle, LIBRARY, HERE)
    assert not Counting.asked


def test_an_engine_of_timed_kernels_is_of_one_card_and_one_system(bundle: Any) -> None:
    """TensorRT-RTX finishes its engines on the card: there neither matters."""
    plan = plan_of(bundle.manifest)
    rtx = [fingerprint_of(plan, "1.7", "8.9", "580", gpu) for gpu in ("L4", "RTX 4090")]
    assert rtx[0] == rtx[1] and rtx[0].gpu is None and len(rtx[0].system.split()) == 2
    full = dataclasses.replace(plan, flavour="tensorrt")
    l4, ada = (fingerprint_of(full, "11.4", "8.9", "580", gpu) for gpu in ("L4", "RTX 4090"))
    assert l4.differences(ada) == ["gpu: RTX 4090, here L4"]
    assert len(l4.system.split()) > 2, "the version of the system is part of it"


def test_of_two_at_once_one_builds(bundle: Any) -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(build_engine(bundle, LIBRARY, HERE))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Counting.asked) == 1 and sorted(engine.built_now for engine in found) == [False, False, True]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes: the next test plants the refusal")
def test_a_read_only_bundle_keeps_its_engine_at_home(bundle: Any, tmp_path: Path) -> None:
    (bundle.folder / "local").mkdir()
    bundle.folder.joinpath("local").chmod(0o555)
    built = build_engine(bundle, LIBRARY, HERE)
    assert Path(built.record["folder"]).is_relative_to(tmp_path / "home" / "engines")


def test_a_bundle_that_cannot_be_written_keeps_its_engine_at_home(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only file system, for any user."""
    real, blocked = Path.mkdir, bundle.folder

    def mkdir(path: Path, *rest: Any, **words: Any) -> None:
        if path.is_relative_to(blocked):
            raise OSError(30, "Read-only file system", str(path))
        real(path, *rest, **words)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    built = build_engine(bundle, LIBRARY, HERE)
    assert Path(built.record["folder"]).is_relative_to(tmp_path / "home" / "engines")
    assert not (bundle.folder / "local").exists()
    found = find_engine(bundle, "1.7", HERE)
    assert found is not None and found.data == b"engine 1"
    blocked = tmp_path
    _, fingerprint = wanted(bundle, "1.7", Target("8.6", "13.0"))
    with pytest.raises(OutputRefused, match=r"no engine can be kept in .* or .*; make one of them writable"):
        store._writable(places(bundle, fingerprint))


def test_a_shipped_engine_needs_the_manifests_hash(bundle: Any, tmp_path: Path) -> None:
    from edgestill.export.bundle_writer import finish_bundle, stage_bundle

    _, fingerprint = wanted(bundle, "1.7", Target("8.9", None))
    name = f"engines/{fingerprint.digest}.engine"
    contents = {n: bundle.folder / n for n in bundle.manifest.files}
    target = tmp_path / "shipping"
    finish_bundle(stage_bundle(target, bundle.manifest, contents), {name: b"shipped"}, target)
    shipping = open_bundle(target)
    found = find_engine(shipping, "1.7", HERE)
    assert found is not None and found.data == b"shipped"
    shipping.path(name)  # its hash was right when it was looked at
    (target / name).write_bytes(b"planted")
    with pytest.raises(BundleError, match=r"is not the engine that the manifest declares"):
        find_engine(shipping, "1.7", HERE)
    for verify in (True, False):  # what is executed is hashed even where the caller skips hashes
        with pytest.raises(BundleError, match=r"sha256 is|is not the engine that the manifest declares"):
            find_engine(open_bundle(target, verify), "1.7", HERE)


def test_undeclared_engines_beside_the_manifest_are_refused(bundle: Any) -> None:
    folder = bundle.folder / "engines"
    folder.mkdir()
    (folder / "x.engine").write_bytes(b"planted")
    with pytest.raises(BundleError, match=r"is not listed in manifest.json"):
        open_bundle(bundle.folder)


def test_a_card_that_cannot_run_the_bundle_is_refused_before_any_work(bundle: Any) -> None:
    with pytest.raises(
        BadInput, match=r"builds nothing for NVIDIA H200 of compute capability 9.0; use engine tensorrt"
    ):
        build_engine(bundle, LIBRARY, Target("9.0", "13.0", "NVIDIA H200"))
    assert not Counting.asked


def test_a_failed_build_leaves_its_log_and_no_engine(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> BuiltEngine:
        raise BadInput("tensorrt-rtx 1.7 builds no engine")

    monkeypatch.setattr(Counting, "build", refuse)
    with pytest.raises(BadInput, match=r"builds no engine"):
        build_engine(bundle, LIBRARY, HERE)
    _, fingerprint = wanted(bundle, "1.7", HERE)
    folder = places(bundle, fingerprint)[0]
    assert [path.name for path in folder.iterdir()] == ["build.log"]
    assert find_engine(bundle, "1.7", HERE) is None


def test_deleting_local_is_always_safe(bundle: Any) -> None:
    build_engine(bundle, LIBRARY, HERE)
    shutil.rmtree(bundle.folder / "local")
    assert find_engine(open_bundle(bundle.folder), "1.7", HERE) is None
    assert (bundle.folder / MANIFEST).is_file()
    assert build_engine(bundle, LIBRARY, HERE).data == b"engine 2"
