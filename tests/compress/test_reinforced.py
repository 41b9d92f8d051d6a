"""Selection of teachers by a learnt policy: the gradient, what it learns, how it resumes, and how processes agree."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from edgestill.compress.fusion import FusionAccumulator, WeightRule
from edgestill.compress.reinforced import NOT_SELECTED, SELECTED, SelectionPolicy
from edgestill.compress.scratch import Scratch
from edgestill.profiles.fusion_words import FusionSpec, ReinforcedSpec

LOG_V = math.log(50)
LENGTHS = (4, 0, 6, 3)
"""Tokens that count in each sequence; the second has none."""
SEQUENCE = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))


def new_policy(teachers: int = 2, **words: float) -> SelectionPolicy:
    return SelectionPolicy(ReinforcedSpec(**words), teachers, LOG_V)


def answers(teachers: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Entropies and label log-probabilities [K, rows]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, teachers, rows, generator=generator).mul(LOG_V).unbind()  # type: ignore[return-value]


def choose_all(policy: SelectionPolicy, entropy: Tensor, label_log_p: Tensor, sequence: Tensor) -> Tensor:
    """Actions [K, rows] of a batch handed over at once."""
    chosen = [policy.choose(k, entropy[k], label_log_p[k], sequence) for k in range(len(entropy))]
    return (torch.stack(chosen) == SELECTED).to(entropy.dtype)


def test_choices_are_whole_sequences_and_start_at_even_odds() -> None:
    torch.manual_seed(0)
    policy = new_policy()
    sequence = torch.arange(4000).repeat_interleave(2)
    entropy, surprise = answers(2, 8000)
    policy.begin(4000)
    actions = choose_all(policy, entropy, -surprise, sequence)
    assert torch.equal(actions[:, ::2], actions[:, 1::2])
    assert (actions.mean(1) - 0.5).abs().max() < 0.03  # four standard errors
    assert abs(torch.corrcoef(actions[:, ::2])[0, 1]) < 0.07  # teachers are chosen apart


def test_gradient_equals_autograd_of_the_log_probability() -> None:
    """The change of the weights / learning rate, against torch's gradient of mean advantage x log pi(a)."""
    torch.manual_seed(1)
    policy = SelectionPolicy(ReinforcedSpec(learning_rate=0.1, baseline_decay=0.9), 3, LOG_V).double()
    policy.weight.copy_(torch.randn(3, 3))
    policy.updates.fill_(2.0)
    policy.reward_average.fill_(-1.3 * (1 - 0.9**2))  # a baseline of -1.3
    assert policy.baseline().item() == pytest.approx(-1.3)
    entropy, surprise = (values.double() for values in answers(3, len(SEQUENCE)))
    before = policy.weight.clone()
    policy.begin(4)
    actions = choose_all(policy, entropy, -surprise, SEQUENCE)
    rewards = torch.tensor([-1.0, math.nan, -2.5, 0.3], dtype=torch.float64)
    policy.reward(rewards)
    policy.finish()

    weight = before.clone().requires_grad_()
    objective = torch.zeros((), dtype=torch.float64)
    for b in (0, 2, 3):
        rows = b == SEQUENCE
        for k in range(3):
            state = torch.stack([entropy[k, rows].mean() / LOG_V, surprise[k, rows].mean() / LOG_V, torch.tensor(1.0)])
            log_pi = torch.distributions.Bernoulli(logits=weight[k] @ state.double()).log_prob(actions[k, rows][0])
            objective = objective + (rewards[b] + 1.3) * log_pi / 3
    objective.backward()
    assert weight.grad is not None
    torch.testing.assert_close((policy.weight - before) / 0.1, weight.grad, rtol=1e-9, atol=1e-12)
    mean = (-1.0 - 2.5 + 0.3) / 3
    assert policy.reward_average.item() == pytest.approx(-1.3 * (1 - 0.81) * 0.9 + 0.1 * mean)
    assert policy.updates.item() == 3


def test_first_batch_is_its_own_baseline() -> None:
    """The same for everyone teaches nothing; the mean is remembered as it is."""
    policy = new_policy()
    policy.begin(4)
    choose_all(policy, *answers(2, len(SEQUENCE)), SEQUENCE)
    policy.reward(torch.full((4,), -8.0))
    policy.finish()
    assert policy.weight.abs().max() < 1e-6
    assert policy.baseline().item() == pytest.approx(-8.0)


def test_batch_without_a_valid_token_changes_nothing() -> None:
    torch.manual_seed(0)
    policy = new_policy()
    for rewards in ([-1.0, 0.0, -3.0, -2.0], [0.5, 0.0, 0.5, 0.1]):
        policy.begin(4)
        choose_all(policy, *answers(2, len(SEQUENCE)), SEQUENCE)
        policy.reward(torch.tensor(rewards))
        policy.finish()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.begin(4)
    policy.reward(torch.full((4,), math.nan))
    policy.finish()
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_chunks_of_whole_sequences_choose_and_learn_as_one() -> None:
    learnt = []
    for cuts in ([0, 13], [0, 4, 13], [0, 4, 10, 13]):
        torch.manual_seed(3)
        policy = new_policy(learning_rate=1.0)
        for batch in range(3):
            entropy, surprise = answers(2, len(SEQUENCE), seed=batch)
            policy.begin(4)
            parts = [choose_all(policy, entropy[:, a:b], -surprise[:, a:b], SEQUENCE[a:b]) for a, b in pairwise(cuts)]
            actions = torch.cat(parts, dim=1)
            policy.reward(actions.new_tensor([0.3, 9.0, -1.0, 0.7]) * batch)
            policy.finish()
        learnt.append((policy.weight.clone(), actions))
    assert learnt[0][0].abs().max() > 0.01
    for weight, actions in learnt[1:]:
        assert torch.equal(weight, learnt[0][0])
        assert torch.equal(actions, learnt[0][1])


def test_batches_of_one_step_teach_as_one() -> None:
    """Chosen in one batch of four sequences, or in two of two: the draws are the same, and so is what is learnt."""
    learnt = []
    entropy, surprise = answers(2, 8)
    rewards = torch.tensor([-1.0, 0.5, -3.0, 2.0])
    for size in (4, 2):
        torch.manual_seed(5)
        policy = new_policy(learning_rate=1.0)
        for _ in range(3):
            for start in range(0, 4, size):
                rows = slice(2 * start, 2 * (start + size))
                policy.begin(size)
                choose_all(policy, entropy[:, rows], -surprise[:, rows], torch.arange(size).repeat_interleave(2))
                policy.reward(rewards[start : start + size])
            policy.finish()
        learnt.append(policy.state_dict())
    assert learnt[0]["weight"].abs().max() > 0.01 and learnt[0]["updates"] == 3
    for name, value in learnt[0].items():
        torch.testing.assert_close(learnt[1][name], value, atol=1e-6, rtol=0)


def test_numbers_of_sequences_may_have_gaps() -> None:
    """Windows without a token that counts leave gaps; a chunk of few rows may span many of them."""
    policy = new_policy().eval()
    policy.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 0.5]]))
    entropy = torch.tensor([[0.1, 0.9], [0.4, 0.6]]) * LOG_V
    assert choose_all(policy, entropy, torch.zeros(2, 2), torch.tensor([3, 90])).tolist() == [[1, 1], [1, 0]]


def play(policy: SelectionPolicy, batches: int, first: int = 0) -> Tensor:
    """A bandit: teacher 0 helps and teacher 1 harms; teacher 2 helps only where its entropy is low. Last actions [3, 16]."""
    sequence = torch.arange(16).repeat_interleave(2)
    for batch in range(first, first + batches):
        entropy, surprise = answers(3, 16, seed=batch)
        policy.begin(16)
        pairs = (values.repeat_interleave(2, 1) for values in (entropy, -surprise))
        actions = choose_all(policy, *pairs, sequence)[:, ::2]
        sure = (entropy[2] < LOG_V / 2).float() * 2 - 1
        policy.reward(-5 + actions[0] - actions[1] + actions[2] * sure)
        policy.finish()
    return actions


def test_learns_the_planted_teachers() -> None:
    torch.manual_seed(0)
    policy = new_policy(3, learning_rate=0.5)
    play(policy, 600)
    policy.eval()
    entropy = torch.linspace(0, LOG_V, 21).expand(3, -1)
    middle = torch.full_like(entropy, -LOG_V / 2)
    actions = choose_all(policy, entropy, middle, torch.arange(7, 28))
    assert actions[0].all() and not actions[1].any()
    assert actions[2, :9].all() and not actions[2, 12:].any()


def test_evaluation_is_deterministic_and_learns_nothing() -> None:
    """pi >= 1/2 is selected: whatever the entropy under teacher 0, below half of the largest under teacher 1."""
    policy = new_policy().eval()
    policy.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 0.5]]))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    entropy = torch.tensor([[0.1, 0.9], [0.4, 0.6]]) * LOG_V
    state = torch.get_rng_state()
    for start in (0, 5):  # a chunk from anywhere, without `begin`
        assert choose_all(policy, entropy, torch.zeros(2, 2), torch.arange(2) + start).tolist() == [[1, 1], [1, 0]]
        policy.begin(2)
        policy.reward(torch.ones(2))
        policy.finish()
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_label_that_a_teacher_rules_out_is_bounded() -> None:
    torch.manual_seed(0)
    policy = new_policy()
    for _ in range(2):
        policy.begin(4)
        choose_all(policy, torch.zeros(2, 13), torch.full((2, 13), -math.inf), SEQUENCE)
        policy.reward(torch.arange(4.0))
        policy.finish()
    assert policy.weight.isfinite().all() and policy.weight.abs().max() > 0


def test_resumed_run_goes_on_bit_for_bit() -> None:
    torch.manual_seed(4)
    whole = new_policy(3, learning_rate=0.5)
    play(whole, 5)
    saved = {name: value.clone() for name, value in whole.state_dict().items()}
    random = torch.get_rng_state()
    last = play(whole, 5, first=5)
    assert set(saved) == {"weight", "reward_average", "updates"}

    torch.manual_seed(99)
    resumed = new_policy(3, learning_rate=0.5)
    resumed.load_state_dict(saved)
    torch.set_rng_state(random)
    assert torch.equal(play(resumed, 5, first=5), last)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not torch.equal(saved["weight"], whole.weight)


@pytest.mark.parametrize("mix", ["arithmetic", "geometric"])
def test_weights_are_the_mean_of_the_selected_and_uniform_without_any(mix: str) -> None:
    """Sequences that select (0, 1), (0), none: weights (1/2, 1/2, 0), (1, 0, 0) and thirds, through the accumulator."""
    rule = WeightRule.of(FusionSpec(weights="uniform", mix=mix), [1.0] * 3, 5)  # type: ignore[arg-type]
    policy = new_policy(3).eval()
    policy.weight[:, 0] = -1.0
    policy.weight[:, 2] = 0.5
    high, low = 0.9 * LOG_V, 0.1 * LOG_V
    entropy = torch.tensor([[low, low, high], [low, high, high], [high, high, high]])
    logits = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0))
    terms = logits.softmax(-1) if mix == "arithmetic" else logits.log_softmax(-1)
    fused = FusionAccumulator(rule, 3, Scratch(64, torch.device("cpu")))
    for k in range(3):
        fused.add(terms[k].clone(), policy.choose(k, entropy[k], torch.zeros(3), torch.arange(3)))
    p, _, weights = fused.finish()
    expected = torch.tensor([[1 / 2, 1, 1 / 3], [1 / 2, 0, 1 / 3], [0, 0, 1 / 3]])
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=math.exp(NOT_SELECTED))
    mixed = (terms * expected.unsqueeze(-1)).sum(0)
    torch.testing.assert_close(p, mixed if mix == "arithmetic" else mixed.softmax(-1))


class Operators(TorchDispatchMode):
    """The operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_and_sums_are_of_integers() -> None:
    """On a GPU a float index_add is not repeatable; the one that pools a sequence takes integers."""
    policy = new_policy()
    with Operators() as ran:
        policy.begin(4)
        choose_all(policy, *answers(2, len(SEQUENCE)), SEQUENCE)
        policy.reward(torch.arange(4.0))
        policy.finish()
    assert "aten::_local_scalar_dense" not in ran.names and "aten::nonzero" not in ran.names
    assert "aten::index_add_" in ran.names
    entropy = torch.full((2, 13), 1 / 3)  # thirds are not exact, their sums in another order differ
    shuffled = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    one, _ = policy._state(entropy[0], -entropy[0] * torch.arange(13), SEQUENCE, 4)
    other, _ = policy._state(entropy[0], (-entropy[0] * torch.arange(13))[shuffled], SEQUENCE[shuffled], 4)
    assert torch.equal(one, other)


def test_order_of_the_calls() -> None:
    policy = new_policy()
    with pytest.raises(RuntimeError, match="begin"):
        policy.choose(0, torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    policy.begin(1)
    policy.reward(torch.zeros(1))
    policy.finish()
    with pytest.raises(RuntimeError, match="begin"):
        policy.reward(torch.zeros(1))
        policy.finish()


def learn_share(rank: int, world: int, store: str | None, out: str) -> None:
    """Three batches of six sequences, of which this process has its share; the policy is written to `out`."""
    if store is not None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(5)
    policy = new_policy(learning_rate=1.0)
    size = 6 // world
    share = slice(rank * size, (rank + 1) * size)
    for batch in range(3):
        entropy, surprise = answers(2, 6, seed=batch)
        policy.begin(size)
        actions = choose_all(policy, entropy[:, share], -surprise[:, share], torch.arange(size))
        policy.reward(actions[0] - actions[1] + torch.arange(6.0)[share] - 2 * batch)
        policy.finish()
    torch.save(policy.state_dict(), f"{out}.{world}.{rank}")
    if store is not None:
        torch.distributed.destroy_process_group()


def test_two_processes_keep_the_policy_of_one(tmp_path: Path) -> None:
    out = str(tmp_path / "policy")
    torch.multiprocessing.spawn(learn_share, (2, str(tmp_path / "store"), out), nprocs=2)
    learn_share(0, 1, None, out)
    one, first, second = (torch.load(f"{out}.{name}", weights_only=True) for name in ("1.0", "2.0", "2.1"))
    assert one["weight"].abs().min() > 1e-3
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)
