"""Parts of a recipe that exclude each other are refused when it is read, in one line with the repair."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgestill.profiles.load import load_recipe
from edgestill.runtime.errors import BadInput

RECIPE = """\
format: 1
teachers: [{name: a, model: a}, {name: b, model: b}]
student: {init: 'teacher:a', layers: 1}
data: {sources: [{path: text}]}
"""


def refusal(text: str, tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE + text, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        load_recipe(str(path))
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("losses: {output: {divergence: jsd}}", "losses.output.divergence: jsd"),
        ("losses: {output: {temperature: 2.0}}", "losses.output.temperature: 2.0"),
        ("fusion: {mix: geometric}", "fusion.mix: geometric"),
    ],
)
def test_draws_are_refused_where_they_would_be_biased(words: str, named: str, tmp_path: Path) -> None:
    said = refusal(f"train: {{tokens: 1000, cache_mode: sampling}}\n{words}\n", tmp_path)
    assert f"not for {named}; use cache_mode: top_k" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("losses: {features: {}}", "losses.features needs the teachers during training"),
        ("losses: {attention: {}}", "losses.attention needs the teachers during training"),
    ],
)
def test_alignment_needs_teachers_at_work(words: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(f"train: {{tokens: 1000, teacher_cache: always}}\n{words}\n", tmp_path)


def test_ranking_and_on_policy_need_the_target(tmp_path: Path) -> None:
    silent = "losses: {output: {weight: 0}, cross_entropy: 1"
    assert "raise losses.output.weight" in refusal(f"train: {{tokens: 1000}}\n{silent}, ranking: {{}}}}\n", tmp_path)
    said = refusal(f"train: {{tokens: 1000, on_policy: {{}}}}\n{silent}}}\n", tmp_path)
    assert "train.on_policy is scored by the fused target" in said


def test_routed_teachers_name_their_domains(tmp_path: Path) -> None:
    said = refusal("train: {tokens: 1000}\nfusion: {weights: routed}\n", tmp_path)
    assert "teacher 'a' names no domains; add domains: [...]" in said
