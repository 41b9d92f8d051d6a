"""On-policy windows: equal to sampling without a cache, repeatable, and without a trace on the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, write_model
from torch.utils._python_dispatch import TorchDispatchMode

from edgestill.compress.on_policy import MIN_PROMPT_TOKENS, OnPolicy, check
from edgestill.profiles.data_words import OnPolicySpec
from edgestill.runtime.errors import BadInput

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox")
GREEDY = 1e-6
WINDOW, NEW = 20, 9


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    folder: Path = tmp_path_factory.mktemp("students")
    overrides: dict[str, dict[str, Any]] = {"gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3}}
    out = {}
    for family in FAMILIES:
        path = write_model(folder / family, family, width=32, **overrides.get(family, {}))
        out[family] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
        out[family].config.use_cache = False
    return out


def windows(batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, WINDOW), generator=torch.Generator().manual_seed(seed))


def policy(seed: int = 1, **words: Any) -> OnPolicy:
    return OnPolicy(OnPolicySpec(**{"new_tokens": NEW, **words}), seed)


@torch.no_grad()
def without_cache(student: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """The likeliest token each time, every prefix read anew."""
    student.eval()
    ids = input_ids[:, :-NEW]
    for _ in range(NEW):
        ids = torch.cat([ids, student(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    student.train()
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_reading_every_prefix_anew(students: dict[str, Any], family: str) -> None:
    written = policy(temperature=GREEDY).rewrite(students[family], windows(), 0)
    assert written.tolist() == without_cache(students[family], windows()).tolist()


def test_prompt_and_input_are_kept(students: dict[str, Any]) -> None:
    given = windows()
    written = policy().rewrite(students["llama"], given, 0)
    assert torch.equal(given, windows())
    assert torch.equal(written[:, :-NEW], given[:, :-NEW])
    assert written.dtype == torch.int64 and written.shape == given.shape


def test_draws_follow_the_student_at_its_temperature(students: dict[str, Any]) -> None:
    """Frequencies of one next token over 4,000 equal prompts, against its softmax: chi-square over the likely tokens."""
    student, temperature, rows = students["llama"], 1.5, 4000
    prompt = windows(1).expand(rows, -1)[:, :6]
    written = policy(new_tokens=1, temperature=temperature).rewrite(student, prompt, 3)
    with torch.no_grad():
        expected = torch.softmax(student(input_ids=prompt[:1, :-1]).logits[0, -1] / temperature, -1) * rows
    found = torch.bincount(written[:, -1], minlength=VOCAB).float()
    likely = expected >= 10
    assert likely.sum() > 30
    chi_square = ((found - expected).square() / expected)[likely].sum() / likely.sum()
    assert 0.5 < chi_square < 1.6


def test_same_step_writes_the_same_and_another_step_or_seed_does_not(students: dict[str, Any]) -> None:
    student = students["qwen2"]
    first = policy().rewrite(student, windows(), 7)
    torch.rand(5)  # what the run did in between does not matter
    assert torch.equal(first, policy().rewrite(student, windows(), 7))
    assert not torch.equal(first, policy().rewrite(student, windows(), 8))
    assert not torch.equal(first, policy(seed=2).rewrite(student, windows(), 7))


@pytest.mark.parametrize("use_cache", [True, False])
def test_student_and_random_state_are_left_as_they_were(students: dict[str, Any], use_cache: bool) -> None:
    student = students["gpt2"]
    student.config.use_cache = use_cache
    student.transformer.h[0].eval()  # one part was frozen by its owner
    modes = [module.training for module in student.modules()]
    state = torch.get_rng_state()
    policy().rewrite(student, windows(), 0)
    assert [module.training for module in student.modules()] == modes
    assert student.config.use_cache is use_cache
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student.parameters())
    student.train()
    student.config.use_cache = False


def test_modes_come_back_when_the_student_fails(students: dict[str, Any]) -> None:
    student = students["llama"]
    with pytest.raises(IndexError):
        policy().rewrite(student, windows() + VOCAB, 0)
    assert student.training and student.model.layers[0].training


def test_no_dropout_while_writing(students: dict[str, Any]) -> None:
    student = students["gpt2"]
    assert torch.equal(
        policy(temperature=GREEDY).rewrite(student, windows(), 0),
        policy(temperature=GREEDY).rewrite(student, windows(), 1),
    )


def test_gradient_checkpointing_does_not_switch_the_cache_off(students: dict[str, Any]) -> None:
    student = students["llama"]
    student.gradient_checkpointing_enable()
    try:
        written = policy(temperature=GREEDY).rewrite(student, windows(), 0)
    finally:
        student.gradient_checkpointing_disable()
    assert torch.equal(written, without_cache(student, windows()))


def test_a_special_token_ends_nothing(students: dict[str, Any]) -> None:
    """A student that writes its end-of-text token first goes on after it as after any other token."""
    student = students["gpt_neox"]
    first = int(without_cache(student, windows(1))[0, -NEW])
    config = student.config
    before = config.eos_token_id, config.pad_token_id
    config.eos_token_id = config.pad_token_id = first
    try:
        written = policy(temperature=GREEDY).rewrite(student, windows(1), 0)
    finally:
        config.eos_token_id, config.pad_token_id = before
    assert written[0, -NEW] == first
    assert torch.equal(written, without_cache(student, windows(1)))
    assert len(set(written[0, -NEW:].tolist())) > 1


def test_training_under_the_same_autocast_keeps_its_gradients(students: dict[str, Any]) -> None:
    """Weights cast without a gradient while writing must not be the ones that training differentiates."""
    student = students["llama"].eval()
    gradients = []
    for writes in (False, True):
        student.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if writes:
                policy().rewrite(student, windows(), 0)
            student(input_ids=windows(), use_cache=False).logits.float().square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    student.zero_grad(set_to_none=True)
    student.train()
    assert set(gradients[1]) == {name for name, _ in student.named_parameters()}
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


class ReadBacks(TorchDispatchMode):
    """Counts tensors read back as Python numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_read_back(students: dict[str, Any], family: str) -> None:
    with ReadBacks() as reads:
        policy().rewrite(students[family], windows(), 0)
        assert reads.count == 0
        bool(torch.ones(()) > 0)  # the counter counts
        assert reads.count == 1


@pytest.mark.parametrize("fraction", [0.01, 0.25, 1 / 3, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 5])
def test_share_of_the_batches(fraction: float, seed: int) -> None:
    """Within one batch of the share over any stretch, and the same when asked again."""
    one = OnPolicy(OnPolicySpec(fraction=fraction), seed)
    due = torch.tensor([one.due(step) for step in range(3000)]).long()
    again = OnPolicy(OnPolicySpec(fraction=fraction), seed)
    assert [again.due(step) for step in (2999, 3, 1500)] == [bool(due[i]) for i in (2999, 3, 1500)]
    sums = torch.cat([torch.zeros(1, dtype=torch.int64), due.cumsum(0)])
    for stretch in (1, 10, 997, 3000):
        counts = sums[stretch:] - sums[:-stretch]
        assert (counts - stretch * fraction).abs().max() < 1


def test_seeds_start_at_different_steps() -> None:
    first = {
        next(step for step in range(200) if OnPolicy(OnPolicySpec(fraction=0.01), seed).due(step)) for seed in range(8)
    }
    assert len(first) > 3


def test_continuation_must_leave_a_prompt(students: dict[str, Any]) -> None:
    check(OnPolicySpec(new_tokens=64), 64 + MIN_PROMPT_TOKENS)
    with pytest.raises(BadInput, match=r"new_tokens: 64, but windows of 64 tokens keep 4 .* at most 60"):
        check(OnPolicySpec(new_tokens=64), 64)
    with pytest.raises(BadInput, match="new_tokens: 17"):
        policy(new_tokens=17).rewrite(students["llama"], windows(), 0)
