"""`edgestill export` of checkpoints, texts and limits that cannot be used: exit 2, one line, no folder claimed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from building import Build, Command, Done
from recipes import write_profile

Damage = Callable[[Path], object]


def config_of(checkpoint: Path, **fields: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **fields}))


CHECKPOINTS: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "{at} has no config.json with a model_type; give a Hugging Face checkpoint folder"),
    "no weights": (
        lambda at: (at / "model.safetensors").unlink(),
        "{at}: holds no *.safetensors; save the checkpoint with save_pretrained",
    ),
    "weights cut short": (
        lambda at: os.truncate(at / "model.safetensors", 118000),
        "{at}/model.safetensors: has 118000 bytes where its header declares 118256; fetch it again",
    ),
    "no tokenizer": (
        lambda at: (at / "tokenizer.json").unlink(),
        "{at} has no tokenizer.json; save it with a fast tokenizer (AutoTokenizer, save_pretrained)",
    ),
    "foreign architecture": (
        lambda at: config_of(at, model_type="megabrain"),
        "{at}/config.json: model_type 'megabrain' cannot be loaded by transformers (The checkpoint you are trying to load "
        "has model type `megabrain` but Transformers does not recognize this architecture); use a causal language model "
        "that transformers ships",
    ),
}
"""Name -> damage to the checkpoint, the line."""


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_export_refuses_a_checkpoint(case: str, finished: Build, tmp_path: Path, edgestill: Command) -> None:
    damage, line = CHECKPOINTS[case]
    checkpoint, out = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(finished.stage("train") / "student", checkpoint)
    damage(checkpoint)
    done = edgestill("export", checkpoint, "--profile", write_profile(tmp_path), "--out", out)
    assert done == Done(2, "", f"edgestill: {line.replace('{at}', str(checkpoint))}\n")
    assert not out.exists()


def test_export_refuses_text_and_limits(finished: Build, tmp_path: Path, edgestill: Command) -> None:
    checkpoint, out, profile = finished.stage("train") / "student", tmp_path / "out", write_profile(tmp_path)
    limits, wrong, latin = (tmp_path / name for name in ("limits.yaml", "wrong.yaml", "latin.txt"))
    limits.write_text("format: 1\nlimits: {quantization_perplexity_ratio: 1.1}\n")
    wrong.write_text("format: 1\nlimits: {bundle_mib: 5}\n")
    latin.write_bytes(b"\xe9" * 4000)
    for arguments, line, claimed in (
        (
            ["--limits", limits],
            "limits on quantization_perplexity_ratio need text to judge on; give --held-out TEXT",
            False,
        ),
        (
            ["--limits", tmp_path / "no"],
            f"{tmp_path}/no: there is no such file; write one with `format: 1` and `limits:`",
            False,
        ),
        (
            ["--limits", wrong],
            f"{wrong}:2: limits.bundle_mib: belongs in the budget of a profile; move it there",
            False,
        ),
        (
            ["--held-out", tmp_path / "no"],
            f"--held-out {tmp_path}/no: there is no such file or folder; give text to judge on",
            False,
        ),
        (
            ["--held-out", latin],
            f"{latin}: byte 0 (0xe9) is not UTF-8, the only encoding read; convert it, for instance with iconv -t UTF-8",
            True,
        ),
    ):
        done = edgestill("export", checkpoint, "--profile", profile, "--out", out, *arguments)
        assert (done.code, done.errors) == (2, [f"edgestill: {line}"])
        assert out.exists() == claimed
        if not claimed:
            assert done.err == f"edgestill: {line}\n"
        else:
            assert not [p for p in (out / "work").iterdir() if not p.name.endswith(".partial")]
