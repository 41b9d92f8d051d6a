"""Teachers of five families: head x hidden = logits, features, precisions, and every reason to refuse one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZES, write_model, write_tokenizer

from edgestill.compress.teachers import (
    Teacher,
    TeacherFacts,
    check_same_tokenizer,
    decoder_blocks,
    fit_together,
    hidden_states,
    load_teacher,
    native_bfloat16,
    resolve_teachers,
)
from edgestill.compress.tokenizer_check import PROBES, probe_strings
from edgestill.profiles.schema import TeacherSpec
from edgestill.runtime.errors import BadInput

CPU = torch.device("cpu")
REAL = 263
"""Tokens of the tiny tokenizer; heads are 320 wide."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("teachers")

    def make(family: str) -> Path:
        path = root / family
        return path if path.is_dir() else write_model(path, family)

    return make


def facts_of(path: Path, name: str = "t", **words: Any) -> TeacherFacts:
    spec = TeacherSpec.model_validate({"name": name, "model": str(path), "precision": "float32", **words})
    return resolve_teachers([spec], Path, device=CPU)[0]


def some_ids() -> torch.Tensor:
    return torch.randint(0, REAL, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", SIZES)
def test_head_times_hidden_is_logits(folder: Callable[[str], Path], family: str) -> None:
    from transformers import AutoModelForCausalLM

    facts = facts_of(folder(family))
    teacher = load_teacher(facts, CPU)
    theirs = AutoModelForCausalLM.from_pretrained(folder(family), dtype=torch.float32).eval()
    ids = some_ids()
    with torch.no_grad():
        out = theirs(input_ids=ids, output_hidden_states=True)
    hidden, taken = teacher.hidden(ids, [1, 0])
    ours = teacher.logits(hidden.flatten(0, 1)).unflatten(0, ids.shape)
    assert ours.shape == (2, 17, REAL)
    torch.testing.assert_close(ours, out.logits[..., :REAL], atol=1e-5, rtol=1e-5)
    assert sorted(taken) == [0, 1]
    torch.testing.assert_close(taken[0], out.hidden_states[1], atol=0, rtol=0)  # [2] is after the final norm
    assert taken[1].shape == hidden.shape
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert len(decoder_blocks(teacher.model)) == facts.n_layers == 2
    assert (facts.vocab_size, facts.head_width, facts.hidden_size) == (REAL, 320, 64)
    assert (facts.model_type, facts.max_tokens) == (family, 128)
    assert facts.parameters == sum(p.numel() for p in theirs.parameters())
    assert facts.memory_bytes == 4 * facts.parameters


def test_hidden_states_of_a_student_carry_gradients(folder: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder("llama"))
    last, taken = hidden_states(model, some_ids(), [0])
    (last.sum() + taken[0].sum()).backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("precision", "correlation"), [("bfloat16", 0.999), ("8bit", 0.99), ("4bit", 0.9)])
def test_precisions(tmp_path: Path, family: str, precision: str, correlation: float) -> None:
    wide = {"n_inner": 128} if family == "gpt2" else {"intermediate_size": 128}
    path = write_model(tmp_path / "m", family, **wide)
    full = load_teacher(facts_of(path), CPU)
    facts = facts_of(path, precision=precision)
    teacher = load_teacher(facts, CPU)
    logits = [t.logits(t.hidden(some_ids())[0].flatten(0, 1)).flatten() for t in (full, teacher)]
    assert torch.corrcoef(torch.stack(logits))[0, 1] > correlation
    assert logits[1].dtype == torch.float32
    resident = teacher.model.get_memory_footprint(return_buffers=False)
    if precision == "4bit":  # its scales are no parameters of the module
        resident += sum(
            m.weight.quant_state.absmax.nbytes for m in teacher.model.modules() if "Linear4bit" in str(type(m))
        )
    assert facts.memory_bytes == pytest.approx(resident, rel=0.08)  # 8bit: row scales, buffers
    assert facts.memory_bytes < facts_of(path).memory_bytes


def test_shapes_that_4bit_kernels_get_wrong_are_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput, match=r"layers.0.mlp.down_proj has 96 inputs, not a multiple of 64"):
        facts_of(folder("llama"), precision="4bit")
    with pytest.raises(BadInput, match=r"h.0.mlp.c_proj has 96 inputs"):
        facts_of(folder("gpt2"), precision="4bit")


def test_auto_precision_follows_the_processor(folder: Callable[[str], Path]) -> None:
    expected = "bfloat16" if native_bfloat16(CPU) else "float32"
    assert facts_of(folder("llama"), precision="auto").precision == expected
    assert not native_bfloat16(torch.device("meta"))


def test_native_bfloat16_agrees_with_torch() -> None:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if "avx512_bf16" not in capabilities:
        pytest.skip("this torch does not tell what an x86 processor can do")
    assert native_bfloat16(CPU) == (capabilities["avx512_bf16"] or capabilities["amx_bf16"])


def test_the_hash_follows_weights_and_configuration(folder: Callable[[str], Path], tmp_path: Path) -> None:
    before = facts_of(folder("llama")).weights_sha256
    copy = tmp_path / "copy"
    shutil.copytree(folder("llama"), copy)
    assert facts_of(copy).weights_sha256 == before
    (copy / "README.md").write_text("no part of the model")
    assert facts_of(copy).weights_sha256 == before
    weights = copy / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert facts_of(copy).weights_sha256 != before


def test_sharded_checkpoints(folder: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder("llama"))
    model.save_pretrained(tmp_path / "s", max_shard_size="100KB")
    write_tokenizer(tmp_path / "s")
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 1
    assert facts_of(tmp_path / "s").parameters == facts_of(folder("llama")).parameters
    shard = sorted((tmp_path / "s").glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(BadInput, match=f"{shard.name} is missing"):
        facts_of(tmp_path / "s")


def edited(folder: Path, to: Path, **fields: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | fields
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_what_cannot_be_a_teacher(folder: Callable[[str], Path], tmp_path: Path) -> None:
    llama = folder("llama")
    pickled = edited(llama, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    broken = edited(llama, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x10" + bytes(30))
    untold = edited(llama, tmp_path / "untold")
    (untold / "tokenizer.json").unlink()
    for path, message in (
        (tmp_path / "none", "teacher 't': no folder .*none, and .* is not a Hub id with a revision"),
        (pickled, "pytorch_model.bin but no safetensors.*convert it"),
        (broken, "is no safetensors file"),
        (untold, "holds no tokenizer.json"),
        (edited(llama, tmp_path / "capped", final_logit_softcapping=30.0), "final_logit_softcapping 30.0"),
        (
            edited(llama, tmp_path / "quantized", quantization_config={"quant_method": "gptq", "bits": 4}),
            "quantized already",
        ),
        (edited(llama, tmp_path / "odd", model_type="nonesuch"), "config.json cannot be used"),
        (edited(llama, tmp_path / "narrow", vocab_size=200), "tokenizer has 263 tokens, its model knows 200"),
    ):
        with pytest.raises(BadInput, match=message) as caught:
            facts_of(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="nobody/nothing at abc cannot be fetched"):
        resolve_teachers([TeacherSpec(name="t", model="nobody/nothing", revision="abc")], lambda _: tmp_path / "none")


def test_weights_that_are_not_there_are_not_made_up(folder: Callable[[str], Path], tmp_path: Path) -> None:
    deeper = edited(folder("llama"), tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(BadInput, match=r"no weights for model.layers.2"):
        load_teacher(facts_of(deeper), CPU)


def test_logits_that_are_more_than_the_head_are_refused(folder: Callable[[str], Path]) -> None:
    facts = facts_of(folder("llama"))
    model = load_teacher(facts, CPU).model
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: 30 * torch.tanh(plain(x) / 30)
    with pytest.raises(BadInput, match="computes its logits in a way"):
        Teacher(facts, model)


def test_a_factor_on_the_logits_is_folded_in(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GraniteConfig

    config = GraniteConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        logits_scaling=8.0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    teacher = load_teacher(facts_of(tmp_path), CPU)
    with torch.no_grad():
        theirs = teacher.model(input_ids=some_ids()).logits[..., :REAL]
    torch.testing.assert_close(teacher.logits(teacher.hidden(some_ids())[0].flatten(0, 1)), theirs.flatten(0, 1))


def test_teachers_share_a_tokenizer_or_are_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    first = facts_of(folder("llama"), "first")
    assert check_same_tokenizer([first, facts_of(folder("gpt2"), "second")]) == REAL

    def other(name: str) -> TeacherFacts:
        return dataclasses.replace(first, name=name, path=tmp_path / name)

    merges = (("t", "h"), ("th", "e"), ("a", "n"), ("i", "n"), ("Ġ", "the"))
    write_tokenizer(tmp_path / "token", (*merges, ("e", "s")))
    with pytest.raises(BadInput, match=r"'first' and 'token' .*token 'er' is 262 of 263 in one and missing of 263"):
        check_same_tokenizer([first, other("token")])
    write_tokenizer(tmp_path / "encoding")
    path = tmp_path / "encoding" / "tokenizer.json"
    words = json.loads(path.read_text())
    words["model"]["merges"] = words["model"]["merges"][::-1]  # the same tokens, merged in another order
    path.write_text(json.dumps(words))
    with pytest.raises(BadInput, match=r"'encoding' do not share a tokenizer: .* becomes \[.*\] in one and \[.*\] in"):
        check_same_tokenizer([first, other("encoding")])
    write_tokenizer(tmp_path / "special")
    path = tmp_path / "special" / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "<|endoftext|>"', '"eos_token": "th"'))
    with pytest.raises(BadInput, match="eos_token_id is 0 in one and 257 in the other"):
        check_same_tokenizer([first, other("special")])


def test_probes_are_many_and_always_the_same() -> None:
    probes = probe_strings()
    assert len(probes) == PROBES == 1000
    assert probes == probe_strings()
    assert len(set(probes)) > 950
    everything = "".join(probes)
    for character in ("\n", "\t", "é", "日", "ש", "🇪", "7", "{", "\u200b"):
        assert character in everything


def test_whether_teachers_fit_together(folder: Callable[[str], Path]) -> None:
    facts = facts_of(folder("llama"))
    assert fit_together([facts, facts], 2 * facts.memory_bytes)
    assert not fit_together([facts, facts], 2 * facts.memory_bytes - 1)
