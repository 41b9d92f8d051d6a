"""Weights that enter the grid so that rounding makes up for its own errors: less error, and the same scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgestill.compress.quantize import compensate
from edgestill.compress.quantize.compensate import compensate_student, compensated
from edgestill.compress.quantize.fake_quant import FakeQuant
from edgestill.compress.quantize.grids import Grid, grid_of
from edgestill.profiles.schema import QuantizeSpec

GRIDS: dict[str, Grid] = {
    "int4": grid_of("int4", 32),
    "int4 asymmetric": grid_of("int4", 32, False),
    "nf4": grid_of("nf4", 32),
    "fp4": grid_of("fp4", 64),
}
WINDOWS = np.random.default_rng(3).integers(1, 263, (32, 24))


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    return grid.values(weight, grid.scales(weight))


def error(weight: Tensor, other: Tensor, moment: Tensor) -> float:
    """E |x W' - x Q'|^2."""
    apart = (weight - other).double()
    return float((apart @ moment * apart).sum())


@pytest.mark.parametrize("name", GRIDS)
def test_rounding_costs_less_and_blocks_keep_their_scales(name: str) -> None:
    grid = GRIDS[name]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 128, generator=generator)
    x = torch.randn(500, 24, generator=generator) @ torch.randn(24, 128, generator=generator)  # inputs that go together
    moment = (x.T @ x).double() / len(x)
    moved = compensated(weight, moment, grid)
    assert error(weight, rounded(moved, grid), moment) < 0.4 * error(weight, rounded(weight, grid), moment)
    first = slice(0, grid.block_size)
    one, other = (grid.scales(w[:, first].contiguous()) for w in (weight, moved))
    assert torch.equal(one.scale, other.scale)
    assert one.zero_point is None or (other.zero_point is not None and torch.equal(one.zero_point, other.zero_point))
    apart = compensated(weight, torch.eye(128, dtype=torch.float64), grid)
    assert torch.equal(apart, weight)  # inputs that tell nothing of each other make up for nothing
    if name != "int4 asymmetric":  # whose ends do not lie on it
        there = rounded(weight, grid)
        assert torch.equal(rounded(compensated(there, moment, grid), grid), there)


def tiny(folder: Path, family: str, **words: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(write_model(folder, family, **words), dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["int4", "nf4"])
def test_a_student_loses_less_when_it_enters_the_grid(
    scheme: str, family: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its divergence from the float student, on other text than that which showed what reaches the layers; with the layers in one
    group, and one by one."""
    ids = torch.from_numpy(np.random.default_rng(4).integers(1, 263, (8, 24)))
    spec = QuantizeSpec(scheme=scheme, from_step=1)  # type: ignore[arg-type]

    def divergence(how: str) -> float:
        student = tiny(tmp_path / how.replace(" ", "-"), family, layers=3, tie_word_embeddings=tied)
        with torch.no_grad():
            plain = torch.log_softmax(student(ids).logits.double(), -1)
            fake = FakeQuant(spec, student)
            before = {layer.name: layer.matrix().clone() for layer in fake.layers()}
            if how != "nearest":
                compensate_student(fake, student, WINDOWS)
                moved = [
                    name
                    for name, layer in ((x.name, x) for x in fake.layers())
                    if not torch.equal(layer.matrix(), before[name])
                ]
                assert sorted(moved) == sorted(before)
            fake.at_step(1)
            found = torch.log_softmax(student(ids).logits.double(), -1)
        return float((plain.exp() * (plain - found)).sum(-1).mean())

    nearest, together = divergence("nearest"), divergence("gptq")
    monkeypatch.setattr(compensate, "MOMENT_BYTES", 1)
    apart = divergence("gptq apart")
    print(f"{scheme} {family}: nearest {nearest:.4f}, gptq {together:.4f}, layer by layer {apart:.4f} nats")
    assert max(together, apart) < 0.8 * nearest


def test_what_is_no_moment_is_refused() -> None:
    weight, grid = torch.randn(4, 32), GRIDS["int4"]
    with pytest.raises(ValueError, match=r"moment of shape \(31, 31\) for 32 inputs"):
        compensated(weight, torch.eye(31, dtype=torch.float64), grid)
    with pytest.raises(torch.linalg.LinAlgError):
        compensated(weight, -torch.eye(32, dtype=torch.float64), grid)
