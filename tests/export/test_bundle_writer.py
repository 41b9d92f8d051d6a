"""Bundles appear whole or not at all: real disk limits, dead writers, and what was there before."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import read_json, write_model, write_tokenizer

from edgestill.export.bundle_writer import finish_bundle, stage_bundle, tokenizer_files
from edgestill.runtime.bundle import open_bundle, verify_bundle
from edgestill.runtime.errors import BadInput, BundleError, OutputRefused
from edgestill.runtime.manifest import Graph, Manifest, ModelFacts, Precision, TensorSpec

FACTS = ModelFacts("llama", 82240, 2, 4, 2, 16, 64, 320, 128, 0, (0,))
GRAPH = Graph(
    "model.onnx", (TensorSpec("input_ids", "int64", ("b", "t")),), (TensorSpec("logits", "float32", ("b", "t", 320)),)
)
MANIFEST = Manifest("tiny", {}, FACTS, GRAPH, Precision("float32"), {"name": "cpu"}, {"bundle_mib": 1.0})
CONTENTS: dict[str, Path | bytes] = {
    "model.onnx": b"graph",
    "tokenizer.json": b"{}",
    "reference/parity.safetensors": b"rows",
}
REPORT: dict[str, Path | bytes] = {"report/report.json": b"{}"}


def _write(target: Path, **contents: Path | bytes) -> None:
    finish_bundle(stage_bundle(target, MANIFEST, CONTENTS | contents), REPORT, target)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_staged_bundle_verifies_and_so_does_the_finished_one(tmp_path: Path) -> None:
    target = tmp_path / "out" / "cpu"
    staged = stage_bundle(target, MANIFEST, CONTENTS)
    assert verify_bundle(staged) == []
    assert not target.exists()
    finish_bundle(staged, REPORT, target)
    assert verify_bundle(target) == []
    assert set(open_bundle(target).manifest.files) == {*CONTENTS, *REPORT}
    assert (target / "report" / "report.json").read_bytes() == b"{}"
    assert _names(target.parent) == ["cpu"]


def test_links_are_copied_as_files_of_their_own(tmp_path: Path) -> None:
    source = tmp_path / "blob"
    source.write_bytes(b"weights")
    (tmp_path / "link.onnx").symlink_to(source)
    _write(tmp_path / "cpu", **{"portable/model.onnx": tmp_path / "link.onnx"})
    shipped = tmp_path / "cpu" / "portable" / "model.onnx"
    assert not shipped.is_symlink()
    assert shipped.stat().st_nlink == 1
    source.write_bytes(b"changed")
    assert shipped.read_bytes() == b"weights"
    assert verify_bundle(tmp_path / "cpu") == []


def test_a_new_bundle_replaces_the_old_one_and_its_measurements(tmp_path: Path) -> None:
    target = tmp_path / "cpu"
    _write(target)
    (target / "local").mkdir()
    (target / "local" / "report.json").write_bytes(b"measured here")
    _write(target, **{"model.onnx": b"other graph"})
    assert (target / "model.onnx").read_bytes() == b"other graph"
    assert not (target / "local").exists()
    assert verify_bundle(target) == []
    assert _names(tmp_path) == ["cpu"]


def test_measurements_stay_with_the_same_bytes(tmp_path: Path) -> None:
    target = tmp_path / "cpu"
    _write(target)
    (target / "local").mkdir()
    (target / "local" / "report.json").write_bytes(b"measured here")
    _write(target)
    assert (target / "local" / "report.json").read_bytes() == b"measured here"
    assert verify_bundle(target) == []
    assert _names(tmp_path) == ["cpu"]


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "cpu"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputRefused, match="is no bundle"):
        stage_bundle(target, MANIFEST, CONTENTS)
    assert _names(target) == ["thesis.txt"]
    assert _names(tmp_path) == ["cpu"]
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(target)
    for other in ("file", "link"):
        with pytest.raises(OutputRefused, match="is no folder"):
            stage_bundle(tmp_path / other, MANIFEST, CONTENTS)


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    _write(tmp_path / "cpu")
    assert verify_bundle(tmp_path / "cpu") == []


@pytest.mark.parametrize(
    "name", ["../escape", "/etc/passwd", "local/report.json", "manifest.json", "Model.onnx", "a\\b"]
)
def test_names_that_a_reader_refuses_are_not_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="plain name of its own"):
        stage_bundle(tmp_path / "cpu", MANIFEST, CONTENTS | {name: b""})
    assert _names(tmp_path) == []


def test_a_report_must_not_replace_what_is_staged(tmp_path: Path) -> None:
    staged = stage_bundle(tmp_path / "cpu", MANIFEST, CONTENTS)
    with pytest.raises(BadInput, match=r"'model\.onnx' is there already"):
        finish_bundle(staged, {"model.onnx": b"other"}, tmp_path / "cpu")
    assert _names(tmp_path) == []


def test_a_manifest_that_its_reader_refuses_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx is required"):
        stage_bundle(tmp_path / "cpu", MANIFEST, {"tokenizer.json": b"{}"})
    assert _names(tmp_path) == []


def test_a_missing_source_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        stage_bundle(tmp_path / "cpu", MANIFEST, CONTENTS | {"model.onnx": tmp_path / "absent"})
    assert _names(tmp_path) == []


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_bundle_writer import CONTENTS, MANIFEST, REPORT, finish_bundle, stage_bundle
target, size, report = Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
try:
    staged = stage_bundle(target, MANIFEST, CONTENTS | {"model.onnx": b"g" * 10_000})
    print("staged")
    finish_bundle(staged, {"report/report.html": b"r" * report}, target)
except OSError as full:
    print("errno", full.errno)
"""


@pytest.mark.parametrize(
    ("limit", "report", "said"),
    [(5_000, 0, f"errno {errno.EFBIG}"), (50_000, 60_000, f"staged\nerrno {errno.EFBIG}")],
    ids=["staging", "finishing"],
)
def test_a_disk_that_takes_no_more_leaves_what_was_there(limit: int, report: int, said: str, tmp_path: Path) -> None:
    target = tmp_path / "cpu"
    _write(target)
    command = [sys.executable, "-c", LIMITED, str(target), str(Path(__file__).parent), str(limit), str(report)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert run.stdout.strip() == said, run.stderr
    assert _names(tmp_path) == ["cpu"]
    assert verify_bundle(target) == []
    assert (target / "model.onnx").read_bytes() == b"graph"


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead, alive = tmp_path / f"cpu.tmp-{_dead_pid()}", tmp_path / f"cpu.tmp-{os.getppid()}"
    other = tmp_path / "cpu.tmp-notes"
    for folder in (dead, alive, other):
        folder.mkdir()
    _write(tmp_path / "cpu")
    assert _names(tmp_path) == sorted(["cpu", alive.name, other.name])


def test_a_bundle_that_was_aside_when_its_writer_died_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "cpu"
    _write(target)
    target.rename(tmp_path / f"cpu.old-{_dead_pid()}")
    with pytest.raises(FileNotFoundError):
        stage_bundle(target, MANIFEST, CONTENTS | {"model.onnx": tmp_path / "absent"})
    assert _names(tmp_path) == ["cpu"]
    assert verify_bundle(target) == []


def test_a_replaced_bundle_left_aside_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "cpu"
    _write(target)
    target.rename(tmp_path / f"cpu.old-{_dead_pid()}")
    (tmp_path / next(iter(_names(tmp_path))) / "local").mkdir()
    _write(tmp_path / "new")
    (tmp_path / "new").rename(target)
    staged = stage_bundle(target, MANIFEST, CONTENTS)
    assert (target / "local").is_dir()
    assert _names(tmp_path) == ["cpu", staged.name]


def test_tokenizer_files_of_a_checkpoint(tmp_path: Path) -> None:
    files = tokenizer_files(write_model(tmp_path))
    assert files == {n: tmp_path / n for n in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")}


def test_chat_templates_wherever_they_are_kept(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template="{{ messages }}")
    assert tokenizer_files(tmp_path)["chat_template.jinja"] == tmp_path / "chat_template.jinja"
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    config = read_json(path)
    path.write_text(json.dumps({**config, "chat_template": "{{ bos_token }}ü"}))
    assert tokenizer_files(tmp_path)["chat_template.jinja"] == "{{ bos_token }}ü".encode()
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    path.write_text(json.dumps({**config, "chat_template": named}))
    assert tokenizer_files(tmp_path)["chat_template.jinja"] == b"plain"
    path.write_text(json.dumps({**config, "chat_template": named[:1]}))
    assert "chat_template.jinja" not in tokenizer_files(tmp_path)
    path.write_text("{")
    with pytest.raises(BadInput, match="not JSON"):
        tokenizer_files(tmp_path)


def test_a_checkpoint_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        tokenizer_files(tmp_path)
