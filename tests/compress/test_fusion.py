"""Weights and mixes: hand-made values, the identities of the two mixes, and one accumulator whatever the number of teachers."""

from __future__ import annotations

import math

import pytest
import torch

from edgestill.compress.divergence import DIVERGENCES, Settings
from edgestill.compress.fusion import Evidence, FusionAccumulator, WeightRule, entropy_of, moving_average, pool
from edgestill.compress.scratch import Scratch
from edgestill.profiles.schema import FusionSpec


def rule(teachers: int = 2, vocabulary: int = 50, **words: object) -> WeightRule:
    weights, domains = words.pop("static", [1.0] * teachers), words.pop("domains", ())
    return WeightRule.of(FusionSpec(**words), weights, vocabulary, domains=domains)  # type: ignore[arg-type]


def distributions(teachers: int, rows: int = 12, vocabulary: int = 50, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.log_softmax(torch.randn(rows, vocabulary, generator=generator) * (1 + 2 * k), -1) for k in range(teachers)
    ]


def fuse(rule: WeightRule, log_ps: list[torch.Tensor], sequence: torch.Tensor) -> tuple[torch.Tensor, ...]:
    fused = FusionAccumulator(rule, len(log_ps), Scratch(len(sequence), sequence.device))
    for k, log_p in enumerate(log_ps):
        evidence = Evidence(entropy_of(log_p), log_p[:, LABEL], sequence, DOMAIN)
        fused.add(log_p.clone() if rule.geometric else log_p.exp(), rule.score(k, evidence))
    return fused.finish()


SEQUENCE = torch.tensor([0] * 5 + [1] * 7)
DOMAIN = torch.tensor([0] * 5 + [1] * 7)
LABEL = 3


def test_entropy_by_hand() -> None:
    log_p = torch.tensor([[0.5, 0.25, 0.25, 1e-30]]).log()
    assert entropy_of(log_p).item() == pytest.approx(1.5 * math.log(2))


def test_pool_is_the_mean_of_each_sequence() -> None:
    values = torch.arange(12.0)
    assert pool(values, SEQUENCE + 3).tolist() == [2.0] * 5 + [8.0] * 7


def test_entropy_weights_by_hand() -> None:
    """H = (1, 2) nats, V = e^2, tau = 1/2: normalised (1/2, 1), scores (-1, -2), weights softmax."""
    one = WeightRule((0.0, 0.0), "entropy", "token", 0.9, 0.5, 0.0, False, 2.0)
    nothing = torch.zeros(1, dtype=torch.int64)
    weights = one.weights(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1), nothing, nothing)
    e = math.exp(-1)
    torch.testing.assert_close(weights[:, 0], torch.tensor([1 / (1 + e), e / (1 + e)]))


def averaged(values: torch.Tensor, decay: float) -> torch.Tensor:
    """The moving average written out: one step after the other."""
    out, top, bottom = [], torch.zeros(len(values)), 0.0
    for column in values.T:
        top, bottom = top * decay + column, bottom * decay + 1
        out.append(top / bottom)
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("length", [1, 2, 7, 64])
@pytest.mark.parametrize("decay", [0.5, 0.98])
def test_moving_average_equals_the_loop_and_keeps_sequences_apart(length: int, decay: float) -> None:
    values = torch.randn(length + 5, generator=torch.Generator().manual_seed(length))
    sequence = torch.tensor([3] * length + [4] * 5)
    ours = moving_average(values, sequence, decay)
    expected = torch.cat([averaged(v.unsqueeze(0).double(), decay)[0] for v in values.split([length, 5])])
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["token", "sequence", "ema"])
@pytest.mark.parametrize("mix", ["arithmetic", "geometric"])
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_accumulator_equals_the_formula(granularity: str, mix: str, floor: float) -> None:
    log_ps = distributions(3)
    ours_rule = rule(3, granularity=granularity, mix=mix, floor=floor, entropy_temperature=0.2)
    p, log_p, weights = fuse(ours_rule, log_ps, SEQUENCE)
    entropies = torch.stack([-(lp.double().exp() * lp.double()).sum(-1) for lp in log_ps])
    if granularity == "sequence":
        means = [
            entropies[:, s == SEQUENCE].mean(1, keepdim=True).expand(3, int((s == SEQUENCE).sum())) for s in (0, 1)
        ]
        entropies = torch.cat(means, dim=1)
    if granularity == "ema":
        entropies = torch.cat([averaged(entropies[:, s == SEQUENCE], 0.98) for s in (0, 1)], dim=1)
    theirs = (-entropies / math.log(50) / 0.2).softmax(0) * (1 - floor) + floor / 3
    torch.testing.assert_close(weights.double(), theirs, atol=1e-5, rtol=1e-5)
    stacked = torch.stack(log_ps).double()
    if mix == "arithmetic":
        expected = (theirs.unsqueeze(-1) * stacked.exp()).sum(0)
    else:
        expected = (theirs.unsqueeze(-1) * stacked).sum(0).softmax(-1)
    torch.testing.assert_close(p.double(), expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(log_p.double(), expected.log(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mix", ["arithmetic", "geometric"])
@pytest.mark.parametrize("weights", ["uniform", "static", "entropy", "label", "routed"])
def test_identical_teachers_equal_one(mix: str, weights: str) -> None:
    log_p = distributions(1)[0]
    claims = [frozenset([0]), frozenset([0, 1]), frozenset([1])]
    fused_rule = rule(3, mix=mix, weights=weights, static=[1.0, 2.0, 5.0], domains=claims)
    fused = fuse(fused_rule, [log_p, log_p, log_p], SEQUENCE)
    torch.testing.assert_close(fused[1], log_p, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(fused[2].sum(0), torch.ones(12))


def test_static_weights_are_normalised() -> None:
    weights = fuse(rule(2, weights="static", static=[1.0, 3.0]), distributions(2), SEQUENCE)[2]
    torch.testing.assert_close(weights, torch.tensor([[0.25], [0.75]]).expand(2, 12))


def test_arithmetic_identity() -> None:
    """KL(sum w p || q) = sum w KL(p_k || q) - JS_w(p_1 .. p_K)."""
    log_ps = [lp.double() for lp in distributions(3, seed=4)]
    log_q = torch.log_softmax(torch.randn(12, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(9)), -1)
    w = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    mix = (w[:, None, None] * torch.stack(log_ps).exp()).sum(0)

    def kl(p: torch.Tensor, log_r: torch.Tensor) -> torch.Tensor:
        return (p * (p.log() - log_r)).sum(-1)

    js = sum(w[k] * kl(lp.exp(), mix.log()) for k, lp in enumerate(log_ps))
    right = sum(w[k] * kl(lp.exp(), log_q) for k, lp in enumerate(log_ps)) - js
    static = rule(3, weights="static", static=w.tolist())
    ours = fuse(static, [lp.float() for lp in log_ps], SEQUENCE)[1].double()
    torch.testing.assert_close(kl(ours.exp(), log_q), right, atol=1e-5, rtol=0)


def test_geometric_identity() -> None:
    """KL(q || geometric mix) = sum w KL(q || p_k) + log Z."""
    log_ps = [lp.double() for lp in distributions(3, seed=4)]
    log_q = torch.log_softmax(torch.randn(12, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(9)), -1)
    w = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def kl(log_p: torch.Tensor) -> torch.Tensor:
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    log_z = torch.logsumexp((w[:, None, None] * torch.stack(log_ps)).sum(0), -1)
    right = sum(w[k] * kl(lp) for k, lp in enumerate(log_ps)) + log_z
    static = rule(3, weights="static", static=w.tolist(), mix="geometric")
    ours = fuse(static, [lp.float() for lp in log_ps], SEQUENCE)[1].double()
    torch.testing.assert_close(kl(ours), right, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("mix", "divergence"), [("arithmetic", "forward_kl"), ("geometric", "reverse_kl")])
def test_the_gradient_to_the_mix_is_the_mean_of_those_to_the_teachers(mix: str, divergence: str) -> None:
    """What both identities are used for: their other terms do not depend on the student."""
    log_ps = [lp.double() for lp in distributions(3, seed=4)]
    z = torch.randn(12, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    log_q = torch.log_softmax(z, -1)
    w = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def gradient(log_p: torch.Tensor) -> torch.Tensor:
        return DIVERGENCES[divergence](log_p.exp(), log_p, log_q.exp(), log_q.clone(), Settings())[1].clone()

    static = rule(3, weights="static", static=w.tolist(), mix=mix)
    ours = gradient(torch.log_softmax(fuse(static, [lp.float() for lp in log_ps], SEQUENCE)[1].double(), -1))
    theirs = sum(w[k] * gradient(lp) for k, lp in enumerate(log_ps))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_sequences_may_be_numbered_with_gaps() -> None:
    """Windows without a token that counts are left out of the rows; few rows may carry large numbers."""
    values = torch.tensor([1.0, 3.0, 7.0])
    assert pool(values, torch.tensor([2, 2, 40])).tolist() == [2.0, 2.0, 7.0]
    assert pool(values[:0], torch.tensor([], dtype=torch.int64)).numel() == 0


def test_a_sharp_temperature_trusts_one_teacher_and_the_floor_keeps_the_other() -> None:
    log_ps = distributions(2)
    weights = fuse(rule(2, entropy_temperature=0.001, floor=0.1), log_ps, SEQUENCE)[2]
    torch.testing.assert_close(weights[1], torch.full((12,), 0.95), atol=1e-4, rtol=0)
    torch.testing.assert_close(weights[0], torch.full((12,), 0.05), atol=1e-4, rtol=0)


def test_label_weights_by_hand() -> None:
    """log p(y) = (-1, -2), tau = 1/2: scores (-2, -4)."""
    one = rule(2, weights="label", granularity="token", label_temperature=0.5, floor=0.0)
    nothing = torch.zeros(1, dtype=torch.int64)
    weights = one.weights(torch.zeros(2, 1), torch.tensor([[-1.0], [-2.0]]), nothing, nothing)
    e = math.exp(-2)
    torch.testing.assert_close(weights[:, 0], torch.tensor([1 / (1 + e), e / (1 + e)]))


def test_routed_asks_the_teachers_of_the_domain_and_all_where_none_claims_it() -> None:
    routed = rule(3, weights="routed", domains=[frozenset([0]), frozenset([1]), frozenset([1])])
    domain = torch.tensor([0, 1, 2])
    weights = routed.weights(torch.zeros(3, 3), torch.zeros(3, 3), torch.arange(3), domain)
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]]).T
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)
