"""What cards can do: the published tables, and refusals that name value, limit and repair."""

from __future__ import annotations

import itertools

import pytest

from edgestill.profiles.load import load_profile, packaged
from edgestill.runtime.engines.capabilities import EXAMPLES, PRECISIONS, engine_problem


def test_both_flavours_know_the_cards_that_the_documentation_names() -> None:
    assert set(PRECISIONS["tensorrt"]) >= {"7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.1", "11.0", "12.0"}
    assert set(PRECISIONS["tensorrt-rtx"]) == {"7.5", "8.0", "8.6", "8.9", "12.0", "12.1"}
    assert {card for cards in PRECISIONS.values() for card in cards} == set(EXAMPLES)


@pytest.mark.parametrize("flavour", PRECISIONS)
def test_newer_cards_lose_nothing(flavour: str) -> None:
    cards = sorted(PRECISIONS[flavour], key=lambda card: tuple(map(int, card.split("."))))
    for older, newer in itertools.pairwise(cards[1:]):  # Turing apart: its int8 is TensorRT's own
        assert set(PRECISIONS[flavour][older]) <= set(PRECISIONS[flavour][newer])


@pytest.mark.parametrize(
    ("flavour", "card", "weights", "field", "line"),
    [
        ("tensorrt-rtx", "9.0", "int4", "device.compute_capability", "use engine tensorrt"),
        ("tensorrt-rtx", "8.7", "int4", "device.compute_capability", "use engine tensorrt"),
        ("tensorrt-rtx", "5.2", "int4", "device.compute_capability", "it knows 7.5, 8.0"),
        ("tensorrt-rtx", "8.6", "fp8", "precision.weights", "use int4, int8, bfloat16, float16, float32"),
        ("tensorrt-rtx", "7.5", "int4", "precision.weights", "use float16, float32"),
        ("tensorrt", "8.7", "fp8", "precision.weights", "use int4, int8, bfloat16, float16, float32"),
        ("tensorrt", "9.0", "nf4", "precision.weights", "use int4 or int8"),
    ],
)
def test_what_a_card_lacks(flavour: str, card: str, weights: str, field: str, line: str) -> None:
    problem = engine_problem(flavour, card, weights, "NVIDIA X")
    assert problem is not None and problem.field == field
    assert problem.line.endswith(line) or f"; {line}" in problem.line


@pytest.mark.parametrize("name", [n for n in packaged("profiles") if not n.startswith("cpu")])
def test_packaged_cards_can_do_what_their_profiles_ask(name: str) -> None:
    profile = load_profile(name).profile
    device = profile.device
    assert engine_problem(device.engine, str(device.compute_capability), profile.precision.weights) is None
