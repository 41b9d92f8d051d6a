"""Scores and logits of given tokens equal torch's, on both paths and across chunk borders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from bundles import checkpoint, make_bundle
from transformers import AutoModelForCausalLM

from edgestill.runtime.backends import chunk_tokens
from edgestill.runtime.errors import BadInput, PromptTooLong
from edgestill.runtime.model import Model, load
from edgestill.runtime.score import label_logprobs

FAMILIES = ("llama", "gpt2", "gpt_neox")
LONG = 700


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("bundles")
    return {f: load(make_bundle(root / f, f, max_tokens=LONG)) for f in FAMILIES}


def random_ids(*shape: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, 320, shape)


def their_logits(family: str, ids: npt.NDArray[np.int64]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family, max_tokens=LONG)).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_torch_across_chunks(models: dict[str, Model], family: str) -> None:
    ids = random_ids(1, LONG)
    assert chunk_tokens(320) < LONG
    theirs = torch.log_softmax(their_logits(family, ids)[0, :-1].double(), -1)
    expected = theirs.gather(-1, torch.from_numpy(ids[0, 1:, None]))[:, 0].numpy()
    ours = models[family].score(ids[0].tolist())
    assert ours.dtype == np.float32
    assert ours.shape == (LONG - 1,)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_paths_give_the_logits_of_torch(models: dict[str, Model], family: str) -> None:
    ids = random_ids(3, 40)
    expected = their_logits(family, ids).numpy()
    seen = {}
    for path, steps in (("prefill", 1), ("cached", 40)):
        items = [(start, logits.copy()) for start, logits in models[family].forward_windows(ids, path=path)]  # type: ignore[arg-type]
        assert [start for start, _ in items] == list(range(0, 40, 40 // steps))
        seen[path] = np.concatenate([logits for _, logits in items], axis=1)
        np.testing.assert_allclose(seen[path], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(seen["cached"], seen["prefill"], rtol=0, atol=1e-4)


def test_label_logprobs_by_hand_and_without_overflow() -> None:
    logits = np.log(np.array([[1, 2, 5], [6, 1, 1]], np.float32)) + np.array([[1000], [-1000]], np.float32)
    ours = label_logprobs(logits, np.array([2, 0]))
    np.testing.assert_allclose(np.exp(ours), [5 / 8, 6 / 8], rtol=1e-4)


def test_one_token_has_no_score_and_what_cannot_be_scored_is_refused(models: dict[str, Model]) -> None:
    model = models["llama"]
    assert model.score([5]).shape == (0,)
    assert model.score(np.array([5, 6], np.int32)).shape == (1,)
    with pytest.raises(PromptTooLong, match=str(LONG)):
        model.score(random_ids(LONG + 1))
    for wrong, why in (([], "at least one"), ([1, 320], "holds 320; the vocabulary"), ([-1], "-1"), ([1.5], "whole")):
        with pytest.raises(BadInput, match=why):
            model.score(wrong)  # type: ignore[arg-type]


def test_windows_are_checked_when_asked_for_not_when_read(models: dict[str, Model]) -> None:
    model = models["llama"]
    with pytest.raises(BadInput, match="give 'prefill' or 'cached'"):
        model.forward_windows(random_ids(1, 4), path="other")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"give \[windows, tokens\]"):
        model.forward_windows(random_ids(4), path="cached")
    with pytest.raises(PromptTooLong):
        model.forward_windows(random_ids(1, LONG + 1), path="cached")


def test_the_bundle_is_enough_without_its_checkpoint(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b")
    ids = random_ids(20)
    assert np.array_equal(load(folder).score(ids), load(folder, threads=1, verify=False).score(ids))
