"""Temperatures and offsets: planted values are found, and an offset never makes the fused target worse."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_model

from edgestill.compress.calibrate import CalibrationAnswers, calibrate, fit_offsets
from edgestill.compress.fusion import WeightRule
from edgestill.compress.packing import Part
from edgestill.compress.teachers import load_teacher, resolve_teachers
from edgestill.profiles.schema import FusionSpec, TeacherSpec
from edgestill.runtime.progress import QuietProgress

WINDOWS, LENGTH, V = 24, 9, 50


def part(*, masked: bool = False) -> Part:
    ids = np.random.default_rng(0).integers(0, V, (WINDOWS, LENGTH)).astype(np.int32)
    zeros = np.zeros(WINDOWS, np.int32)
    mask = (np.arange(LENGTH) >= np.arange(WINDOWS)[:, None] % 5).astype(np.uint8) if masked else None
    return Part(ids, mask, zeros.astype(np.int16), zeros, zeros.astype(np.int16))


def evidence(lift: float) -> CalibrationAnswers:
    """Teacher 0 is right on the first half of the windows, teacher 1 on the second; each is surer where it is right, but
    teacher 1 says so with an entropy that is `lift` nats too low everywhere."""
    g = torch.Generator().manual_seed(1)
    right = torch.arange(WINDOWS) < WINDOWS // 2
    knows = torch.stack([right, ~right]).unsqueeze(-1)
    noise = torch.randn(2, WINDOWS, LENGTH - 1, generator=g) * 0.1
    entropy = torch.where(knows, 1.0, 2.0) + noise
    entropy[1] -= lift
    return CalibrationAnswers(entropy, torch.where(knows, -1.0, -4.0) + noise)


def rule(**words: object) -> WeightRule:
    return WeightRule.of(FusionSpec(entropy_temperature=0.02, **words), [1.0, 1.0], V)  # type: ignore[arg-type]


def fused_nll(rule: WeightRule, given: CalibrationAnswers) -> float:
    sequence = torch.arange(WINDOWS).repeat_interleave(LENGTH - 1)
    answers = given.label_log_p.flatten(1)
    weights = rule.weights(given.entropy.flatten(1), answers, sequence, torch.zeros_like(sequence))
    return float(-torch.logsumexp(weights.log() + answers, 0).mean())


@pytest.mark.parametrize("granularity", ["sequence", "ema", "token"])
def test_an_offset_undoes_what_one_teacher_claims_too_much(granularity: str) -> None:
    plain = rule(granularity=granularity)
    windows = np.arange(WINDOWS)
    offsets = fit_offsets(plain, evidence(3.0), part(), windows)
    fitted = dataclasses.replace(plain, offsets=offsets)
    assert sum(offsets) == pytest.approx(0.0, abs=1e-5)
    assert 2.0 < (offsets[0] - offsets[1]) * math.log(V) < 4.0  # the entropies are 1 nat apart, one lowered by 3
    assert fused_nll(plain, evidence(3.0)) > 2.0
    assert fused_nll(fitted, evidence(3.0)) < 1.1


def test_fair_teachers_keep_an_offset_near_zero_and_the_target_is_no_worse() -> None:
    plain, fair = rule(), evidence(0.0)
    offsets = fit_offsets(plain, fair, part(), np.arange(WINDOWS))
    assert fused_nll(dataclasses.replace(plain, offsets=offsets), fair) <= fused_nll(plain, fair) + 1e-6


def test_masked_tokens_are_not_fitted() -> None:
    """What stands under the mask may be anything."""
    text, given = part(masked=True), evidence(3.0)
    windows = np.arange(WINDOWS)
    assert text.loss_mask is not None
    hidden = torch.from_numpy(text.loss_mask[:, 1:] == 0)
    changed = CalibrationAnswers(given.entropy.clone(), given.label_log_p.clone())
    changed.entropy[:, hidden] = 0.5
    changed.label_log_p[:, hidden] = -9.0
    assert fit_offsets(rule(), given, text, windows) == fit_offsets(rule(), changed, text, windows)


def test_useless_teachers_get_a_finite_offset() -> None:
    given = evidence(0.0)
    useless = CalibrationAnswers(
        given.entropy, torch.stack([given.label_log_p[0], torch.full((WINDOWS, LENGTH - 1), -30.0)])
    )
    offsets = fit_offsets(rule(), useless, part(), np.arange(WINDOWS))
    assert all(math.isfinite(o) for o in offsets)
    assert offsets[0] > offsets[1]


def test_temperature_is_fitted_on_what_counts(tmp_path: Path) -> None:
    """Other tokens under the mask, the same fit; without the mask, another one."""
    write_model(tmp_path / "t")
    facts = resolve_teachers([TeacherSpec(name="t", model=str(tmp_path / "t"), precision="float32")], Path)
    teacher = load_teacher(facts[0], torch.device("cpu"))
    mask = np.zeros((WINDOWS, LENGTH), np.uint8)
    mask[:, 1 : LENGTH // 2] = 1
    text = dataclasses.replace(part(), loss_mask=mask)
    other = text.token_ids.copy()
    other[:, LENGTH // 2 :] = 1  # behind what counts, so that no context changes

    def fit(what: Part) -> float:
        with QuietProgress().task("", WINDOWS) as task:
            found, _ = calibrate(teacher, what, np.arange(WINDOWS), batch_size=5, task=task)
        assert what.loss_mask is None or found.tokens == int(mask[:, 1:].sum())
        return found.perplexity

    assert fit(dataclasses.replace(text, token_ids=other)) == pytest.approx(fit(text), rel=1e-6)
    unmasked = (fit(dataclasses.replace(t, loss_mask=None)) for t in (text, dataclasses.replace(text, token_ids=other)))
    assert next(unmasked) != pytest.approx(next(unmasked), rel=1e-3)


def test_evidence_is_the_teachers_own(tmp_path: Path) -> None:
    """Entropy and label log-probability against the whole model's logits; saved and read back."""
    write_model(tmp_path / "t")
    facts = resolve_teachers([TeacherSpec(name="t", model=str(tmp_path / "t"), precision="float32")], Path)
    teacher = load_teacher(facts[0], torch.device("cpu"))
    vocabulary = facts[0].vocab_size
    text = part()
    text = dataclasses.replace(text, token_ids=text.token_ids % vocabulary)
    windows = np.array([1, 5, 7])
    with QuietProgress().task("", 3) as task:
        _, found = calibrate(teacher, text, windows, batch_size=2, task=task)
    ids = torch.from_numpy(text.token_ids[windows].astype(np.int64))
    with torch.no_grad():
        log_p = torch.log_softmax(teacher.model(ids).logits[:, :-1, :vocabulary].double(), -1)
    entropy, answer = found.entropy[0], found.label_log_p[0]
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answer.double(), log_p.gather(2, ids[:, 1:, None]).squeeze(2), atol=1e-5, rtol=1e-5)
    found.save(tmp_path)
    assert torch.equal(CalibrationAnswers.load(tmp_path).label_log_p[0], answer)
