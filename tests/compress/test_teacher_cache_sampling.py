"""Draws from a teacher: unbiased where k tokens and a tail are not, the same bytes in any batches, stored as counts.

The statistical tests state their sigma; their draws have fixed seeds, so they pass or fail once and for all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_teacher_cache import REAL, N, T, dense, opened, store, teacher_at
from tiny import write_model
from torch import Tensor

from edgestill.compress.cache_answers import packed, sampled_answers, top_answers, uniforms
from edgestill.compress.fusion import WeightRule
from edgestill.compress.rows import full_rows
from edgestill.compress.targets import CachedAnswers, CachedTarget
from edgestill.compress.teacher_cache import CachedRows
from edgestill.compress.teachers import Teacher
from edgestill.profiles.schema import FusionSpec

V = 40
DRAWS = 32


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return teacher_at(write_model(tmp_path_factory.mktemp("teacher") / "t", width=32))


def some_logits() -> Tensor:
    """float32 [1, V]: a few likely tokens and a tail with a quarter of the mass."""
    torch.manual_seed(3)
    return torch.randn(1, V) * 1.5


def counted(logits: Tensor, trials: int, seed: int) -> Tensor:
    """counts / DRAWS of `trials` independent answers, float64 [trials, V]."""
    uniform = torch.from_numpy(uniforms(seed, np.arange(trials), 1, DRAWS))
    found = sampled_answers(logits.expand(trials, V), torch.zeros(trials, dtype=torch.int64), uniform)
    assert (found["counts"].sum(1) == DRAWS).all()
    return torch.zeros(trials, V, dtype=torch.float64).scatter_add_(1, found["ids"], found["counts"].double() / DRAWS)


def gradient(target: Tensor, q_logits: Tensor) -> Tensor:
    """d/dz of KL(target || softmax(z)) by autograd, float64 [trials, V]."""
    z = q_logits.detach().expand_as(target).clone().requires_grad_()
    (-(target * z.log_softmax(-1)).sum()).backward()
    assert z.grad is not None
    return z.grad


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square over 40 tokens and 320,000 draws: mean 39, standard deviation sqrt(78); 4 sigma are allowed."""
    logits, trials = some_logits(), 10_000
    p = logits[0].double().softmax(-1)
    mean = counted(logits, trials, seed=1).mean(0)
    total = trials * DRAWS
    statistic = (total * (mean - p) ** 2 / p).sum().item()
    assert abs(statistic - (V - 1)) < 4 * (2 * (V - 1)) ** 0.5


def test_each_unlikely_token_is_drawn_though_float32_sums_would_skip_three_of_four() -> None:
    """2**19 tokens of 2**-26 after one of 1/2, where float32 counts in steps of 2**-24. Chi-square over token number mod 4:
    mean 3, standard deviation sqrt(6); 5 sigma are allowed, and the mass of them all is within 5 sigma too."""
    rows, draws, n = 4, 1 << 14, 1 << 19
    logits = torch.full((rows, 1 + n), -26 * float(np.log(2.0)))
    logits[:, 0] = -float(np.log(2.0))
    uniform = torch.from_numpy(uniforms(2, np.arange(rows), 1, draws))
    found = sampled_answers(logits, torch.zeros(rows, dtype=torch.int64), uniform)
    unlikely = (found["ids"] > 0) & (found["counts"] > 0)
    seen = torch.bincount(found["ids"][unlikely] % 4, weights=found["counts"][unlikely].double(), minlength=4)
    expected = seen.sum() / 4
    assert abs(((seen - expected) ** 2 / expected).sum() - 3) < 5 * 6**0.5
    p = 2.0**-7 / (0.5 + 2.0**-7)
    assert abs(seen.sum() / (rows * draws) - p) < 5 * (p * (1 - p) / (rows * draws)) ** 0.5


def test_the_gradient_is_right_on_average_and_that_of_top_k_is_not() -> None:
    """Forward KL towards a student that ranks the tail otherwise. Each of the 40 components of the mean over 4,000 answers
    lies within 5 standard errors of the full gradient; 8 tokens and a tail are off by more than 20 of them somewhere."""
    logits, trials = some_logits(), 4000
    torch.manual_seed(4)
    student = torch.randn(1, V, dtype=torch.float64)
    p = logits.double().softmax(-1)
    full = gradient(p, student)[0]
    drawn = gradient(counted(logits, trials, seed=5), student)
    error = drawn.std(0) / trials**0.5
    assert ((drawn.mean(0) - full).abs() < 5 * error + 1e-12).all()

    found = top_answers(logits, torch.zeros(1, dtype=torch.int64), 8)
    z = student.clone().requires_grad_()
    log_q = z.log_softmax(-1)
    outside = log_q.scatter(1, found["ids"], -torch.inf).logsumexp(-1)
    kept = (found["logp"].double().exp() * log_q.gather(1, found["ids"])).sum()
    (-(kept + (found["tail_logp"].double().exp() * outside).sum())).backward()
    assert z.grad is not None
    bias = (z.grad[0] - full).abs()
    assert (bias > 20 * error).any()
    torch.testing.assert_close(z.grad[0][found["ids"][0]], full[found["ids"][0]], atol=1e-6, rtol=0)  # all in the tail


def test_draws_by_hand() -> None:
    p = torch.tensor([[0.25, 0.5, 0.0, 0.25]])
    uniform = torch.tensor([[0.9, 0.0, 0.3, 0.74, 0.75]], dtype=torch.float64)
    found = sampled_answers(p.log().clamp_min(-200.0), torch.tensor([1]), uniform)
    assert found["ids"].tolist() == [[0, 1, 3, 0]]
    assert found["counts"].tolist() == [[1, 2, 2, 0]]
    assert found["label_logp"].tolist() == pytest.approx([np.log(0.5)])
    assert found["entropy"].tolist() == pytest.approx([1.5 * np.log(2)])
    kinds = {draws: packed(found, V, draws)["counts"].dtype for draws in (255, 256)}
    assert kinds == {255: np.uint8, 256: np.uint16}


def test_stored_counts_are_read_as_a_distribution(teacher: Teacher, tmp_path: Path) -> None:
    words = {"mode": "sampling", "size": 300, "seed": 9, "calibration": 1.3}  # more draws than tokens
    cache = opened(teacher, store(teacher, tmp_path / "c", windows=range(6), **words))
    rows = cache.rows(np.array([4, 1]))
    answers = T - 1
    assert rows.ids.shape == rows.logp.shape == (2 * answers, REAL)
    assert torch.isneginf(rows.tail_logp).all()
    for i, window in enumerate([4, 1]):
        here = slice(i * answers, (i + 1) * answers)
        logits, labels = dense(teacher, window)
        log_p = logits.log_softmax(-1)
        below = log_p.exp().cumsum(-1)
        drawn = torch.searchsorted(below, torch.from_numpy(uniforms(9, np.array([window]), answers, 300)), right=True)
        for row, ids, logp in zip(drawn, rows.ids[here], rows.logp[here], strict=True):
            distinct, counts = row.unique(return_counts=True)
            assert ids[: len(distinct)].tolist() == distinct.tolist()
            torch.testing.assert_close(logp[: len(distinct)], (counts / 300).log())
            assert (ids[len(distinct) :] == distinct[0]).all()
            assert (logp[len(distinct) :] == logp[0]).all()
        half = {"atol": 2**-8, "rtol": 2**-10}
        torch.testing.assert_close(rows.label_logp[here].double(), log_p[torch.arange(answers), labels], **half)
        torch.testing.assert_close(rows.entropy[here].double(), -(log_p.exp() * log_p).sum(-1), **half)


def test_fused_counts_of_two_teachers_are_the_mean_of_their_distributions() -> None:
    logits = torch.stack([some_logits()[0], some_logits()[0].flip(0)])
    uniform = torch.from_numpy(uniforms(0, np.arange(2), 1, DRAWS))
    found = sampled_answers(logits, torch.zeros(2, dtype=torch.int64), uniform)
    logp = (found["counts"] / DRAWS).log()
    logp = torch.where(found["counts"] > 0, logp, logp[:, :1])
    one, nothing = torch.zeros(1), torch.full((1,), -torch.inf)
    answers = [
        CachedAnswers(found["ids"][k : k + 1], logp[k : k + 1], nothing, one, one, distinct=False) for k in range(2)
    ]
    rule = WeightRule.of(FusionSpec(weights="uniform"), [1.0, 1.0], V)
    target = CachedTarget(answers, rule, full_rows(torch.zeros(1, 2, dtype=torch.int64)), V).chunk(slice(0, 1))
    ours = torch.zeros(V, dtype=torch.float64)
    ours[target.ids[0, target.used[0]]] = target.log_p[0, :-1][target.used[0]].double().exp()
    share = torch.zeros(2, V, dtype=torch.float64).scatter_add_(1, found["ids"], found["counts"].double() / DRAWS)
    torch.testing.assert_close(ours, share.mean(0), atol=1e-6, rtol=0)
    assert target.log_p[0, -1].exp() < 1e-12


def test_any_batches_and_a_kill_end_in_the_same_draws(teacher: Teacher, tmp_path: Path) -> None:
    words = {"mode": "sampling", "size": 16, "seed": 7}
    one, other = (store(teacher, tmp_path / f"c{b}", batch_size=b, **words) for b in (2, 3))
    every = np.arange(N)
    a, b = (opened(teacher, out).rows(every) for out in (one, other))
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.logp, b.logp)
    whole = {p.name: p.read_bytes() for p in one.iterdir()}
    for lost in ("shard-00001.safetensors", "shard-00004.safetensors", "cache.json"):
        (one / lost).unlink()
    store(teacher, one, batch_size=2, **words)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == whole
    reseeded = opened(teacher, store(teacher, tmp_path / "s", **(words | {"seed": 8}))).rows(every)
    assert not torch.equal(a.ids, reseeded.ids)


def test_a_chunk_of_rows_does_not_change_the_draws(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"mode": "sampling", "size": 16, "windows": range(4)}
    whole = opened(teacher, store(teacher, tmp_path / "a", **words)).rows(np.arange(4))
    monkeypatch.setattr("edgestill.compress.cache_capture.LOGITS_BYTES", 7 * 24 * REAL)
    monkeypatch.setattr("edgestill.compress.cache_capture.CPU_BYTES", 3 * 4 * REAL)
    pieces = opened(teacher, store(teacher, tmp_path / "b", **words)).rows(np.arange(4))
    assert isinstance(whole, CachedRows)
    assert torch.equal(whole.ids, pieces.ids)
    assert torch.equal(whole.logp, pieces.logp)
