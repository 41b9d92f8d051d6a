"""What the losses remember: TAID's schedule against the paper's recursion, the balance by hand, and state that resumes."""

from __future__ import annotations

import math

import pytest
import torch

from edgestill.compress.step_state import Balance, Taid
from edgestill.profiles.schema import TaidSpec


def test_taid_follows_the_recursion_of_the_paper() -> None:
    spec = TaidSpec(start=0.2, end=0.9, rate=0.5, momentum=0.6)
    taid = Taid(spec)
    losses, steps = [2.0, 1.0, 1.5, 0.2, 0.19, 0.18, 0.17, 0.16, 0.15, 0.14, 0.13, 0.12], 50
    t, momentum, previous = spec.start, 0.0, None
    for step, loss in enumerate(losses, start=1):
        taid.observe(torch.full((3,), loss - 0.5))  # two micro-batches of unequal size, mean `loss`
        taid.observe(torch.full((1,), loss + 1.5))
        taid.finish(step, steps)
        if previous is not None:
            momentum = 0.6 * momentum + 0.4 * (previous - loss) / previous
            t += spec.rate / (1 + math.exp(-momentum)) * (1 - t)
        t = min(spec.end, max(t, spec.start + (spec.end - spec.start) * step / steps))
        previous = loss
        assert float(taid.t) == pytest.approx(t, abs=1e-5)
    assert float(taid.t) == pytest.approx(0.9)  # it has reached the end and stays


def test_taid_is_at_least_linear_and_ends_at_the_end() -> None:
    taid = Taid(TaidSpec(rate=1e-9))
    for step in range(1, 11):
        taid.observe(torch.tensor([1.0]))
        taid.finish(step, 10)
    assert float(taid.t) == pytest.approx(1.0)


def test_taid_stands_still_without_rows() -> None:
    taid = Taid(TaidSpec(start=0.4, rate=0.9))
    taid.observe(torch.tensor([1.0]))
    taid.finish(0, 10)
    taid.observe(torch.zeros(0))
    taid.finish(0, 10)
    assert float(taid.t) == pytest.approx(0.4)


def test_balance_by_hand() -> None:
    """After one step with means 6 and 2, the factor is ratio x 3, whatever the decay; in the first step it is 0."""
    balance = Balance(0.5)
    assert float(balance(torch.tensor(9.0), torch.tensor(1.0), 1)) == 0.0
    balance(torch.tensor(5.0), torch.tensor(7 / 3), 3)
    balance.finish()
    assert float(balance(torch.tensor(1.0), torch.tensor(1.0), 1)) == pytest.approx(0.5 * 3, rel=1e-5)


def test_balance_does_not_learn_in_evaluation() -> None:
    balance = Balance(0.5).eval()
    balance(torch.tensor(5.0), torch.tensor(1.0), 4)
    balance.finish()
    assert float(balance.main) == 0.0


@pytest.mark.parametrize("kind", ["taid", "balance"])
def test_state_resumes_bit_identically(kind: str) -> None:
    def make() -> Taid | Balance:
        return Taid(TaidSpec(rate=0.1)) if kind == "taid" else Balance(0.3)

    def step(module: Taid | Balance, i: int) -> None:
        value = torch.tensor([1.0 / (i + 1)])
        if isinstance(module, Taid):
            module.observe(value)
            module.finish(i, 20)
        else:
            module(value[0], value[0] / 3, 2)
            module.finish()

    whole, killed = make(), make()
    for i in range(8):
        step(whole, i)
    for i in range(3):
        step(killed, i)
    resumed = make()
    resumed.load_state_dict(killed.state_dict())
    for i in range(3, 8):
        step(resumed, i)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
