"""The chunked output loss against a dense autograd reference: values, gradients, chunk sizes, buckets, edge cases."""

from __future__ import annotations

import pytest
import torch

from edgestill.compress.divergence import DIVERGENCES, LOG_TINY, Settings
from edgestill.compress.fused_head import OutputLoss, output_loss, row_ranges
from edgestill.compress.fusion import WeightRule
from edgestill.compress.rows import Rows
from edgestill.compress.targets import Buckets, CachedAnswers, CachedTarget, Dense, OnlineTarget, TeacherRows
from edgestill.profiles.schema import FusionSpec, RankingLossSpec

N, V, D = 15, 40, 8
LENGTHS = [5, 4, 6]
SEQUENCE = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))


def rows_of(labels: torch.Tensor) -> Rows:
    """Windows of 7 tokens; a window's first rows are those that do not count."""
    given = torch.full((3, 7), -100)
    for i, part in enumerate(labels.split(LENGTHS)):
        given[i, 7 - len(part) :] = part
    return Rows.of(given, torch.tensor([0, 1, 1]))


def rule(**words: object) -> WeightRule:
    return WeightRule.of(FusionSpec(**words), [1.0, 1.0], V, domains=(frozenset([0]), frozenset([1])))  # type: ignore[arg-type]


def problem(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(N, D, generator=g),
        "head": torch.randn(V, D, generator=g),
        "bias": torch.randn(V, generator=g),
        "labels": torch.randint(0, V, (N,), generator=g),
        "h0": torch.randn(N, 12, generator=g),
        "w0": torch.randn(V, 12, generator=g),
        "h1": torch.randn(N, 6, generator=g),
        "w1": torch.randn(V, 6, generator=g),
    }


def teachers(p: dict[str, torch.Tensor]) -> list[TeacherRows]:
    return [TeacherRows(p["h0"], p["w0"], None, 1.3), TeacherRows(p["h1"], p["w1"], None, 0.8)]


def dense_reference(p: dict[str, torch.Tensor], spec: OutputLoss, floor: float, tau: float) -> list[torch.Tensor]:
    """Plain autograd over [n, V] tensors; returns loss and gradients of hidden, head, bias."""
    hidden, head, bias = (p[k].clone().requires_grad_() for k in ("hidden", "head", "bias"))
    z = hidden @ head.T + bias
    zs = [p["h0"] @ p["w0"].T, p["h1"] @ p["w1"].T]
    entropies = []
    for logits, calibration in zip(zs, (1.3, 0.8), strict=True):
        soft = (logits / calibration).softmax(-1)
        h = -(soft * soft.log()).sum(-1)
        entropies.append(torch.stack([h[s == SEQUENCE].mean() for s in SEQUENCE]))
    w = (-torch.stack(entropies) / torch.log(torch.tensor(float(V))) / tau).softmax(0) * (1 - floor) + floor / 2
    t = spec.temperature
    target = sum(w[k].unsqueeze(1) * (zs[k] / t).softmax(-1) for k in range(2))
    log_q = torch.log_softmax(z / t, -1)
    q = log_q.exp()
    if spec.divergence == "forward_kl":
        value = (target * (target.log() - log_q)).sum()
    elif spec.divergence == "reverse_kl":
        value = (q * (log_q - target.log())).sum()
    else:
        beta = spec.settings.beta
        m = beta * target + (1 - beta) * q
        value = beta * (target * (target.log() - m.log())).sum() + (1 - beta) * (q * (log_q - m.log())).sum()
    ce = torch.nn.functional.cross_entropy(z, p["labels"], reduction="sum")
    loss = (spec.weight * t**2 * value + spec.cross_entropy * ce) / N
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, head, bias))]


def ours(p: dict[str, torch.Tensor], spec: OutputLoss, target: object) -> list[torch.Tensor]:
    hidden, head, bias = (p[k].clone().requires_grad_() for k in ("hidden", "head", "bias"))
    loss, _ = output_loss(hidden, head, bias, rows_of(p["labels"]), target, torch.tensor(float(N)), spec)  # type: ignore[arg-type]
    (loss * 2).backward()
    return [loss.detach(), *(x.grad / 2 for x in (hidden, head, bias))]  # type: ignore[operator]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_bytes", [1, 7 * 4 * V * 4, 7 * 4 * V * 9, 1 << 30])
def test_equals_dense_autograd_for_every_chunk_size(divergence: str, temperature: float, chunk_bytes: int) -> None:
    p = problem()
    spec = OutputLoss(divergence, temperature, Settings(beta=0.3), 0.8, 0.2, chunk_bytes=chunk_bytes)
    fusion = rule(floor=0.1, entropy_temperature=0.2)
    target = OnlineTarget(teachers(p), fusion, rows_of(p["labels"]), temperature=temperature)
    for mine, theirs in zip(ours(p, spec, target), dense_reference(p, spec, 0.1, 0.2), strict=True):
        torch.testing.assert_close(mine, theirs, atol=3e-6, rtol=2e-5)


def test_cross_entropy_alone_equals_torch() -> None:
    p = problem(1)
    loss, _, head, _ = ours(p, OutputLoss(weight=0.0, cross_entropy=1.0), None)
    weight = p["head"].clone().requires_grad_()
    theirs = torch.nn.functional.cross_entropy(p["hidden"] @ weight.T + p["bias"], p["labels"])
    theirs.backward()
    torch.testing.assert_close(loss, theirs.detach())
    torch.testing.assert_close(head, weight.grad)


def test_chunks_keep_to_the_budget_and_to_sequences_that_are_pooled() -> None:
    p = problem()
    rows, nine = rows_of(p["labels"]), 7 * 4 * V * 9
    pooled = OnlineTarget(teachers(p), rule(), rows)
    assert row_ranges(rows, pooled, V, nine) == [slice(0, 9), slice(9, 15)]
    assert row_ranges(rows, OnlineTarget(teachers(p), rule(), rows), V, 1) == [slice(i, i + 1) for i in range(15)]
    assert row_ranges(rows, OnlineTarget(teachers(p), rule(granularity="token"), rows), V, nine) == [
        slice(0, 9),
        slice(9, 15),
    ]
    assert row_ranges(rows, None, V, 3 * 4 * V * 10) == [slice(0, 10), slice(10, 15)]


def test_nothing_valid_gives_zero_and_no_gradient() -> None:
    hidden, head = torch.zeros(0, D, requires_grad=True), torch.ones(V, D, requires_grad=True)
    rows = Rows.of(torch.full((2, 4), -100), torch.zeros(2, dtype=torch.int64))
    teacher = TeacherRows(torch.zeros(0, 3), torch.ones(V, 3), None)
    target = OnlineTarget([teacher, teacher], rule(), rows)
    loss, _ = output_loss(hidden, head, None, rows, target, torch.tensor(1.0), OutputLoss(cross_entropy=1.0))
    loss.backward()
    assert loss.item() == 0.0
    assert head.grad is not None
    assert head.grad.abs().max() == 0.0


def stored(p: dict[str, torch.Tensor], k: int) -> list[CachedAnswers]:
    """What a cache holds of both teachers, exact (float32) top-k."""
    answers = []
    for t in teachers(p):
        log_p = torch.log_softmax(t.logits(slice(None)), -1)
        entropy = torch.log_softmax(t.logits(slice(None)) / t.calibration, -1)
        values, ids = log_p.topk(k)
        tail = torch.logsumexp(log_p.scatter(1, ids, float("-inf")), -1)
        label = log_p.gather(1, p["labels"].unsqueeze(1)).squeeze(1)
        answers.append(CachedAnswers(ids, values, tail, -(entropy.exp() * entropy).sum(-1), label))
    return answers


FUSIONS: list[dict[str, object]] = [
    {},
    {"granularity": "token"},
    {"granularity": "ema", "ema_decay": 0.7},
    {"weights": "label"},
    {"weights": "routed"},
    {"mix": "geometric"},
]


@pytest.mark.parametrize(
    ("divergence", "words"),
    [*((name, {}) for name in sorted(DIVERGENCES)), *(("forward_kl", words) for words in FUSIONS[1:])],
)
def test_cache_with_the_whole_vocabulary_equals_online(divergence: str, words: dict[str, object]) -> None:
    p = problem(2)
    spec = OutputLoss(divergence, weight=1.0, cross_entropy=0.1, ranking=RankingLossSpec(top_k=4))
    fusion = rule(floor=0.05, entropy_temperature=0.2, **words)
    rows = rows_of(p["labels"])
    online = ours(p, spec, OnlineTarget(teachers(p), fusion, rows))
    cached = ours(p, spec, CachedTarget(stored(p, V), fusion, rows, V))
    for mine, theirs in zip(cached, online, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_gradient_over_buckets_equals_autograd(divergence: str) -> None:
    p = problem(3)
    fusion = rule(floor=0.0, entropy_temperature=0.2)
    target = CachedTarget(stored(p, 6), fusion, rows_of(p["labels"]), V)
    spec = OutputLoss(divergence, weight=1.0, cross_entropy=0.0)
    _, mine, *_ = ours(p, spec, target)
    fused = target.chunk(slice(0, N))
    hidden = p["hidden"].double().requires_grad_()
    z = hidden @ p["head"].double().T + p["bias"].double()
    log_q = torch.log_softmax(z, -1)
    keep = fused.used
    inside = torch.where(keep, log_q.gather(1, fused.ids), torch.full_like(fused.log_p[:, :-1], LOG_TINY).double())
    tail = torch.logsumexp(log_q.scatter(1, fused.ids, float("-inf")), -1, keepdim=True)
    log_b = torch.cat([inside, tail], 1)
    log_p = fused.log_p.double()
    weight = log_p.exp().masked_fill(log_p <= LOG_TINY, 0.0)
    q = log_b.exp()
    if divergence == "forward_kl":
        value = (weight * (log_p - log_b)).sum()
    elif divergence == "reverse_kl":
        value = (q * (log_b - log_p)).sum()
    else:
        m = 0.5 * weight + 0.5 * q
        value = 0.5 * (weight * (log_p - m.log())).sum() + 0.5 * (q * (log_b - m.log())).sum()
    (value / N).backward()
    torch.testing.assert_close(mine.double(), hidden.grad, atol=2e-6, rtol=1e-4)


def test_tail_gradient_is_finite_when_the_student_has_no_tail() -> None:
    """The student puts everything on the stored tokens: the tail's mass underflows to 0 in float32."""
    ids = torch.tensor([[0, 1]])
    log_p = torch.log(torch.tensor([[0.6, 0.3, 0.1]]))

    class Fixed:
        weights = entropies = torch.zeros(1, 1)
        dense = False

        def cut_anywhere(self, most: int) -> bool:
            return True

        def chunk(self, part: slice, scratch: object) -> Buckets:
            return Buckets(ids, torch.ones_like(ids, dtype=torch.bool), log_p)

    hidden = torch.ones(1, 1, requires_grad=True)
    head = torch.tensor([[200.0], [200.0], [0.0], [-50.0]], requires_grad=True)
    rows = Rows.of(torch.tensor([[-100, 0]]), torch.zeros(1, dtype=torch.int64))
    loss, _ = output_loss(hidden, head, None, rows, Fixed(), torch.tensor(1.0), OutputLoss())
    loss.backward()
    assert torch.isfinite(loss)
    assert head.grad is not None
    assert torch.isfinite(head.grad).all()
    assert head.grad[2].item() == pytest.approx(-0.1, abs=1e-6)  # all of the tail's pull goes to its likeliest token


def test_values_are_divergences_in_nats() -> None:
    p = problem(4)
    log_p = torch.log_softmax(p["hidden"] @ p["head"].T + p["bias"], -1)

    class Same:
        weights = entropies = torch.zeros(1, N)
        dense = True

        def cut_anywhere(self, most: int) -> bool:
            return True

        def chunk(self, part: slice, scratch: object) -> Dense:
            return Dense(log_p[part].exp(), log_p[part].clone())

    rows = rows_of(p["labels"])
    _, values = output_loss(p["hidden"], p["head"], p["bias"], rows, Same(), torch.tensor(1.0), OutputLoss())
    assert values.divergence.abs().max().item() < 1e-5
    torch.testing.assert_close(values.cross_entropy, -log_p.gather(1, p["labels"].unsqueeze(1)).squeeze(1))


@pytest.mark.parametrize("chunk_bytes", [7 * 4 * V * 2, 1 << 30])
def test_ranking_is_added_with_its_gradient(chunk_bytes: int) -> None:
    """Against autograd through a soft rank written out, token by token."""
    p = problem(6)
    rows, k, weight = rows_of(p["labels"]), 3, 0.7
    fusion = rule(weights="uniform")
    plain = OutputLoss(chunk_bytes=chunk_bytes)
    ranked = OutputLoss(chunk_bytes=chunk_bytes, ranking=RankingLossSpec(weight=weight, top_k=k, sharpness=0.5))
    without = ours(p, plain, OnlineTarget(teachers(p), fusion, rows))
    found = ours(p, ranked, OnlineTarget(teachers(p), fusion, rows))
    hidden = p["hidden"].double().requires_grad_()
    z = hidden @ p["head"].double().T + p["bias"].double()
    target = sum((t.logits(slice(None)).double().softmax(-1)) for t in teachers(p)) / 2
    total = torch.zeros((), dtype=torch.float64)
    for row in range(N):
        union = sorted({*target[row].topk(k).indices.tolist(), *z[row].topk(k).indices.tolist()})
        ranks = []
        for scores in (z[row], target[row].log()):
            soft = [1 + sum(torch.sigmoid((scores[j] - scores[i]) / 0.5) for j in union if j != i) for i in union]
            ranks.append(torch.stack(soft))  # type: ignore[arg-type]
        centred = [r - r.mean() for r in ranks]
        total = total + 1 - torch.nn.functional.cosine_similarity(centred[0], centred[1], dim=0)
    (weight * total / N).backward()
    torch.testing.assert_close((found[0] - without[0]).double(), (weight * total / N).detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((found[1] - without[1]).double(), hidden.grad, atol=1e-5, rtol=1e-3)


def test_bfloat16_products_stay_near_float32() -> None:
    p = problem(7)
    rows = rows_of(p["labels"])
    exact = ours(p, OutputLoss(cross_entropy=0.2), OnlineTarget(teachers(p), rule(), rows))
    spec = OutputLoss(cross_entropy=0.2, matmul_dtype=torch.bfloat16)
    rough = ours(p, spec, OnlineTarget(teachers(p), rule(), rows, dtype=torch.bfloat16))
    for mine, theirs in zip(rough, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.02 * theirs.norm()
