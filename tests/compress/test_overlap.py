"""Overlap against brute force, its refusal, and what a common prompt does not trigger."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.compress import overlap
from edgestill.compress.overlap import RUN, check_disjoint, occurring
from edgestill.compress.packing import Part
from edgestill.runtime.errors import BadInput

T = 64


def part(token_ids: npt.NDArray[Any], mask: npt.NDArray[np.uint8] | None = None) -> Part:
    n = len(token_ids)
    return Part(token_ids, mask, np.zeros(n, np.int16), np.arange(n, dtype=np.int32), np.zeros(n, np.int16))


def random_part(seed: int, n: int = 40, vocabulary: int = 300) -> Part:
    return part(np.random.default_rng(seed).integers(0, vocabulary, (n, T)).astype(np.uint16))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 90), st.integers(0, 90))
def test_brute_force(seed: int, length: int, planted_at: int) -> None:
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 2, length).astype(np.uint16)  # two letters: near misses abound
    chunks = rng.integers(0, 2, (5, RUN)).astype(np.uint16)
    if planted_at + RUN <= length:
        chunks[2] = text[planted_at : planted_at + RUN]
    theirs = [any(np.array_equal(c, text[i : i + RUN]) for i in range(length - RUN + 1)) for c in chunks]
    assert occurring(chunks, [text]).tolist() == theirs


def test_runs_across_blocks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "BLOCK", 100)
    text = np.random.default_rng(0).integers(0, 50, 1000).astype(np.uint32)
    for at in (0, 68, 69, 99, 100, 101, 968):
        assert occurring(text[None, at : at + RUN], [text]).all()
    assert not occurring(text[None, ::-1][:, :RUN].copy(), [text]).any()


def test_parts_that_share_nothing_pass() -> None:
    found = check_disjoint(random_part(0), random_part(1), random_part(2), str)
    assert (found.validation, found.held_out) == (0.0, 0.0)


def test_a_small_share_is_reported_and_a_large_one_refused() -> None:
    training, validation, held_out = random_part(0, 100), random_part(1, 100), random_part(2, 100)
    copied = training.token_ids.reshape(-1)[7 : 7 + RUN]  # at no multiple of anything
    held_out.token_ids[3, :RUN] = copied
    found = check_disjoint(training, validation, held_out, str)
    assert (found.validation, found.held_out) == (0.0, 1 / 200)
    validation.token_ids[4:6, RUN:] = held_out.token_ids[1:3, :RUN]
    with pytest.raises(BadInput, match=r"1\.5 % of the held-out text occurs in the training or validation.*limit 1 %"):
        check_disjoint(training, validation, held_out, str)
    validation.token_ids[:10] = training.token_ids[:10]
    quoted = str(training.token_ids[0, :5].tolist())[:-1]
    with pytest.raises(BadInput, match=r"10\.0 % of the validation text") as caught:
        check_disjoint(training, validation, held_out, str)
    assert quoted in str(caught.value)


def test_a_common_prompt_is_no_overlap() -> None:
    prompt = np.random.default_rng(9).integers(0, 300, RUN).astype(np.uint16)
    mask = np.ones((40, T), np.uint8)
    mask[:, :RUN] = 0
    parts = []
    for seed in range(3):
        tokens = random_part(seed).token_ids
        tokens[:, :RUN] = prompt
        parts.append(part(tokens, mask))
    assert check_disjoint(*parts, str).held_out == 0.0
    with pytest.raises(BadInput, match=r"50\.0 %"):
        check_disjoint(*(part(p.token_ids) for p in parts), str)
