"""Training on a grid: what a layer multiplies, its gradient, when it starts, and that the kept bytes are the trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import write_recipe
from tiny import write_model
from torch import Tensor, nn
from training import furthest, learn, prepared
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgestill.compress.inputs import check_inputs
from edgestill.compress.quantize.activations import quantized_inputs
from edgestill.compress.quantize.fake_quant import FakeQuant
from edgestill.compress.quantize.grids import grid_of
from edgestill.compress.quantize.shipped import FILE, ShippedWeights, load_shipped_student
from edgestill.profiles.load import load_recipe
from edgestill.profiles.schema import QuantizeSpec
from edgestill.runtime.errors import BadInput

SCHEMES = ["int4", "int8", "nf4", "fp4"]
IDS = torch.randint(0, 263, (2, 16), generator=torch.Generator().manual_seed(0))


def tiny(folder: Path, family: str = "llama", **words: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(write_model(folder, family, **words), dtype=torch.float32)


def on_grid(weight: Tensor, spec: QuantizeSpec) -> Tensor:
    grid = grid_of(spec.scheme, spec.block_size, spec.symmetric)
    return grid.values(weight, grid.scales(weight))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_is_that_of_the_rounded_model_and_gradients_pass_straight(
    scheme: str, family: str, tmp_path: Path
) -> None:
    spec = QuantizeSpec(scheme=scheme)  # type: ignore[arg-type]
    ours, theirs = tiny(tmp_path / "a", family), tiny(tmp_path / "b", family)
    names = {id(p): n for n, p in ours.named_parameters()}
    fake = FakeQuant(spec, ours)
    assert {id(p): n for n, p in ours.named_parameters()} == names
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name in fake.names:
                flipped = family == "gpt2" and "wte" not in name
                matrix = parameter.T.contiguous() if flipped else parameter
                parameter.copy_(on_grid(matrix, spec).T if flipped else on_grid(matrix, spec))
    assert len(fake.names) == {"llama": 15, "gpt2": 9, "gpt_neox": 10}[family]
    for model in (ours, theirs):
        model.eval()(input_ids=IDS, labels=IDS).loss.backward()
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad), name


def test_weights_are_rounded_once_per_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny(tmp_path)
    fake = FakeQuant(QuantizeSpec(scheme="int4"), student)
    calls: list[int] = []
    values = fake.grid.values
    monkeypatch.setattr(fake.grid, "values", lambda *a: calls.append(1) or values(*a))
    for _ in range(3):
        student(IDS)
    assert len(calls) == len(fake.names)  # the tied table and head are one
    fake.at_step(1)
    student(IDS)
    assert len(calls) == 2 * len(fake.names)
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj._parameters["weight"].mul_(2)
    student(IDS)
    assert len(calls) == 2 * len(fake.names) + 1  # changed behind the schedule's back, and seen


def test_start_ramp_and_freeze(tmp_path: Path) -> None:
    student = tiny(tmp_path)
    layer = student.model.layers[0].mlp.up_proj
    spec = QuantizeSpec(scheme="int4", from_step=2, ramp_steps=4, freeze_scales_at_step=8)
    fake = FakeQuant(spec, student)
    master = layer._parameters["weight"]
    rounded = on_grid(master.detach(), spec)
    for step, share in {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.25, 5: 0.75, 6: 1.0, 7: 1.0}.items():
        fake.at_step(step)
        torch.testing.assert_close(layer.weight, torch.lerp(master, rounded, share), atol=1e-7, rtol=0)
    with torch.no_grad():
        master *= 4  # exact
    fake.at_step(8)
    kept = fake.grid.values(master.detach(), fake.grid.scales(master.detach() / 4))
    assert torch.equal(layer.weight, kept)
    assert not torch.equal(kept, on_grid(master.detach(), spec))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_frozen_scales_of_transposed_weights(scheme: str, tmp_path: Path) -> None:
    """GPT-2 keeps its layers as [K, N]."""
    student = tiny(tmp_path, "gpt2")
    fake = FakeQuant(QuantizeSpec(scheme=scheme, freeze_scales_at_step=1), student)  # type: ignore[arg-type]
    layer = student.transformer.h[0].mlp.c_fc
    before = layer.weight.detach().clone()
    fake.at_step(1)
    assert torch.equal(layer.weight, before)
    assert before.shape == (64, 96)


def test_embedding_and_head_by_choice(tmp_path: Path) -> None:
    tied = tiny(tmp_path / "tied")
    with pytest.raises(BadInput, match="embedding and head are one matrix"):
        FakeQuant(QuantizeSpec(scheme="int4", head=False), tied)
    assert (
        "model.embed_tokens.weight"
        not in FakeQuant(QuantizeSpec(scheme="int4", head=False, embeddings=False), tied).names
    )
    apart = tiny(tmp_path / "apart", tie_word_embeddings=False)
    names = FakeQuant(QuantizeSpec(scheme="int4", embeddings=False), apart).names
    assert "lm_head.weight" in names and "model.embed_tokens.weight" not in names


def test_a_width_that_bitsandbytes_gets_wrong_is_refused(tmp_path: Path) -> None:
    student = tiny(tmp_path, width=48)
    with pytest.raises(BadInput, match=r"q_proj.* 48 inputs are no multiple of the block of 32"):
        FakeQuant(QuantizeSpec(scheme="nf4", embeddings=False, head=False), student)


def test_it_is_refused_before_any_work(tmp_path: Path) -> None:
    words = {"config": {"hidden_size": 64, "intermediate_size": 80}}
    recipe = write_recipe(tmp_path, student=words, quantize={"scheme": "fp4", "freeze_scales_at_step": 3})
    with pytest.raises(
        BadInput, match=r"quantize.scheme fp4: layer .*down_proj: 80 inputs are no multiple of the block of 32"
    ):
        check_inputs(load_recipe(str(recipe)))
    for changes, why in (
        ({"scheme": "int8", "symmetric": False}, "quantize.symmetric: false is for int4, int8 has no zero point"),
        ({"scheme": "nf4", "block_size": 16}, "quantize.block_size 16: bitsandbytes has blocks of 32 and more"),
        ({"scheme": "nf4", "activations": True}, "quantize.activations is for int4"),
        ({"scheme": "int4", "from_step": 2, "freeze_scales_at_step": 2}, "is not after the weights reached the grid"),
        ({"scheme": "int4", "from_step": 16}, "weights reach the grid at step 16 and training ends at step 16"),
    ):
        with pytest.raises(BadInput, match=why):
            load_recipe(str(write_recipe(tmp_path, "other", quantize=changes)))


def test_inputs_are_what_the_int8_product_reads() -> None:
    x = torch.randn(3, 5, 80, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = quantized_inputs(x, 32)
    for start, stop in ((0, 32), (32, 64), (64, 80)):
        part = x.detach()[..., start:stop]
        scale = part.abs().amax(-1, keepdim=True) / 127
        torch.testing.assert_close(y[..., start:stop], torch.round(part / scale) * scale, atol=0, rtol=0)
    y.backward(torch.ones_like(y) * 2)
    assert x.grad is not None and (x.grad == 2).all()
    assert not quantized_inputs(torch.zeros(2, 32), 32).any()


# whole trainings


def trained(folder: Path, name: str, *, tokens: int = 6 * 4 * 32, **quantize: Any) -> tuple[nn.Module, Any]:
    words = {"tokens": tokens, "checkpoint_every_steps": 2}
    case = prepared(write_recipe(folder, name, train=words, quantize=quantize))
    return learn(case, folder / name), case


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kept_bytes_are_what_the_trained_student_multiplies(scheme: str, tmp_path: Path) -> None:
    module, case = trained(tmp_path, "run", scheme=scheme)
    assert module.quantization is not None
    state = {n: p.detach() for n, p in module.student.named_parameters()}
    shipped = ShippedWeights.of(case.at.recipe.quantize, module.quantization.encoded(state))
    for name, arrays in shipped.arrays.items():
        read = module.student.get_submodule(name.rpartition(".")[0]).weight
        assert not isinstance(read, nn.Parameter)
        assert torch.equal(shipped.grid.decode(dict(arrays), tuple(read.shape)), read), name


def test_a_resumed_run_with_frozen_scales_is_the_same_run(tmp_path: Path) -> None:
    words = {"scheme": "int4", "symmetric": False, "from_step": 1, "ramp_steps": 1, "freeze_scales_at_step": 3}
    whole, case = trained(tmp_path, "whole", **words)
    learn(case, tmp_path / "cut", tokens=4 * 4 * 32)  # another schedule of the rate, only its checkpoints are of use
    run = tmp_path / "again"
    learn(case, run)
    for folder in run.glob("checkpoint-6"):
        (folder / "optimizer.pt").unlink()  # killed while it was written: step 4 is resumed, after the freeze
    resumed = learn(case, run)
    assert furthest(whole.state_dict(), resumed.state_dict()) == 0
    assert any(name.startswith("quantization.scale_") for name in whole.state_dict())


def test_bytes_survive_the_disk_and_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    student = tiny(folder)
    spec = QuantizeSpec(scheme="nf4", block_size=32)
    fake = FakeQuant(spec, student)
    ShippedWeights.of(spec, fake.encoded({n: p.detach() for n, p in student.named_parameters()})).save(folder)
    loaded = load_shipped_student(folder)
    assert torch.equal(loaded(IDS).logits, student(IDS).logits)
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:100])
    with pytest.raises(BadInput, match="damaged"):
        load_shipped_student(folder)
    (folder / FILE).unlink()
    assert ShippedWeights.load(folder) is None
    with pytest.raises(BadInput, match="was trained in float"):
        load_shipped_student(folder)
