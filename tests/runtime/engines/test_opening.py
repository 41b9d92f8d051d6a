"""Everything that may be missing on a machine: each is one line with its repair, and the verdict is incomplete, never a crash."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from engines import make_engine_bundle

from edgestill.runtime import load
from edgestill.runtime.bundle import open_bundle
from edgestill.runtime.cli import run
from edgestill.runtime.engines.cuda import Cuda, CudaError
from edgestill.runtime.engines.flavour import on_gpu, open_library
from edgestill.runtime.engines.opening import ensure_engine, target_ahead
from edgestill.runtime.errors import BadInput, MissingPart

try:
    Cuda()
    GPU = True
except MissingPart:
    GPU = False
no_gpu = pytest.mark.skipif(GPU, reason="a GPU is here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_bundle(tmp_path_factory.mktemp("engine") / "bundle")


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **words: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(words)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorrt_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPart, match=r"^tensorrt is not installed here; pip install 'edgestill\[tensorrt\]'$"):
        open_library("tensorrt")


def test_a_tensorrt_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(monkeypatch, "tensorrt", __version__="10.3.0")
    with pytest.raises(
        MissingPart, match=r"tensorrt 10.3.0 cannot update a cache in place; install tensorrt 10.15 or newer"
    ):
        open_library("tensorrt")
    fake_module(monkeypatch, "tensorrt", __version__="11.4.0.106")
    assert open_library("tensorrt").version == "11.4.0.106"


def test_a_tensorrt_whose_libraries_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(
        MissingPart, match=r"tensorrt does not load \(libnvinfer.so.10: .*\); reinstall it: pip install"
    ):
        open_library("tensorrt")


def test_bindings_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingPart, match=r"cuda.bindings is not installed here; pip install 'edgestill\[tensorrt\]'"):
        Cuda()


@no_gpu
def test_no_driver_or_gpu() -> None:
    with pytest.raises(
        MissingPart, match=r"no NVIDIA driver or GPU is here; run this on the target, or install its driver"
    ):
        Cuda()


def test_a_cuda_call_that_fails_says_which_and_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "cudaGetDeviceCount": (0, 1),
        "cudaSetDevice": (0,),
        "cudaMalloc": (2, None),
        "cudaGetErrorString": (0, b"out of memory"),
    }
    fake = SimpleNamespace(**{name: (lambda *_, a=answer: a) for name, answer in answers.items()})
    monkeypatch.setattr("importlib.import_module", lambda _: fake)
    cuda = Cuda()
    with pytest.raises(CudaError, match=r"cudaMalloc of 64.0 MiB failed: out of memory; free device memory"):
        cuda.allocate(64 << 20, 1)


@no_gpu
def test_load_and_generate_without_a_gpu(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MissingPart, match=r"no NVIDIA driver or GPU is here"):
        load(folder)
    assert run(["generate", str(folder), "hello"]) == 2
    assert run(["bench", str(folder)]) == 2
    assert run(["engine", str(folder)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "no NVIDIA driver or GPU is here" in line]) == 3


@no_gpu
def test_check_without_a_gpu_is_incomplete_and_says_where_to_run_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", str(folder), "--json", str(tmp_path / "check.json")]) == 3
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["verdict"] == "incomplete"
    assert report["engine"] == {
        "reason": "no NVIDIA driver or GPU is here; run this on the target, or install its driver"
    }
    rows = {row["name"]: row for row in report["checks"]}
    for name in ("inter_token_ms_p50", "peak_device_mib"):
        assert rows[name]["value"] is None
        assert rows[name]["reason"].endswith("no NVIDIA driver or GPU is here: run `edgestill check` on the target")
    assert rows["bundle_mib"]["value"] > 0


def test_commands_that_do_not_fit_the_engine(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bundles import make_bundle

    cpu = make_bundle(tmp_path / "cpu")
    assert run(["engine", str(cpu)]) == 2
    assert run(["tune", str(folder)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("engine onnxruntime-cpu has nothing to build; give a bundle for tensorrt or tensorrt-rtx")
    assert lines[1].endswith(
        "threads and spinning are settings of onnxruntime-cpu; engine tensorrt-rtx has none to tune"
    )


def test_the_full_tensorrt_builds_on_its_target_only(tmp_path: Path) -> None:
    bundle = open_bundle(make_engine_bundle(tmp_path / "bundle", engine="tensorrt"))
    with pytest.raises(
        BadInput, match=r"tensorrt builds engines on the GPU that will run them only; run this on the target"
    ):
        target_ahead(bundle, None)


@no_gpu
def test_the_reason_of_a_build_that_fails_in_its_process_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs pip install 'edgestill[rtx]'")
    monkeypatch.setenv("EDGESTILL_HOME", str(tmp_path / "home"))
    bundle = open_bundle(make_engine_bundle(tmp_path / "bundle"))
    target = dataclasses.replace(target_ahead(bundle, None), ahead=False)  # as if the card were here
    with pytest.raises(BadInput, match=r"tiny/llama: no NVIDIA driver or GPU is here"):
        ensure_engine(bundle, None, target=target)


def test_on_gpu_engines_are_known_by_name() -> None:
    assert [on_gpu(name) for name in ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-cpu")] == [
        True,
        True,
        True,
        False,
    ]


@no_gpu
def test_a_bundle_for_onnxruntimes_cuda_provider(tmp_path: Path) -> None:
    folder = make_engine_bundle(tmp_path / "bundle", engine="onnxruntime-cuda")
    assert open_bundle(folder).manifest.graph.cache == "fixed"
    with pytest.raises(MissingPart, match=r"no CUDAExecutionProvider; pip uninstall onnxruntime, then pip install"):
        load(folder)
