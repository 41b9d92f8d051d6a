"""Tuned settings are measured here, kept in local/, used by load, and ignored where they do not belong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundles import make_bundle
from typer.testing import CliRunner

from edgestill.runtime.bundle import open_bundle, verify_bundle
from edgestill.runtime.cli import app
from edgestill.runtime.measure import bench_bundle
from edgestill.runtime.model import load
from edgestill.runtime.settings import FILE, SPINNING, SessionSettings, read_settings, write_settings


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle", fused=True)


def test_the_command_measures_and_keeps_what_it_chose(bundle: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["tune", str(bundle), "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["word"] for row in found["measured"]} == {"threads", "spinning", "prefill_chunk"}
    assert all(row["workload_ms"] > 0 for row in found["measured"])
    settings = read_settings(open_bundle(bundle))
    assert settings == SessionSettings(**found["settings"])
    assert settings.threads == 1  # the profile grants one
    assert "kept in" in done.output
    assert verify_bundle(bundle) == []


def test_load_and_bench_use_them(bundle: Path) -> None:
    write_settings(open_bundle(bundle), SessionSettings(2, spinning=False, prefill_chunk=3), [])
    expected = {"threads": 2, "prefill_chunk": 3, SPINNING: "0"}
    assert load(bundle).backend.session == expected
    assert load(bundle, threads=1).backend.session == expected | {"threads": 1}
    found = bench_bundle(bundle, 8, 6)
    assert found["samples"]["session"] == expected
    assert found["samples"]["workload"]["threads"] == 2


def test_a_prompt_in_chunks_gives_the_same_text(bundle: Path) -> None:
    prompt = list(range(1, 40))
    whole = load(bundle).generate(prompt, max_new_tokens=20).token_ids
    write_settings(open_bundle(bundle), SessionSettings(1, prefill_chunk=7), [])
    assert load(bundle).generate(prompt, max_new_tokens=20).token_ids == whole


def test_settings_of_another_machine_or_bundle_are_ignored(bundle: Path, tmp_path: Path) -> None:
    write_settings(open_bundle(bundle), SessionSettings(2, prefill_chunk=3), [])
    file = bundle / "local" / FILE
    content = json.loads(file.read_text())
    assert read_settings(open_bundle(bundle)) is not None
    other = make_bundle(tmp_path / "other", "gpt2")
    for folder, change in ((other, {}), (bundle, {"machine": {**content["machine"], "cpu": "another"}})):
        (folder / "local").mkdir(exist_ok=True)
        from edgestill.runtime.bundle import write_local

        write_local(open_bundle(folder), FILE, json.dumps(content | change).encode())
        assert read_settings(open_bundle(folder)) is None
        assert load(folder).backend.session["threads"] == 1
    file.write_text("{}")  # does not fit its hash any more
    assert load(bundle).backend.session["prefill_chunk"] == 128
