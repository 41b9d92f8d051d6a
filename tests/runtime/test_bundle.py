"""A bundle is refused when any byte, name or link of it is not what its manifest says."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import PROFILE, checkpoint, make_bundle, write_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import read_json

from edgestill.runtime.bundle import external_files, open_bundle, read_local, read_manifest, verify_bundle, write_local
from edgestill.runtime.errors import BundleError, OutputRefused
from edgestill.runtime.manifest import Manifest, canonical_json, manifest_to_json
from edgestill.runtime.manifest_reader import manifest_from_json
from edgestill.runtime.model import load

REFERENCE = "reference/held_out.safetensors"
FILES = ("model.onnx", "tokenizer.json", "generation_config.json", REFERENCE, "manifest.json")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("pristine") / "bundle", extra_files={REFERENCE: b"answers " * 100})


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the digest of its new content, as an attacker or a bug would."""
    body = read_json(folder / "manifest.json")
    body.pop("digest")
    change(body)
    body["digest"] = hashlib.sha256(canonical_json(body)).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(body), encoding="utf-8")


def test_a_whole_bundle_has_no_problem_and_reads_back_equal(folder: Path) -> None:
    assert verify_bundle(folder) == []
    manifest = read_manifest(folder)
    assert manifest.files.keys() == set(FILES) - {"manifest.json"}
    assert manifest_from_json(manifest_to_json(manifest).encode(), "copy") == manifest
    assert open_bundle(folder).path("tokenizer.json") == folder.resolve() / "tokenizer.json"


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    problems = verify_bundle(folder)
    assert len(problems) == 1
    assert name in problems[0]
    if name == REFERENCE:  # loading does not open it: it is refused when it is asked for
        load(folder)
        with pytest.raises(BundleError, match="held_out"):
            open_bundle(folder).path(name)
    else:
        with pytest.raises(BundleError, match=name):
            load(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncate", "remove", "symlink", "folder"])
def test_a_damaged_structure_is_refused_by_verify_and_load(
    folder: Path, tmp_path: Path, name: str, damage: str
) -> None:
    file = folder / name
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.rename(tmp_path / "original")
        if damage == "symlink":
            file.symlink_to(tmp_path / "original")
        if damage == "folder":
            file.mkdir()
    problems = verify_bundle(folder)
    assert len(problems) == 1
    assert name in problems[0]
    with pytest.raises(BundleError, match=Path(name).name):
        load(folder, verify=False)


def test_an_undeclared_file_is_refused_but_an_empty_folder_and_local_are_not(folder: Path) -> None:
    (folder / "empty" / "deeper").mkdir(parents=True)
    (folder / "local" / "engines").mkdir(parents=True)
    (folder / "local" / "engines" / "anything").write_bytes(b"x")
    assert verify_bundle(folder) == []
    (folder / "reference" / "more.bin").write_bytes(b"x")
    (problem,) = verify_bundle(folder)
    assert "more.bin" in problem
    with pytest.raises(BundleError, match=r"more\.bin"):
        load(folder)


def test_links_to_folders_and_special_files_are_refused(folder: Path, tmp_path: Path) -> None:
    import os

    (folder / "reference").rename(tmp_path / "elsewhere")
    (folder / "reference").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    os.mkfifo(folder / "pipe")
    problems = verify_bundle(folder)
    assert [("reference" in p, "pipe" in p) for p in sorted(problems)] == [(False, True), (True, False)]


@pytest.mark.parametrize("target", ["..", "reference"])
def test_local_must_not_be_a_link(folder: Path, target: str) -> None:
    (folder / "local").symlink_to(target, target_is_directory=True)
    assert any("local" in p for p in verify_bundle(folder))
    with pytest.raises(BundleError, match="local"):
        open_bundle(folder)


def test_the_folder_itself_may_be_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(folder, target_is_directory=True)
    assert verify_bundle(tmp_path / "latest") == []
    assert load(tmp_path / "latest").facts.n_layers == 2


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        (problem,) = verify_bundle(path)
        assert "not a bundle" in problem


ENTRY = {"sha256": "0" * 64, "size": 1}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/etc/passwd", "absolute"),
        ("C:/x", "drive"),
        ("../outside", r"'\.\.'"),
        ("a/../../b", r"'\.\.'"),
        ("./a", "empty part"),
        ("a//b", "empty part"),
        ("a\\b", "backslash"),
        ("", "empty"),
        ("a\x00b", "control"),
        ("local/x", "must not be listed"),
        ("Local/x", "must not be listed"),
        ("manifest.json", "must not be listed"),
        ("Model.onnx", "differ only in case"),
        ("Reference/x", "differ only in case"),
        ("model.onnx/x", "both a file and a folder"),
        ("cafe\u0301.json", "differ only in case"),
    ],
)
def test_unsafe_and_clashing_names_are_refused(folder: Path, name: str, why: str) -> None:
    def change(body: dict[str, Any]) -> None:
        body["files"]["caf\u00e9.json"] = ENTRY
        body["files"][name] = ENTRY

    rewrite(folder, change)
    assert len(verify_bundle(folder)) == 1
    with pytest.raises(BundleError, match=why):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda b: b.update(extra=1), "unknown field extra"),
        (lambda b: b.pop("model"), "field model is missing"),
        (lambda b: b["model"].pop("n_layers"), r"field model\.n_layers is missing"),
        (lambda b: b["model"].update(n_layers="2"), r'model\.n_layers is "2", not int'),
        (lambda b: b["model"].update(n_layers=True), r"model\.n_layers is true, not int"),
        (lambda b: b["model"].update(n_layers=2.0), r"model\.n_layers is 2\.0, not int"),
        (lambda b: b["model"].update(n_layers=0), r"model\.n_layers is 0"),
        (lambda b: b["model"].update(eos_token_ids=[0, "1"]), r"model\.eos_token_ids\[1\]"),
        (lambda b: b["model"].update(eos_token_ids=[320]), "outside the vocabulary"),
        (lambda b: b["precision"].update(weights="int3"), "'int3', not one of"),
        (lambda b: b["graph"].update(inputs={}), r"graph\.inputs is \{\}"),
        (lambda b: b["graph"]["inputs"][0].update(shape=[1.5]), r"graph\.inputs\[0\]\.shape\[0\]"),
        (lambda b: b["graph"].update(file="other.onnx"), r"other\.onnx is required"),
        (lambda b: b["files"].pop("tokenizer.json"), r"tokenizer\.json is required"),
        (lambda b: b["files"]["model.onnx"].update(sha256="A" * 64), "lowercase hex"),
        (lambda b: b["files"]["model.onnx"].update(size=-1), "-1"),
        (lambda b: b.update(limits={"x": "1"}), "limits"),
        (lambda b: b.update(teachers=[1]), r"teachers\[0\]"),
        (lambda b: b.update(schema_version=2), "schema_version 2 is newer than 1"),
        (lambda b: b.update(schema_version="1"), "schema_version is '1'"),
        (lambda b: b.pop("schema_version"), "schema_version is None"),
    ],
)
def test_fields_are_checked_by_name(folder: Path, change: Callable[[dict[str, Any]], object], why: str) -> None:
    rewrite(folder, change)
    with pytest.raises(BundleError, match=why):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "not an object"),
        ("{", "not valid JSON"),
        ('{"name": 1, "name": 2}', "'name' is there twice"),
        ('{"schema_version": 1, "limits": {"x": NaN}}', "NaN"),
        ('{"schema_version": 1, "limits": {"x": 1e999}}', "not JSON compliant|Out of range"),
        ('{"schema_version": 1}', "digest"),
        ("[" * 100_000, "not valid JSON"),
        ('{"schema_version": 1, "name": "\\ud800"}', "surrogates"),
        ("\ud800", "not valid JSON"),
    ],
)
def test_what_is_not_a_manifest_is_refused(text: str, why: str) -> None:
    with pytest.raises(BundleError, match=why):
        manifest_from_json(text.encode("utf-8", "surrogatepass"), "manifest.json")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_the_manifest_is_refused_or_means_the_same(pristine: Path, data: st.DataObject) -> None:
    original = (pristine / "manifest.json").read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    changed = original[:at] + bytes([data.draw(st.integers(0, 255))]) + original[at + 1 :]
    try:
        manifest: Manifest | None = manifest_from_json(changed, "manifest.json")
    except BundleError:
        manifest = None
    assert manifest in (None, manifest_from_json(original, "manifest.json"))


@pytest.fixture
def with_external_data(folder: Path) -> Path:
    """The same model with its values in model.onnx.data."""
    import onnx

    onnx.save(
        onnx.load(folder / "model.onnx"),
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    write_manifest(folder, read_json(checkpoint() / "config.json"), PROFILE, {})
    return folder


def test_values_beside_the_graph_are_checked_with_it(with_external_data: Path) -> None:
    folder = with_external_data
    assert external_files(folder / "model.onnx") == ["model.onnx.data"]
    assert verify_bundle(folder) == []
    load(folder)
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    bundle = open_bundle(folder)
    for _ in range(2):  # a refusal must not be remembered as a check
        with pytest.raises(BundleError, match=r"model\.onnx\.data"):
            bundle.path("model.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx\.data"):
        load(folder)


def test_a_graph_that_names_a_file_outside_the_manifest_is_refused(with_external_data: Path) -> None:
    folder = with_external_data
    graph = (folder / "model.onnx").read_bytes().replace(b"model.onnx.data", b"../../../x/data")
    (folder / "model.onnx").write_bytes(graph)
    (folder / "model.onnx.data").unlink()
    write_manifest(folder, read_json(checkpoint() / "config.json"), PROFILE, {})
    assert any("../../../x/data" in p for p in verify_bundle(folder))
    with pytest.raises(BundleError, match="x/data"):
        load(folder)


def test_long_names_of_external_files_are_read_whole(tmp_path: Path) -> None:
    name = "d" * 200
    (tmp_path / "g.onnx").write_bytes(b"..\x0a\x08location\x12\xc8\x01" + name.encode() + b"..")
    assert external_files(tmp_path / "g.onnx") == [name]


def test_local_items_come_back_until_they_are_damaged(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert read_local(bundle, "engines/a/plan") is None
    file = write_local(bundle, "engines/a/plan", b"one")
    write_local(bundle, "engines/a/plan", b"two")
    assert read_local(bundle, "engines/a/plan") == b"two"
    assert sorted(p.name for p in file.parent.iterdir()) == ["plan", "plan.sha256"]
    assert verify_bundle(folder) == []
    file.write_bytes(b"tam")
    assert read_local(bundle, "engines/a/plan") is None
    file.with_name("plan.sha256").unlink()
    assert read_local(bundle, "engines/a/plan") is None


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", ""])
def test_local_items_stay_in_local(folder: Path, name: str) -> None:
    bundle = open_bundle(folder)
    with pytest.raises(OutputRefused):
        write_local(bundle, name, b"x")


def test_local_items_are_not_written_through_links(folder: Path, tmp_path: Path) -> None:
    bundle = open_bundle(folder)
    (folder / "local").mkdir()
    (folder / "local" / "engines").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(OutputRefused, match="symlink"):
        write_local(bundle, "engines/plan", b"x")
    assert not (tmp_path / "plan").exists()


def test_a_local_folder_that_cannot_be_written_is_refused_in_one_line(folder: Path) -> None:
    bundle = open_bundle(folder)
    (folder / "local").write_bytes(b"a file where the folder should be")
    with pytest.raises(OutputRefused, match="can't be written"):
        write_local(bundle, "tuned.json", b"{}")
