"""Attention alignment: against a dense reference, by finite differences, chunk by chunk, and what is refused before work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from edgestill.compress.attention import AttentionLoss, map_kl, mapped_attention, relation_kl
from edgestill.compress.attention_taps import Relations
from edgestill.profiles.schema import AttentionLossSpec
from edgestill.runtime.errors import BadInput


def config(
    width: int = 64, heads: int = 4, shared: int | None = None, layers: int = 2, **words: Any
) -> PretrainedConfig:
    fields = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers, **words}
    found: PretrainedConfig = AutoConfig.for_model("llama", num_key_value_heads=shared or heads, **fields)
    return found


def loss(student: PretrainedConfig, *teachers: PretrainedConfig, **words: Any) -> AttentionLoss:
    return AttentionLoss(AttentionLossSpec(**words), student, [(f"t{k}", c) for k, c in enumerate(teachers)])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relations(wide: int, narrow: int, seed: int, length: int = 7) -> Relations:
    return Relations(*(random(3, length, w, seed=seed + i) for i, w in enumerate((wide, narrow, narrow))))


def dense_kl(ours: Tensor, theirs: Tensor, heads: int) -> Tensor:
    """[B, T]: mean over relation heads of KL, one sequence, head and row at a time, in float64."""
    batch, length, _ = ours.shape
    out = torch.zeros(batch, length, dtype=torch.float64)
    for b in range(batch):
        for part_x, part_y in zip(ours[b].double().chunk(heads, -1), theirs[b].double().chunk(heads, -1), strict=True):
            for row in range(length):
                q, p = (
                    torch.softmax(x[: row + 1] @ x[row] / x.shape[1] ** 0.5, 0) for x in (part_x, part_y)
                )  # only keys up to the query
                out[b, row] += (p * (p / q).log()).sum() / heads
    return out


def test_relations_against_a_dense_reference() -> None:
    """Two teachers, grouped keys, other widths, two pairs of layers, masked rows, weights per sequence."""
    module = loss(
        config(48, 4, 2), config(64, 4, 2), config(32, 2, layers=3), layers=[(0, 1), (1, 0)], relation_heads=4
    )
    ours = {0: relations(48, 24, 1), 1: relations(48, 24, 4)}
    theirs = [
        {0: relations(64, 32, 10), 1: relations(64, 32, 13)},
        {0: relations(32, 32, 20), 1: relations(32, 32, 23)},
    ]
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    mask[2] = False
    weights = torch.tensor([[0.25, 1.0, 0.5], [0.75, 0.0, 0.5]])
    expected = torch.zeros((), dtype=torch.float64)
    for k in range(2):
        for s, t in ((0, 1), (1, 0)):
            for x, y in zip(ours[s], theirs[k][t], strict=True):
                per_row = dense_kl(x, y, 4)
                for b, count in ((0, 7), (1, 4)):
                    # divided by rows, pairs, queries/keys/values
                    expected += weights[k, b] * per_row[b, :count].sum() / 11 / 2 / 3
    value = module(ours, theirs, weights, mask)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)


def test_gradients_by_finite_differences() -> None:
    theirs = random(2, 6, 12, seed=1, dtype=torch.float64)
    ours = random(2, 6, 8, seed=2, dtype=torch.float64).requires_grad_()
    rows = random(2, 6, seed=3, dtype=torch.float64).abs()
    assert torch.autograd.gradcheck(lambda x: relation_kl(x, theirs, rows, 4, chunk=4), (ours,), eps=1e-6, atol=1e-8)
    module = loss(config(8, 2), config(12, 2), relation_heads=2)
    fixed = [random(2, 6, 12, seed=s, dtype=torch.float64) for s in (4, 5, 6)]
    parts = tuple(random(2, 6, 8, seed=s, dtype=torch.float64).requires_grad_() for s in (7, 8, 9))

    def value(*given: Tensor) -> Tensor:
        mask = torch.ones(2, 6, dtype=torch.bool)
        out: Tensor = module({1: Relations(*given)}, [{1: Relations(*fixed)}], torch.tensor([[0.5, 1.0]]), mask)
        return out

    assert torch.autograd.gradcheck(value, parts, eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("chunk", [1, 5, 12, 13, 128])
def test_chunks_change_nothing(chunk: int) -> None:
    def outcome(rows_at_a_time: int) -> tuple[Tensor, Tensor]:
        ours = random(2, 13, 16, seed=1, dtype=torch.float64).requires_grad_()
        theirs, rows = random(2, 13, 24, seed=2, dtype=torch.float64), torch.full((2, 13), 0.1, dtype=torch.float64)
        value = relation_kl(ours, theirs, rows, 8, chunk=rows_at_a_time)
        (gradient,) = torch.autograd.grad(value, ours)
        return value.detach(), gradient

    for found, expected in zip(outcome(chunk), outcome(10**6), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_maps_by_hand_and_by_groups_of_heads() -> None:
    ours = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    theirs = torch.tensor([[[[1.0, 0.0], [0.2, 0.8]], [[1.0, 0.0], [0.3, 0.7]]]])  # mean of the two: 0.25, 0.75
    expected = 0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()
    rows = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(map_kl(ours, theirs, rows), 2 * expected)
    swapped = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(0.5 / 0.75).log()
    torch.testing.assert_close(map_kl(theirs, ours, rows), 2 * swapped)
    four = torch.cat([theirs[:, :1], theirs[:, :1], theirs[:, 1:], theirs[:, 1:]], dim=1)
    assert map_kl(theirs, four, rows) == 0
    logits = random(1, 2, 3, 3, seed=1, dtype=torch.float64).requires_grad_()
    future = torch.ones(3, 3, dtype=torch.bool).triu(1)
    p = random(1, 4, 3, 3, seed=2).masked_fill(future, float("-inf")).softmax(-1)
    map_kl(logits.masked_fill(future, float("-inf")).softmax(-1), p, torch.ones(1, 3)).backward()  # type: ignore[no-untyped-call]
    q = logits.detach().masked_fill(future, float("-inf")).softmax(-1).float()
    slope = (q - p.reshape(1, 2, 2, 3, 3).mean(2)) / 2
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.float(), slope)


class Watcher(TorchDispatchMode):
    """Notes the largest result, and refuses operations whose shape or use needs values on the host."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} reads values back"
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("kind", ["relation", "maps"])
def test_nothing_is_read_back_and_no_full_relation_exists(kind: str) -> None:
    module = loss(config(32, 2), config(32, 2), kind=kind, relation_heads=2)
    length, wide = 512, 32
    if kind == "relation":
        ours, theirs = relations(wide, wide, 1, length), relations(wide, wide, 4, length)
        given: Any = Relations(*(x.requires_grad_() for x in ours))
        first = given.query
    else:
        first = given = random(3, 2, length, length).softmax(-1).requires_grad_()
        theirs = random(3, 2, length, length, seed=1).softmax(-1)  # type: ignore[assignment]
    with Watcher() as watcher:
        module({1: given}, [{1: theirs}], torch.ones(1, 3), torch.ones(3, length, dtype=torch.bool)).backward()
    assert watcher.operations > 10
    assert first.grad is not None
    if kind == "relation":
        assert watcher.largest <= 3 * 2 * 128 * length  # batch x heads x chunk x keys


def models(tmp_path: Path, **families: dict[str, Any]) -> list[PreTrainedModel]:
    folders = [write_model(tmp_path / f, f, seed=i, **words) for i, (f, words) in enumerate(families.items())]
    return [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]


def caught(module: AttentionLoss, student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> Tensor:
    module.prepare(student)
    module.prepare(teacher)
    with module.watch_student(student) as ours:
        student(input_ids=ids)
    with torch.no_grad(), module.watch_teacher(0, teacher) as theirs:
        teacher(input_ids=ids)
    value: Tensor = module(ours, [theirs], torch.ones(1, len(ids)), torch.ones_like(ids, dtype=torch.bool))
    return value


@pytest.mark.parametrize("kind", ["relation", "maps"])
def test_identical_models_agree_and_others_come_nearer(tmp_path: Path, kind: str) -> None:
    student, teacher = models(tmp_path, llama={"width": 48}, gpt_neox={"width": 64, "layers": 3})
    ids = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(0))
    same = loss(student.config, student.config, kind=kind)
    value = caught(same, student, student, ids)
    assert value.item() == 0.0
    value.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in student.parameters())
    module = loss(student.config, teacher.config, kind=kind)
    assert (module.student_layers(), module.teacher_layers(0)) == ([1], [2])
    assert (module.plan.heads, module.state_dict()) == (8 if kind == "relation" else 0, {})
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    values = []
    for _ in range(12):
        optimizer.zero_grad()
        values.append(caught(module, student, teacher, ids))
        values[-1].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert 0 < values[-1].item() < 0.5 * values[0].item()
    assert all(p.grad is None for p in teacher.parameters())


def test_under_autocast_relations_are_formed_in_float32() -> None:
    ours, theirs = random(2, 40, 32, seed=1).bfloat16().requires_grad_(), random(2, 40, 64, seed=2).bfloat16()
    rows = torch.full((2, 40), 1 / 80)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = relation_kl(ours, theirs, rows, 8)
    value.backward()  # type: ignore[no-untyped-call]
    expected = (dense_kl(ours.detach(), theirs, 8) / 80).sum()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert ours.grad is not None
    assert ours.grad.dtype == torch.bfloat16
    exact = ours.detach().float().requires_grad_()
    relation_kl(exact, theirs, rows, 8).backward()  # type: ignore[no-untyped-call]
    assert exact.grad is not None
    assert torch.equal(ours.grad, exact.grad.bfloat16())


def test_heads_are_the_most_that_fit_all_widths() -> None:
    assert loss(config(64, 4), config(96, 4)).plan.heads == 16
    assert loss(config(64, 4), config(96, 4, 1)).plan.heads == 8  # keys of 24 channels
    assert loss(config(64, 4), config(96, 4), config(60, 4)).plan.heads == 4
    assert loss(config(64, 4), config(96, 4), relation_heads=32).plan.heads == 32


def test_what_is_refused_before_any_work() -> None:
    bloom = AutoConfig.for_model("bloom", hidden_size=64, n_head=4, n_layer=2)
    gpt2 = AutoConfig.for_model("gpt2", n_embd=64, n_head=4, n_layer=2)
    maps = {"kind": "maps"}
    for words, student, teacher, length, message in (
        (
            {},
            config(),
            bloom,
            64,
            r"the projections of teacher 'a', family 'bloom', are not known, only those of cohere,",
        ),
        ({}, bloom, config(), 64, r"the projections of the student, family 'bloom'"),
        (
            {"layers": [(1, 2)]},
            config(),
            config(),
            64,
            r"layers: pair \[1, 2\] does not exist; the student has layers 0 to 1, teacher 'a' 0 to 1",
        ),
        ({"layers": []}, config(), config(), 64, "an empty list aligns nothing"),
        (
            {"relation_heads": 16},
            config(),
            config(48, 4, 2),
            64,
            r"relation_heads: 16 does not divide the 24 channels of the keys and values of teacher 'a'; .* allow 1, 2, 4, 8",
        ),
        (maps, config(), config(), 2000, r"max_map_tokens: 1024, but data.sequence_length is 2000"),
        (maps, config(60, 6), config(), 64, r"the student has 6 heads and teacher 'a' 4, of which neither divides"),
        (maps, gpt2, config(), 64, r"the student's attn_pdrop is 0.1"),
    ):
        with pytest.raises(BadInput, match=message) as raised:
            mapped_attention(AttentionLossSpec(**words), student, [("a", teacher)], length)  # type: ignore[arg-type]
        assert "\n" not in str(raised.value)
    mapped_attention(AttentionLossSpec(kind="maps", max_map_tokens=2000), config(64, 8), [("a", config())], 2000)
    plan = mapped_attention(AttentionLossSpec(layers=[(1, 0), (0, 1), (1, 0)]), config(), [("a", config())], 10**6)
    assert plan.pairs == [[(0, 1), (1, 0)]]
