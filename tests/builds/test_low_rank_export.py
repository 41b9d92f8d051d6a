"""A student that lost layers, width and rank goes through `edgestill export` like any other checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from building import Command
from recipes import write_material, write_profile

from edgestill.compress.low_rank import LowRankLinear, load_student
from edgestill.compress.packing import Part
from edgestill.compress.student import count_parameters, make_student
from edgestill.compress.teachers import resolve_teachers
from edgestill.profiles.schema import StudentSpec, TeacherSpec


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prose teacher with two of three layers, 48 of 64 channels and low rank."""
    folder = tmp_path_factory.mktemp("low")
    write_material(folder)
    facts = resolve_teachers([TeacherSpec(name="prose", model="prose", precision="float32")], folder.joinpath)
    spec = StudentSpec.model_validate(
        {
            "init": "teacher:prose",
            "layers": 2,
            "choose": "block_influence",
            "narrow": {"hidden_size": 48, "key_value_heads": 1},
            "low_rank": {"rank_fraction": 0.4, "steps": 4},
        }
    )
    ids = np.random.default_rng(0).integers(0, facts[0].vocab_size, (8, 32)).astype(np.uint16)
    zeros = np.zeros(8, np.int16)
    text = Part(ids, None, zeros, np.arange(8, dtype=np.int32), zeros)
    made = make_student(spec, facts, facts[0].vocab_size, 0, text=text)
    made.model.save_pretrained(folder / "student")
    shutil.copy(folder / "prose" / "tokenizer.json", folder / "student")
    shutil.copy(folder / "prose" / "tokenizer_config.json", folder / "student")
    return folder / "student"


def test_a_low_rank_student_becomes_a_bundle_that_passes(checkpoint: Path, tmp_path: Path, edgestill: Command) -> None:
    profile, text = write_profile(tmp_path), checkpoint.parent / "prose.txt"
    limits, out = tmp_path / "limits.yaml", tmp_path / "out"
    limits.write_text("format: 1\nlimits: {quantization_perplexity_ratio: 2.0}\n")
    done = edgestill("export", checkpoint, "--profile", profile, "--out", out, "--held-out", text, "--limits", limits)
    assert (done.code, done.errors) == (0, [])
    bundle = out / "device"
    manifest = json.loads((bundle / "manifest.json").read_text())
    student = load_student(checkpoint, torch.float32)
    assert sum(isinstance(module, LowRankLinear) for module in student.modules()) == 14
    assert manifest["model"]["parameters"] == count_parameters(student)
    (onnx,) = (json.loads(found.read_text()) for found in (out / "work").glob("onnx-*/stage.json"))
    assert all(row["passed"] for row in onnx["info"]["parity"])
    assert len(onnx["info"]["parity"]) == 12  # the plain graph and the fused one
