"""The yardsticks of the tests on a GPU, which run where there is one, tried on models that run here."""

from __future__ import annotations

import numpy as np
import pytest
from bundles import make_bundle
from comparing import log_softmax, logits_of, mean_kl, ties

from edgestill.runtime.model import Model, load


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    folder = tmp_path_factory.mktemp("comparing")
    return load(make_bundle(folder / "one")), load(make_bundle(folder / "other", seed=1))


def test_divergence_is_zero_from_oneself_and_not_from_another(models: tuple[Model, Model]) -> None:
    one, other = models
    windows = np.random.default_rng(0).integers(1, 300, (3, 24))
    assert mean_kl(one, one, windows, "cached") == pytest.approx(0, abs=1e-6)
    log_p, log_q = (log_softmax(logits_of(model, windows, "prefill")) for model in models)
    by_hand = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    assert mean_kl(one, other, windows, "prefill") == pytest.approx(by_hand, rel=1e-5) and by_hand > 0.01


def test_a_greedy_text_is_its_own_and_another_models_is_refused(models: tuple[Model, Model]) -> None:
    one, other = models
    prompt = [5, 6, 7]
    chosen = one.generate(prompt, max_new_tokens=30, temperature=0.0).token_ids
    assert ties(one, prompt, chosen) == []
    with pytest.raises(AssertionError, match=r"another token, and no tie: Tie\(position=\d+"):
        ties(other, prompt, chosen)
