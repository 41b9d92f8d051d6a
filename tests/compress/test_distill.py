"""The recipe's story on tiny real teachers: runs, reuses, resumes bit for bit, online and from the cache."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from tiny import write_model, write_text

from edgestill.compress import distill
from edgestill.compress.inputs import check_inputs
from edgestill.compress.stages import Workspace
from edgestill.profiles.load import load_recipe
from edgestill.runtime.progress import QuietProgress
from edgestill.runtime.reference import load_reference

RECIPE = """\
format: 1
teachers:
  - {name: verse, model: verse}
  - {name: prose, model: prose}
fusion: {entropy_temperature: 0.1}
student:
  init: config
  config: {model_type: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2,
           intermediate_size: 64, max_position_embeddings: 128, tie_word_embeddings: true}
losses: {output: {divergence: forward_kl}, cross_entropy: 0.2FEATURES}
data:
  sources:
    - {path: verse.txt, domain: verse}
    - {path: prose.txt, domain: prose}
  validation: {fraction: 0.1}
  held_out: {fraction: 0.1}
  sequence_length: 32
train: {tokens: TOKENS, batch_size: 4, checkpoint_every_steps: 4, precision: float32, teacher_cache: CACHE, cache_top_k: TOP_K}
reference: {tokens: 512, top_k: 8}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    write_model(folder / "verse", width=48, layers=2, seed=1, vocab=263)
    write_model(folder / "prose", width=64, layers=3, seed=2, vocab=263)
    write_text(folder / "verse.txt", seed=1)
    write_text(folder / "prose.txt", seed=2)
    return folder


def recipe(place: Path, *, cache: str = "never", tokens: int = 3000, features: str = "", top_k: int = 16) -> Path:
    text = RECIPE.replace("CACHE", cache).replace("TOKENS", str(tokens)).replace("FEATURES", features)
    text = text.replace("TOP_K", str(top_k))
    path = place / f"r-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    path.write_text(text)
    return path


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def run(path: Path, out: Path) -> distill.Distilled:
    with Workspace(out, QuietProgress()).locked() as space:
        loaded = load_recipe(str(path))
        return distill.run(loaded, check_inputs(loaded), space)


def test_story_makes_a_normal_checkpoint_and_a_reference(place: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = run(recipe(place), tmp_path / "b")
    student = AutoModelForCausalLM.from_pretrained(made.student)
    assert (
        AutoTokenizer.from_pretrained(made.student).decode(
            AutoTokenizer.from_pretrained(place / "verse").encode("in the")
        )
        == "in the"
    )
    assert student.config.vocab_size == 263
    assert not [name for name in student.state_dict() if "projection" in name or "balance" in name]
    reference = load_reference(made.reference)
    assert reference.teacher_names == ("verse", "prose")
    assert set(reference.domains) == {"verse", "prose"}
    fused = reference.fused
    assert fused is not None
    mass = np.exp(fused.logp).sum(1) + np.exp(fused.tail_logp)
    np.testing.assert_allclose(mass, 1.0, atol=1e-5)
    assert made.training_log[-1]["step"] == 24
    assert set(made.training_log[-1]["weights"]["verse"]) == {"verse", "prose"}


def test_a_second_run_does_nothing_again(place: Path, tmp_path: Path) -> None:
    path = recipe(place)
    first, second = (run(path, tmp_path / "b") for _ in range(2))
    assert not any(stage.reused for stage in first.stages)
    assert all(stage.reused for stage in second.stages)
    assert first.student == second.student


def test_other_losses_train_another_student_on_the_same_corpus(place: Path, tmp_path: Path) -> None:
    first = run(recipe(place), tmp_path / "b")
    other = run(recipe(place, features=", features: {ratio: 0.5, fit_tokens: 512}"), tmp_path / "b")
    reused = {stage.name: stage.reused for stage in other.stages}
    again = {"corpus": True, "calibrate-verse": True, "calibrate-prose": True, "student": True}
    assert reused == {**again, "align": False, "train": False, "reference": False}
    assert weights(first.student) != weights(other.student)
    assert (other.student.parent / "distill_state.safetensors").is_file()
    assert all(row["features"] > 0 for row in other.training_log)


def test_a_cache_of_the_whole_vocabulary_trains_as_the_teachers_do(place: Path, tmp_path: Path) -> None:
    """Stored in float16, so the two runs drift apart by rounding only."""
    online = run(recipe(place), tmp_path / "a")
    cached = run(recipe(place, cache="always", top_k=1024), tmp_path / "b")
    assert {stage.name for stage in cached.stages} >= {"cache-verse", "cache-prose"}
    for ours, theirs in zip(cached.training_log, online.training_log, strict=True):
        assert ours["output"] == pytest.approx(theirs["output"], abs=2e-3)
        assert ours["cross_entropy"] == pytest.approx(theirs["cross_entropy"], abs=5e-3)
    assert cached.facts["training"]["teachers_from"] == "cache"
