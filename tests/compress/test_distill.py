"""The recipe's story on tiny real teachers: runs, reuses, resumes bit for bit, online and from the cache."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import write_model, write_text

from edgestill.compress import distill
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
train: {tokens: TOKENS, batch_size: 4, checkpoint_every_steps: 4, precision: float32, teacher_cache: CACHE, cache_top_k: 16}
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


def recipe(place: Path, *, cache: str = "never", tokens: int = 3000, features: str = "") -> Path:
    text = RECIPE.replace("CACHE", cache).replace("TOKENS", str(tokens)).replace("FEATURES", features)
    path = place / f"r-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    path.write_text(text)
    return path


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def run(path: Path, out: Path) -> distill.Distilled:
    with Workspace(out, QuietProgress()).locked() as space:
        return distill.run(load_recipe(str(path)), space, QuietProgress())


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
    assert made.training_log[-1]["step"] == 20
    assert set(made.training_log[-1]["weights"]["verse"]) == {"verse", "prose"}


def test_a_second_run_does_nothing_again(place: Path, tmp_path: Path) -> None:
    path = recipe(place)
    first, second = (run(path, tmp_path / "b") for _ in range(2))
    assert not any(stage.reused for stage in first.stages)
    assert all(stage.reused for stage in second.stages)
    assert first.student == second.student


def test_other_losses_train_another_student_on_the_same_corpus(place: Path, tmp_path: Path) -> None:
    first = run(recipe(place), tmp_path / "b")
    other = run(recipe(place, features=", features: {ratio: 0.5}"), tmp_path / "b")
    reused = {stage.name: stage.reused for stage in other.stages}
    assert reused == {"corpus": True, "calibrate": True, "train": False, "reference": False}
    assert weights(first.student) != weights(other.student)
    assert (other.student.parent / "distill_state.safetensors").is_file()
    assert all(row["features"] > 0 for row in other.training_log)


def test_training_from_the_cache_follows_training_with_teachers(place: Path, tmp_path: Path) -> None:
    """With 16 of 263 buckets the loss is a lower bound of the dense one, and the student learns nearly as much."""
    online = run(recipe(place, tokens=6000), tmp_path / "a")
    cached = run(recipe(place, tokens=6000, cache="always"), tmp_path / "b")
    assert {stage.name for stage in cached.stages} >= {"cache-verse", "cache-prose"}
    ours, theirs = cached.training_log[-1], online.training_log[-1]
    assert ours["output"] <= theirs["output"] + 0.02
    assert abs(ours["cross_entropy"] - theirs["cross_entropy"]) < 0.1
    assert cached.facts["training"]["teachers_from"] == "cache"


COMMAND = (
    "import sys; from pathlib import Path\n"
    "from edgestill.compress.distill import distill\n"
    "from edgestill.runtime.progress import QuietProgress\n"
    "import torch; torch.set_num_threads(1)\n"
    "distill(sys.argv[1], Path(sys.argv[2]), QuietProgress())\n"
)


def start(path: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", COMMAND, str(path), str(out)], stderr=subprocess.PIPE)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cache", ["never", "always"])
def test_killed_at_random_moments_it_ends_with_the_same_weights(place: Path, tmp_path: Path, cache: str) -> None:
    """kill -9 once some work is under way, five times per kind of run, then let it finish."""
    features = ", features: {ratio: 0.3}" if cache == "never" else ""
    path = recipe(place, cache=cache, tokens=8000, features=features)
    whole = start(path, tmp_path / "whole")
    assert whole.wait() == 0, whole.communicate()[1].decode()
    rng, kills, resumed = random.Random(7), 0, 0
    for _ in range(40):
        process = start(path, tmp_path / "killed")
        before = set((tmp_path / "killed").rglob("*"))
        deadline = time.monotonic() + 120
        # wait for something new on disk, then a random moment: the kill lands in corpus, cache, training or saving
        while process.poll() is None and time.monotonic() < deadline:
            if set((tmp_path / "killed").rglob("*")) - before:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 1.5))
        if process.poll() is not None:
            break
        resumed += bool(list((tmp_path / "killed").glob("work/train-*.partial/run/checkpoint-*")))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        if kills == 5:
            break
    last = start(path, tmp_path / "killed")
    assert last.wait() == 0, last.communicate()[1].decode()
    assert kills == 5
    assert weights(tmp_path / "killed" / "student") == weights(tmp_path / "whole" / "student")
    assert not list((tmp_path / "killed" / "work").glob("*.partial"))
