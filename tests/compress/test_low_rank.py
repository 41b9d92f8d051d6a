"""Low rank: the decomposition against its theory, the local distillation, and checkpoints that only their reader opens."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cutting import logits_of, some_calibration, some_text, write_teacher
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from edgestill.compress.importance import Calibration, input_moments
from edgestill.compress.local_distillation import Features, local_loss, make_low_rank, run_beside
from edgestill.compress.low_rank import LowRankLinear, choose_ranks, load_student, low_rank_of
from edgestill.compress.moments import low_rank_factors, with_ridge
from edgestill.export.model_facts import size_of_config
from edgestill.profiles.schema import LowRankSpec
from edgestill.runtime.errors import BadInput

CALIBRATION = some_calibration()


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def uneven_inputs(rows: int = 4000, width: int = 12) -> torch.Tensor:
    """float64 [rows, width], correlated, of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, width).double()
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mix.T


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with low-rank layers."""
    model = load(write_teacher(tmp_path / "dense", "qwen2", layers=2))
    make_low_rank(model, LowRankSpec(rank_fraction=0.3, steps=0), CALIBRATION, 0, None)
    model.save_pretrained(tmp_path / "low")
    return tmp_path / "low"


# the decomposition


@pytest.mark.parametrize("outputs", [7, 12, 30])
def test_the_error_is_the_tail_of_the_whitened_singular_values(outputs: int) -> None:
    x = uneven_inputs()
    weight = torch.randn(outputs, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moment = x.T @ x / len(x)
    tail = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moment)).square()
    for rank in (1, 3, 6):
        expand, reduce = low_rank_factors(weight, moment, rank)
        assert (reduce.shape, expand.shape) == ((rank, 12), (outputs, rank))
        error = (x @ (weight - expand @ reduce).T).square().sum(1).mean()
        assert error.item() == pytest.approx(tail[rank:].sum().item(), rel=1e-4)
        left, values, right = torch.linalg.svd(weight)
        blind = left[:, :rank] * values[:rank] @ right[:rank]
        assert error < (x @ (weight - blind).T).square().sum(1).mean()


def test_full_rank_is_the_layer_itself() -> None:
    layer, x = nn.Linear(12, 30), uneven_inputs().float()
    low = low_rank_of(layer, (x.T @ x / len(x)).double(), 12)
    torch.testing.assert_close(low(x), layer(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(low.weight.norm(dim=1), low.expand.weight.norm(dim=0), atol=0, rtol=1e-4)


def test_the_ridge_is_a_millionth_of_the_mean_and_inputs_may_be_nothing() -> None:
    moment = torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64))
    assert with_ridge(moment).diagonal().tolist() == [4 + 2e-6, 2e-6]
    assert torch.equal(with_ridge(torch.zeros(2, 2).double()), torch.eye(2).double())
    layer = nn.Linear(2, 2)
    assert torch.isfinite(low_rank_of(layer, torch.zeros(2, 2).double(), 1).weight).all()


def test_moments_are_means_over_all_tokens_and_shared_inputs_share_them(tmp_path: Path) -> None:
    model = load(write_teacher(tmp_path, layers=2))
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    found = input_moments(model, names, CALIBRATION, None)
    seen: dict[str, torch.Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, n=name: seen.__setitem__(n, a[0]))
    logits_of(model, CALIBRATION)
    for name in names:
        rows = seen[name].flatten(0, 1).double()
        torch.testing.assert_close(found[name], rows.T @ rows / len(rows), atol=1e-9, rtol=1e-6)
    assert torch.equal(found[names[0]], found[names[1]])


# which layers


def test_only_layers_that_become_smaller_are_factored(tmp_path: Path) -> None:
    model = load(write_teacher(tmp_path, layers=1))  # 32 wide, 16 for keys and values, 48 in the MLP
    ranks = choose_ranks(model, LowRankSpec(rank_fraction=0.5), "big")
    mlp = {f"model.layers.0.mlp.{name}_proj": 16 for name in ("gate", "up", "down")}
    thin = {f"model.layers.0.self_attn.{name}_proj": 8 for name in "kv"}
    assert ranks == {**thin, **mlp}
    assert len(choose_ranks(model, LowRankSpec(rank_fraction=0.45), "big")) == 7
    with pytest.raises(
        BadInput, match=r"at 0.9 no layer of teacher 'big' \(LlamaForCausalLM\) becomes smaller; give less"
    ):
        choose_ranks(model, LowRankSpec(rank_fraction=0.9), "big")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gemma3_text"])
def test_nearly_full_rank_is_nearly_the_model(tmp_path: Path, family: str) -> None:
    model = load(write_teacher(tmp_path, family, layers=2))
    before = logits_of(model, CALIBRATION)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers." in name:
            moment = input_moments(model, [name], CALIBRATION, None)[name]
            parent, _, own = name.rpartition(".")
            low = low_rank_of(module, moment, min(module.in_features, module.out_features))
            setattr(model.get_submodule(parent), own, low)
    torch.testing.assert_close(logits_of(model, CALIBRATION), before, atol=1e-4, rtol=1e-4)


# local distillation


def test_the_loss_by_hand() -> None:
    ours, theirs = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    # token 0: 0 - log sigmoid(1); token 1: (1 + 2) / 2 - log sigmoid(0)
    expected = (0.3132617 + 1.5 + 0.6931472) / 2
    assert local_loss(ours, theirs).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
def test_both_run_side_by_side(tmp_path: Path, family: str) -> None:
    dense = load(write_teacher(tmp_path, family, layers=3))
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    names = [name for name, module in dense.named_modules() if isinstance(module, nn.Linear) and "layers." in name]

    def alone(which: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        hooks = [
            which.get_submodule(name).register_forward_hook(lambda m, a, o, n=name: seen.__setitem__(n, (a[0], o)))
            for name in names
        ]
        logits_of(which, CALIBRATION)
        for hook in hooks:
            hook.remove()
        return seen

    with torch.no_grad():  # the embedding is shared: only blocks are compressed
        model.get_input_embeddings().weight.copy_(dense.get_input_embeddings().weight)
    theirs, ours = alone(dense), alone(model)
    found: dict[str, Features] = {}
    calls: list[int] = []

    def visit(features: Any) -> None:
        found.update(features)
        calls.append(len(features))

    run_beside(dense, model, names, CALIBRATION.token_ids, visit)
    assert calls == [len(names) // 3] * 3
    for name in names:
        assert torch.equal(found[name].given, theirs[name][0])
        assert torch.equal(found[name].wanted, theirs[name][1])
        torch.testing.assert_close(found[name].own, ours[name][0], atol=1e-5, rtol=1e-5)


def test_fitting_lowers_the_loss_of_every_layer_and_never_raises_one(tmp_path: Path) -> None:
    folder, calibration = write_teacher(tmp_path, layers=2), Calibration.of(some_text(windows=128), 10**6)
    model, plain = load(folder), load(folder)
    notes = make_low_rank(model, LowRankSpec(rank_fraction=0.25, steps=40), calibration, 0, None)
    assert set(notes["rank"]) == set(notes["loss"]) == set(notes["error"])
    assert all(after <= before for before, after in notes["loss"].values())
    fell = [before - after for before, after in notes["loss"].values()]
    assert sum(value > 0 for value in fell) > len(fell) // 2
    unfitted = make_low_rank(plain, LowRankSpec(rank_fraction=0.25, steps=0), calibration, 0, None)
    assert all(before == after for before, after in unfitted["loss"].values())
    assert {n: pair[0] for n, pair in notes["loss"].items()} == {n: pair[0] for n, pair in unfitted["loss"].items()}
    assert {n for n, m in model.named_modules() if isinstance(m, LowRankLinear)} == set(notes["rank"])


def test_a_rate_that_spoils_everything_leaves_the_decomposition(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path, layers=1)
    model, plain = load(folder), load(folder)
    notes = make_low_rank(model, LowRankSpec(rank_fraction=0.4, steps=3, learning_rate=100.0), CALIBRATION, 0, None)
    make_low_rank(plain, LowRankSpec(rank_fraction=0.4, steps=0), CALIBRATION, 0, None)
    assert all(before == after for before, after in notes["loss"].values())
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])


def test_the_same_seed_gives_the_same_layers(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path, layers=1)
    made = []
    for seed in (0, 0, 1):
        model = load(folder)
        make_low_rank(model, LowRankSpec(rank_fraction=0.3, steps=5), CALIBRATION, seed, None)
        made.append(model.state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


# checkpoints


def test_a_low_rank_checkpoint_comes_back_as_it_was(saved: Path, tmp_path: Path) -> None:
    student = load_student(saved, torch.float32)
    ranks = json.loads((saved / "config.json").read_text())["edgestill_low_rank"]["rank"]
    assert len(ranks) == 14
    assert {n: m.rank for n, m in student.named_modules() if isinstance(m, LowRankLinear)} == ranks
    assert type(student) is type(load(saved.parent / "dense"))
    assert not student.training
    student.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = load_student(tmp_path / "again", torch.float32)
    assert torch.equal(logits_of(again, CALIBRATION), logits_of(student, CALIBRATION))
    assert (tmp_path / "again" / "config.json").read_text() == (saved / "config.json").read_text()
    assert load_student(saved, torch.bfloat16).model.layers[0].mlp.up_proj.expand.weight.dtype == torch.bfloat16
    assert load_student(saved, torch.float32, attention="eager").config._attn_implementation == "eager"


def test_transformers_alone_refuses_it(saved: Path) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: copying a param with shape torch.Size\(\[10, "):
        load(saved)


def test_a_plain_checkpoint_loads_as_ever(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path)
    ours, theirs = load_student(folder, torch.float32), load(folder)
    assert torch.equal(logits_of(ours, CALIBRATION), logits_of(theirs, CALIBRATION))
    assert not ours.training


def test_parameters_are_counted_as_they_are(saved: Path) -> None:
    student = load_student(saved, torch.float32)
    counted = sum({id(p): p.numel() for p in student.parameters()}.values())
    config = AutoConfig.from_pretrained(saved)
    assert size_of_config(config).parameters == counted
    assert size_of_config(AutoConfig.from_pretrained(saved.parent / "dense")).parameters > counted


def without_a_factor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.expand.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def with_ranks(ranks: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "edgestill_low_rank": ranks}))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            without_a_factor,
            r"has no weights for model.layers.1.mlp.up_proj.expand.weight \(of 1 missing\); build the stu",
        ),
        (
            with_ranks({"rank": {"model.layers.7.mlp.up_proj": 4}}),
            "gives model.layers.7.mlp.up_proj the rank 4, which is no",
        ),
        (
            with_ranks({"rank": {"model.layers.0.mlp.up_proj": 32}}),
            "gives model.layers.0.mlp.up_proj the rank 32, which",
        ),
        (
            with_ranks({"rank": {"model.norm": 4}}),
            "gives model.norm the rank 4, which is no linear layer of Qwen2ForCausalLM",
        ),
        (
            with_ranks({"ranks": {}}),
            'edgestill_low_rank must be {"rank": {module name: whole number}}; restore the file',
        ),
        (with_ranks({"rank": {"model.layers.0.mlp.up_proj": "4"}}), 'must be {"rank": {module name: whole number}}'),
    ],
)
def test_damaged_checkpoints_are_refused(saved: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(saved)
    with pytest.raises(BadInput, match=words):
        load_student(saved, torch.float32)
