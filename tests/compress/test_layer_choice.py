"""Choosing layers: against direct evaluation of models that were really cut, and planted blocks that do nothing."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from cutting import facts_of, logits_of, some_calibration, some_text, write_teacher
from transformers import AutoModelForCausalLM

from edgestill.compress.importance import Calibration
from edgestill.compress.layer_choice import Removal, block_influence, most_influential, remove_one_by_one
from edgestill.compress.student import make_student
from edgestill.compress.teachers import decoder_blocks
from edgestill.profiles.schema import StudentSpec
from edgestill.runtime.progress import QuietProgress

ANY = ("llama", "gpt2", "gpt_neox", "gemma3_text")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def with_idle_block(folder: Path, layer: int) -> Path:
    """The block of a saved Llama adds nothing to the residual stream any more."""
    model = load(folder)
    block = decoder_blocks(model)[layer]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    return folder


def cross_entropy(model: Any, calibration: Calibration) -> float:
    logits = logits_of(model, calibration)[:, :-1][calibration.scored]
    return torch.nn.functional.cross_entropy(logits, calibration.token_ids[:, 1:][calibration.scored]).item()


def cut(folder: Path, keep: list[int]) -> Any:
    return make_student(StudentSpec(init="teacher:big", keep_layers=keep), [facts_of(folder)], 263, 0).model


@pytest.mark.parametrize("family", ANY)
def test_block_influence_is_one_minus_the_mean_cosine(tmp_path: Path, family: str) -> None:
    model, calibration = load(write_teacher(tmp_path, family)), some_calibration()
    ours = block_influence(model, calibration, None)
    states: list[torch.Tensor] = []
    blocks = decoder_blocks(model)
    hooks = [b.register_forward_pre_hook(lambda m, a: states.append(a[0])) for b in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda m, a, o: states.append(o[0] if isinstance(o, tuple) else o)))
    logits_of(model, calibration)
    for hook in hooks:
        hook.remove()
    pairs = itertools.pairwise(states)
    theirs = [1 - torch.cosine_similarity(before, after, dim=-1).mean().item() for before, after in pairs]
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert min(ours) > 0.01


def test_a_block_that_does_nothing_has_no_influence(tmp_path: Path) -> None:
    model = load(with_idle_block(write_teacher(tmp_path, layers=4), 2))
    influence = block_influence(model, some_calibration(), None)
    assert influence[2] == pytest.approx(0, abs=1e-12)
    assert most_influential(influence, 3) == [0, 1, 3]


def test_the_largest_stay_in_their_order_and_the_earlier_of_equals() -> None:
    assert most_influential([0.1, 0.9, 0.5, 0.7], 2) == [1, 3]
    assert most_influential([0.5, 0.5, 0.5], 2) == [0, 1]


@pytest.mark.parametrize(("family", "masked"), [*((family, False) for family in ANY), ("llama", True)])
def test_every_removal_costs_what_the_cut_model_costs(tmp_path: Path, family: str, masked: bool) -> None:
    folder, calibration = write_teacher(tmp_path, family, layers=4), some_calibration(masked=masked)
    left, expected = [0, 1, 2, 3], []
    while len(left) > 1:
        costs = {i: cross_entropy(cut(folder, [k for k in left if k != i]), calibration) for i in left}
        best = min(costs, key=lambda i: costs[i])
        left.remove(best)
        expected.append(Removal(best, pytest.approx(costs[best], abs=1e-5)))
    kept, removals = remove_one_by_one(load(folder), facts_of(folder), calibration, 1, None)
    assert (kept, removals) == (left, expected)


def test_layers_of_mixed_attention_keep_their_own_kind(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    folder = write_teacher(tmp_path, "gemma3_text", layers=4, layer_types=kinds, sliding_window=3)
    calibration = some_calibration()
    _, removals = remove_one_by_one(load(folder), facts_of(folder), calibration, 3, None)
    keep = [i for i in range(4) if i != removals[0].layer]
    student = cut(folder, keep)
    assert student.config.layer_types == [kinds[i] for i in keep]
    assert removals[0].cross_entropy == pytest.approx(cross_entropy(student, calibration), abs=1e-5)


def test_the_idle_block_goes_first_at_no_cost(tmp_path: Path) -> None:
    folder, calibration = with_idle_block(write_teacher(tmp_path, layers=4), 1), some_calibration()
    kept, removals = remove_one_by_one(load(folder), facts_of(folder), calibration, 3, None)
    assert kept == [0, 2, 3]
    assert removals == [Removal(1, pytest.approx(cross_entropy(load(folder), calibration), abs=1e-6))]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    folder, calibration = write_teacher(tmp_path, layers=3), some_calibration()
    model = load(folder)
    before, blocks, config = copy.deepcopy(model.state_dict()), decoder_blocks(model), model.config.to_dict()
    remove_one_by_one(model, facts_of(folder), calibration, 1, None)
    assert decoder_blocks(model) is blocks
    assert model.config.to_dict() == config
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)


def test_calibration_windows_are_spread_evenly_and_counted() -> None:
    part = some_text(windows=9, length=12)
    chosen = Calibration.of(part, 12 * 3 + 5)
    assert torch.equal(chosen.token_ids, torch.from_numpy(part.token_ids[[0, 4, 8]].astype("int64")))
    assert len(Calibration.of(part, 1)) == 1
    assert len(Calibration.of(part, 10**6)) == 9
    with QuietProgress().task("x", 0) as task:
        batches = list(chosen.batches(torch.device("cpu"), task, "reading"))
    assert (task.done, task.note) == (36, "reading")
    assert sum(len(ids) for ids, _ in batches) == 3
