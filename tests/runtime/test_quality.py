"""Quality against exact arithmetic: a bigram table is a model whose every probability is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgestill.runtime.errors import BundleError
from edgestill.runtime.quality import (
    bucket_kl,
    measure_quality,
    parity_estimate,
    quality_beside,
    quality_estimates,
    score_step,
    score_windows,
)
from edgestill.runtime.reference import FusedAnswers, Reference

V, W, T, K = 11, 5, 9, 3
NO_ROWS = np.zeros((0, 2), np.int32)


class Bigram:
    """Logits depend on the current token only: row `table[token]`. Yields chunks of uneven length, as a backend may."""

    def __init__(self, table: npt.NDArray[np.float32]) -> None:
        self.table = table

    def forward_windows(
        self, token_ids: npt.NDArray[np.integer], path: str = "prefill"
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        cuts = range(token_ids.shape[1] + 1) if path == "cached" else (0, 4, token_ids.shape[1])
        for start, end in itertools.pairwise(cuts):
            yield start, self.table[token_ids[:, start:end]]


def log_softmax(x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    x = x.astype(np.float64)
    return np.asarray(
        x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
    )


def make(seed: int = 0, k: int = K) -> tuple[Bigram, Bigram, Reference]:
    """An artifact, its fused teacher, and the teacher's reference."""
    rng = np.random.default_rng(seed)
    artifact = Bigram(rng.normal(0, 2, (V, V)).astype(np.float32))
    teacher = Bigram(artifact.table + rng.normal(0, 0.5, (V, V)).astype(np.float32))
    tokens = rng.integers(0, V, (W, T)).astype(np.int32)
    logp = log_softmax(teacher.table)[tokens[:, :-1]].reshape(-1, V)
    ids = np.argsort(-logp, axis=1)[:, :k].astype(np.int32)
    kept = np.take_along_axis(logp, ids, 1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1 - np.exp(kept).sum(1), 0)) if k < V else np.full(len(logp), -np.inf)
    labels = tokens[:, 1:].reshape(-1)
    label = logp[np.arange(len(labels)), labels].astype(np.float32)
    scored = np.ones(W * (T - 1), np.uint8)
    scored[::7] = 0
    reference = Reference(
        token_ids=tokens,
        scored=scored,
        domain=np.array([0, 0, 1, 1, 1], np.int16),
        block=np.array([0, 1, 2, 2, 3], np.int32),
        student_label_logp=label - np.float32(0.1),
        domains=("verse", "prose"),
        teacher_names=("one", "two"),
        teacher_label_logp=np.stack([label, label - np.float32(1)]),
        fused=FusedAnswers(
            ids, kept.astype(np.float32), tail.astype(np.float32), np.zeros(len(logp), np.float32), label
        ),
    )
    return artifact, teacher, reference


@pytest.mark.parametrize("path", ["cached", "prefill"])
def test_answers_are_the_exact_probabilities(path: Any) -> None:
    artifact, _, reference = make()
    answers = score_windows(artifact, reference, path, NO_ROWS, V)
    exact = log_softmax(artifact.table)[reference.token_ids[:, :-1]].reshape(-1, V)
    rows = np.arange(len(exact))
    assert answers.label_logp == pytest.approx(exact[rows, reference.labels], abs=1e-6)
    assert (answers.top1 == exact.argmax(1)).all()
    assert reference.fused is not None and answers.bucket_logp is not None
    assert answers.bucket_logp == pytest.approx(np.take_along_axis(exact, reference.fused.ids, 1), abs=1e-6)
    outside = exact.copy()
    np.put_along_axis(outside, reference.fused.ids, -np.inf, 1)
    assert answers.tail_logp == pytest.approx(np.log(np.exp(outside).sum(1)), abs=1e-6)


def test_metrics_agree_with_their_definitions_on_scored_answers_only() -> None:
    artifact, _, reference = make()
    got = quality_estimates(score_windows(artifact, reference, "cached", NO_ROWS, V), reference)
    keep = reference.scored == 1
    exact = log_softmax(artifact.table)[reference.token_ids[:, :-1]].reshape(-1, V)
    label = exact[np.arange(len(exact)), reference.labels]
    fused = reference.fused
    assert fused is not None
    assert got["perplexity"].value == pytest.approx(math.exp(-label[keep].mean()), rel=1e-6)
    prose = keep & (np.repeat(reference.domain, T - 1) == 1)
    assert got["perplexity/prose"].value == pytest.approx(math.exp(-label[prose].mean()), rel=1e-6)
    assert got["perplexity/prose"].n == prose.sum() and got["perplexity"].n == keep.sum()
    assert got["perplexity_ratio_to_teacher"].value == pytest.approx(
        math.exp((fused.label_logp - label)[keep].mean()), rel=1e-6
    )
    agree = (exact.argmax(1) == fused.ids[:, 0])[keep].mean()
    assert got["top1_agreement"].value == pytest.approx(agree)
    student = math.exp((reference.student_label_logp - label)[keep].mean())
    assert got["quantization_perplexity_ratio"].value == pytest.approx(student, rel=1e-6)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_bucketed_kl_bounds_the_whole_kl_from_below(k: int) -> None:
    artifact, teacher, reference = make(k=k)
    answers = score_windows(artifact, reference, "cached", NO_ROWS, V)
    fused = reference.fused
    assert fused is not None and answers.bucket_logp is not None and answers.tail_logp is not None
    got = bucket_kl(fused.logp, fused.tail_logp, answers.bucket_logp, answers.tail_logp)
    p = log_softmax(teacher.table)[reference.token_ids[:, :-1]].reshape(-1, V)
    q = log_softmax(artifact.table)[reference.token_ids[:, :-1]].reshape(-1, V)
    whole = (np.exp(p) * (p - q)).sum(1)
    assert (got >= -1e-6).all() and (got <= whole + 1e-5).all()
    assert got.mean() > 0.01
    if k == 10:  # one token outside: nothing is merged
        assert got == pytest.approx(whole, abs=2e-5)


def test_all_tokens_stored_leaves_no_tail() -> None:
    artifact, teacher, reference = make(k=V)
    got = quality_estimates(score_windows(artifact, reference, "cached", NO_ROWS, V), reference)["kl_nats_per_token"]
    keep = reference.scored == 1
    p = log_softmax(teacher.table)[reference.token_ids[:, :-1]].reshape(-1, V)[keep]
    q = log_softmax(artifact.table)[reference.token_ids[:, :-1]].reshape(-1, V)[keep]
    assert got.value == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), abs=1e-5)


def test_the_teacher_itself_is_perfect() -> None:
    _, teacher, reference = make()
    got = quality_estimates(score_windows(teacher, reference, "cached", NO_ROWS, V), reference)
    assert got["perplexity_ratio_to_teacher"].value == pytest.approx(1, abs=1e-6)
    assert got["kl_nats_per_token"].value == pytest.approx(0, abs=1e-6)
    assert got["top1_agreement"].value == 1


def test_tail_keeps_mass_that_one_minus_sum_would_lose() -> None:
    logits = np.array([[0.0, -60.0, -61.0]], np.float32)
    _, _, _, tail = score_step(logits, np.array([0], np.int32), np.array([[0]], np.int32))
    assert tail[0] == pytest.approx(-60 + math.log1p(math.exp(-1)), abs=1e-5)
    _, _, _, empty = score_step(logits, np.array([0], np.int32), np.array([[0, 1, 2]], np.int32))
    assert np.isneginf(empty[0])


def test_parity_rows_come_from_their_positions_and_nan_is_broken() -> None:
    artifact, _, reference = make()
    positions = np.array([[4, T - 1], [0, 0], [2, 5]], np.int32)
    expected = artifact.table[reference.token_ids[positions[:, 0], positions[:, 1]]].copy()
    estimates, _, paths = measure_quality(artifact, reference, (positions, expected), V)
    assert estimates["parity_max_abs_logit"].value == 0 and estimates["parity_max_abs_logit"].n == 6
    assert paths["max_abs_logp_nats"] == 0 and paths["different_top1"] == 0
    expected[1, 3] += 0.25
    assert measure_quality(artifact, reference, (positions, expected), V)[0]["parity_max_abs_logit"].upper == 0.25
    assert parity_estimate([np.full((1, 2), np.nan, np.float32)], np.zeros((1, 2), np.float32)).broken


def test_nan_logits_break_every_row() -> None:
    artifact, _, reference = make()
    artifact.table[3, 2] = np.nan
    got = quality_estimates(score_windows(artifact, reference, "cached", NO_ROWS, V), reference)
    for name in ("perplexity", "perplexity_ratio_to_teacher", "kl_nats_per_token", "top1_agreement"):
        assert got[name].broken and got[name].value is None, name


def test_without_teachers_their_rows_are_null() -> None:
    artifact, _, full = make()
    reference = Reference(full.token_ids, full.scored, full.domain, full.block, full.student_label_logp, full.domains)
    answers = score_windows(artifact, reference, "cached", NO_ROWS, V)
    got = quality_estimates(answers, reference)
    for name in ("perplexity_ratio_to_teacher", "kl_nats_per_token", "top1_agreement"):
        assert got[name].value is None and got[name].reason == "no teacher"
    assert got["quantization_perplexity_ratio"].value is not None
    assert [row["kind"] for row in quality_beside(answers, reference)["rows"]] == ["student", "artifact"]


def test_table_beside_the_teachers() -> None:
    artifact, _, reference = make()
    table = quality_beside(score_windows(artifact, reference, "cached", NO_ROWS, V), reference)
    assert table["columns"] == ["all", "verse", "prose"] and table["blocks"] == 4
    rows = {row["name"]: row["values"] for row in table["rows"]}
    assert list(rows) == ["one", "two", "fused teachers", "float student", "artifact"]
    assert rows["two"][1] == pytest.approx(rows["one"][1] * math.e, rel=1e-6)
    assert rows["fused teachers"] == pytest.approx(rows["one"])
    assert table["tokens"][0] == table["tokens"][1] + table["tokens"][2] == int(reference.scored.sum())


def test_a_reference_of_another_vocabulary_is_refused() -> None:
    artifact, _, reference = make()
    with pytest.raises(BundleError, match="names token 10, the model has 5"):
        score_windows(artifact, reference, "cached", NO_ROWS, 5)
    with pytest.raises(BundleError, match="parity rows have 3 logits"):
        measure_quality(artifact, reference, (np.zeros((1, 2), np.int32), np.zeros((1, 3), np.float32)), V)
