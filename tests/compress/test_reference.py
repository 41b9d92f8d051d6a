"""The answers on held-out text are those of the target that the student was trained on."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_model

from edgestill.compress.low_rank import load_student
from edgestill.compress.packing import Part
from edgestill.compress.reference import make_reference
from edgestill.compress.setting import WeightRule
from edgestill.compress.teachers import Teacher, load_teacher, resolve_teachers
from edgestill.profiles.schema import FusionSpec, ReferenceSpec, TeacherSpec
from edgestill.runtime.progress import QuietProgress

WINDOWS, LENGTH, TAU = 4, 12, 0.02


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("reference")
    return [write_model(folder / name, seed=seed, width=32) for name, seed in (("a", 1), ("b", 2), ("student", 3))]


def log_p(model: Path, ids: torch.Tensor, vocabulary: int | None = None) -> torch.Tensor:
    """[W, T - 1, V]; of a teacher over the tokens that all have."""
    with torch.no_grad():
        logits = load_student(model, torch.float32).eval()(ids).logits[:, :-1, :vocabulary]
    return torch.log_softmax(logits.double(), -1)


@pytest.mark.parametrize("masked", [False, True])
def test_weights_pool_over_the_tokens_that_count(masked: bool, models: list[Path]) -> None:
    """Prompts do not decide which teacher is trusted, as they do not in training; one window has nothing that counts."""
    specs = [TeacherSpec(name=p.name, model=str(p), precision="float32") for p in models[:2]]
    facts = resolve_teachers(specs, Path)
    vocabulary = facts[0].vocab_size
    ids = np.random.default_rng(0).integers(1, vocabulary, (WINDOWS, LENGTH)).astype(np.int32)
    mask = (np.arange(LENGTH) >= np.array([[0], [5], [LENGTH], [9]])).astype(np.uint8) if masked else None
    zeros = np.zeros(WINDOWS, np.int32)
    part = Part(ids, mask, zeros.astype(np.int16), zeros, zeros.astype(np.int16))
    rule = WeightRule.of(FusionSpec(granularity="sequence", entropy_temperature=TAU, floor=0.0), [1.0, 1.0], vocabulary)
    loads: list[partial[Teacher]] = [partial(load_teacher, f, torch.device("cpu")) for f in facts]
    spec = ReferenceSpec(tokens=WINDOWS * LENGTH, top_k=8)
    student = load_student(models[2], torch.float32).eval()
    with QuietProgress().task("", 3 * WINDOWS) as task:
        found = make_reference(part, ["all"], spec, loads, [1.0, 1.0], rule, student, batch_size=3, task=task)
    order = [next(i for i in range(WINDOWS) if np.array_equal(ids[i], row)) for row in found.token_ids]
    text = torch.from_numpy(found.token_ids.astype(np.int64))
    counts = torch.ones(WINDOWS, LENGTH - 1) if mask is None else torch.from_numpy(mask[order][:, 1:]).float()
    each = torch.stack([log_p(model, text, vocabulary) for model in models[:2]])
    entropy = -(each.exp() * each).sum(-1)
    mean = (entropy * counts).sum(-1) / counts.sum(-1).clamp_min(1)
    weights = torch.softmax(-mean / math.log(vocabulary) / TAU, 0)
    fused = (weights[:, :, None, None] * each.exp()).sum(0).log()
    expected = fused.gather(2, text[:, 1:, None]).squeeze(2)
    assert found.fused is not None
    ours = torch.from_numpy(found.fused.label_logp).view(WINDOWS, -1).double()
    scored = torch.from_numpy(found.scored).view(WINDOWS, -1).bool()
    assert torch.equal(scored, counts.bool())
    torch.testing.assert_close(ours[scored], expected[scored], atol=1e-4, rtol=0)
    own = log_p(models[2], text).gather(2, text[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(
        torch.from_numpy(found.student_label_logp).view(WINDOWS, -1).double(), own, atol=1e-4, rtol=0
    )
    alone = each.gather(3, text[None, :, 1:, None].expand(2, -1, -1, -1)).squeeze(3)
    torch.testing.assert_close(
        torch.from_numpy(found.teacher_label_logp).view(2, WINDOWS, -1).double(), alone, atol=1e-4, rtol=0
    )
