"""Making students: ways that read no text give what they always gave, cuts combine, and what cannot be is said before work."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cutting import facts_of, logits_of, some_calibration, some_text, write_teacher
from transformers import AutoModelForCausalLM

from edgestill.compress.low_rank import LowRankLinear, load_student
from edgestill.compress.student import count_parameters, make_student, student_config
from edgestill.export.model_facts import size_of_config
from edgestill.profiles.schema import StudentSpec
from edgestill.runtime.errors import BadInput

VOCAB = 263
CUTS: dict[str, Any] = {
    "init": "teacher:big",
    "layers": 2,
    "choose": "block_influence",
    "narrow": {"hidden_size": 24, "intermediate_size": 40, "key_value_heads": 1},
    "low_rank": {"rank_fraction": 0.4, "steps": 4},
    "calibration_tokens": 100,
}


def make(folder: Path, words: dict[str, Any], seed: int = 0) -> Any:
    return make_student(StudentSpec.model_validate(words), [facts_of(folder)], VOCAB, seed, text=some_text())


# ways that read no text


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("words", "kept"), [({"layers": 2}, (0, 3)), ({"keep_layers": [1, 2]}, (1, 2))])
def test_kept_layers_are_the_teachers(
    tmp_path: Path, family: str, words: dict[str, Any], kept: tuple[int, ...]
) -> None:
    folder = write_teacher(tmp_path, family, layers=4, vocab_size=VOCAB + 9)
    spec, state = StudentSpec(init="teacher:big", **words), torch.get_rng_state()
    made = make_student(spec, [facts_of(folder)], VOCAB, 0)  # no text is needed
    assert torch.equal(torch.get_rng_state(), state)
    assert (made.origin, made.notes) == (kept, {"layers": list(kept)})
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    blocks = "transformer.h." if family == "gpt2" else "model.layers."
    for name, value in made.model.state_dict().items():
        source = name
        if name.startswith(blocks):
            layer, _, rest = name.removeprefix(blocks).partition(".")
            source = f"{blocks}{kept[int(layer)]}.{rest}"
        assert torch.equal(value, teacher[source][:VOCAB] if value.shape[0] == VOCAB else teacher[source])
    assert not made.model.training
    assert made.model.config.vocab_size == VOCAB


def test_a_student_from_scratch_has_no_origin(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path)
    words = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    spec = StudentSpec(init="config", config={**words, "intermediate_size": 24})
    first, same, other = (make_student(spec, [facts_of(folder)], VOCAB, seed) for seed in (0, 0, 1))
    assert (first.origin, first.notes) == (None, {})
    weights = [made.model.model.embed_tokens.weight for made in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# ways that do


def test_depth_width_and_rank_together(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path / "big", "qwen3", layers=3)
    state = torch.get_rng_state()
    made = make(folder, CUTS)
    assert torch.equal(torch.get_rng_state(), state)
    model, notes = made.model, made.notes
    assert made.origin == tuple(notes["layers"])
    assert len(notes["block_influence"]) == 3
    assert notes["narrow"]["hidden_size"] == 24
    ranks = notes["low_rank"]["rank"]
    assert {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)} == ranks
    assert len(ranks) == 14
    assert json.loads(json.dumps(notes)) == notes
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())

    planned = student_config(StudentSpec.model_validate(CUTS), [facts_of(folder)], VOCAB)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
        assert getattr(planned, name) == getattr(model.config, name)
    assert planned.edgestill_low_rank == model.config.edgestill_low_rank == {"rank": ranks}
    assert size_of_config(planned).parameters == count_parameters(model)

    model.save_pretrained(tmp_path / "student")
    again = load_student(tmp_path / "student", torch.float32)
    calibration = some_calibration()
    assert torch.equal(logits_of(again, calibration), logits_of(model, calibration))
    again.train()
    again(calibration.token_ids, labels=calibration.token_ids).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in again.parameters())


def test_the_same_words_and_seed_make_the_same_student(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path)
    one, two = make(folder, CUTS, seed=3), make(folder, CUTS, seed=3)
    assert one.notes == two.notes
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name])


def test_iterative_choice_is_told(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path, layers=4)
    made = make(folder, {"init": "teacher:big", "layers": 2, "choose": "iterative"})
    removed = [entry["layer"] for entry in made.notes["removed"]]
    assert sorted([*removed, *made.origin]) == [0, 1, 2, 3]
    assert made.model.config.num_hidden_layers == len(made.model.model.layers) == 2
    assert all(entry["cross_entropy"] > 0 for entry in made.notes["removed"])
    assert made.model.config.use_cache


@pytest.mark.parametrize(
    "words", [{"layers": 1, "choose": "iterative"}, {"narrow": {"hidden_size": 8}}, {"low_rank": {}}]
)
def test_measuring_needs_text(tmp_path: Path, words: dict[str, Any]) -> None:
    spec = StudentSpec.model_validate({"init": "teacher:big", **words})
    with pytest.raises(ValueError, match="importance is measured on the training part; pass `text`"):
        make_student(spec, [facts_of(write_teacher(tmp_path))], VOCAB, 0)


# refusals


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "too many neurons": (
        "llama",
        {"narrow": {"intermediate_size": 64}},
        "student.narrow.intermediate_size: 64 is more than the 48 of teacher 'big'; keep at most 48",
    ),
    "too many groups": (
        "llama",
        {"narrow": {"key_value_heads": 4}},
        "student.narrow.key_value_heads: 4 is more than the 2 of teacher 'big'; keep at most 2",
    ),
    "too many channels": (
        "llama",
        {"narrow": {"hidden_size": 33}},
        "student.narrow.hidden_size: 33 is more than the 32 of teacher 'big'; keep at most 32",
    ),
    "a family that is not sliced": (
        "gpt_neox",
        {"narrow": {"hidden_size": 16}},
        "student.narrow: teacher 'big' is a gpt_neox, which cannot be narrowed; the families that can are gemma, gemma3_text, "
        "llama, mistral, qwen2, qwen3",
    ),
    "convolutions": (
        "gpt2",
        {"low_rank": {}},
        "student.low_rank: teacher 'big' (GPT2LMHeadModel) keeps its layers as Conv1D, which are not factored; start from a "
        "family of linear layers like llama or qwen2, or remove low_rank",
    ),
    "nothing smaller": (
        "llama",
        {"low_rank": {"rank_fraction": 0.95}},
        "student.low_rank.rank_fraction: at 0.95 no layer of teacher 'big' (LlamaForCausalLM) becomes smaller; give less than "
        "0.5, where every layer does",
    ),
    "more layers than there are": (
        "llama",
        {"layers": 9, "choose": "iterative"},
        "student.layers: 9 is more than the teacher's 3; keep at most 3",
    ),
    "a choice without a number": (
        "llama",
        {"keep_layers": [0], "choose": "iterative"},
        "student.choose: iterative chooses among a teacher's layers; give `layers`, or remove choose",
    ),
}
"""Name -> family, words, line."""


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_is_refused_before_any_work(case: str, tmp_path: Path) -> None:
    family, words, line = REFUSALS[case]
    facts = facts_of(write_teacher(tmp_path, family))
    (tmp_path / "model.safetensors").unlink()  # no weight is read
    with pytest.raises(BadInput) as refused:
        student_config(StudentSpec.model_validate({"init": "teacher:big", **words}), [facts], VOCAB)
    assert str(refused.value) == line


def test_low_rank_students_are_not_cut_again(tmp_path: Path) -> None:
    folder = write_teacher(tmp_path / "big")
    words = copy.deepcopy(CUTS)
    make(folder, words).model.save_pretrained(folder)
    with pytest.raises(
        BadInput, match="teacher 'big' has low-rank layers, which are not cut again; start from a plain"
    ):
        student_config(StudentSpec(init="teacher:big", layers=1), [facts_of(folder)], VOCAB)
