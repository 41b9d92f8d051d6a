"""Recipes, profiles, teachers and texts that cannot be used, through the real command: exit 2, one line, nothing half-made."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from building import Build, Command, Done
from recipes import write_profile, write_recipe
from tiny import DEFAULT_MERGES, write_tokenizer


@dataclass(frozen=True)
class Case:
    """The complaint ({at}: the folder), and what earns it: changes of recipe and profile, damage to the folder."""

    line: str
    recipe: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    damage: Callable[[Path], object] = lambda at: None

    def build_in(self, folder: Path) -> Build:
        write_recipe(folder, **self.recipe)
        write_profile(folder, **self.profile)
        self.damage(folder)
        return Build(folder)

    def complaint(self, folder: Path) -> str:
        return f"edgestill: {self.line.replace('{at}', str(folder))}"


def student(**fields: Any) -> dict[str, Any]:
    """A recipe's change of student.config."""
    return {"student": {"config": fields}}


def cut_short(folder: Path) -> None:
    file = folder / "prose" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "prose" / "model.safetensors").rename(folder / "prose" / "pytorch_model.bin")


def foreign(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("x")


def other_merge(folder: Path) -> None:
    write_tokenizer(folder / "prose", merges=[*DEFAULT_MERGES[:-1], ("e", "s")])


KEPT = {"init": "teacher:prose", "config": None}
SLOW = {
    "device": {"memory_bandwidth_gb_per_s": 0.5, "last_level_cache_mib": 0},
    "budget": {"inter_token_ms_p95": 1},
}

REFUSED: dict[str, Case] = {
    "unknown key": Case(
        "{at}/recipe.yaml:20: student.layres: unknown key; did you mean 'layers'?",
        recipe={"student": {"layres": 2}},
    ),
    "features from a cache": Case(
        "{at}/recipe.yaml:1: losses.features needs the teachers during training, which train.teacher_cache: always "
        "replaces; remove one",
        recipe={"losses": {"features": {}}, "train": {"teacher_cache": "always"}},
    ),
    "missing teacher": Case(
        "teacher 'prose': no folder {at}/prose, and 'prose' is not a Hub id with a revision; correct `model` or add "
        "`revision`",
        damage=lambda at: shutil.rmtree(at / "prose"),
    ),
    "teachers that differ in one merge": Case(
        "teachers 'verse' and 'prose' do not share a tokenizer: token 'er' is 262 of 263 in one and missing of 263 in "
        "the other; use teachers of one tokenizer family",
        damage=other_merge,
    ),
    "teacher without tokenizer": Case(
        "teacher 'prose': {at}/prose holds no tokenizer.json; write it with "
        "AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        damage=lambda at: (at / "prose" / "tokenizer.json").unlink(),
    ),
    "teacher with a broken tokenizer": Case(
        "teacher 'prose': the tokenizer in {at}/prose cannot be loaded (EOF while parsing an object at line 1 column 1); "
        "correct its files",
        damage=lambda at: (at / "prose" / "tokenizer.json").write_text("{"),
    ),
    "teacher cut short": Case(
        "{at}/prose/model.safetensors: has 440644 bytes where its header declares 440744; fetch it again",
        damage=cut_short,
    ),
    "teacher that is no safetensors": Case(
        "{at}/prose/model.safetensors: is no safetensors file; fetch it again",
        damage=lambda at: (at / "prose" / "model.safetensors").write_bytes(b"<html>404: not found</html>"),
    ),
    "teacher with a broken index": Case(
        "teacher 'prose': {at}/prose/model.safetensors.index.json is no index of safetensors files; fetch it again",
        damage=lambda at: (at / "prose" / "model.safetensors.index.json").write_text("[]"),
    ),
    "pickled teacher": Case(
        "teacher 'prose': {at}/prose holds pytorch_model.bin but no safetensors, the only weights read (a pickle runs "
        "code); convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
        damage=pickled,
    ),
    "missing text": Case(
        "data source 'prose.txt': there is no {at}/prose.txt; correct `path`",
        damage=lambda at: (at / "prose.txt").unlink(),
    ),
    "windows longer than the teachers": Case(
        "data.sequence_length: 129 tokens, but teacher 'prose' was made for 128; shorten the windows",
        recipe={"data": {"sequence_length": 129}, **student(max_position_embeddings=256)},
    ),
    "windows longer than the student": Case(
        "data.sequence_length: 64 tokens, but the student's max_position_embeddings is 48; shorten the windows",
        recipe={"data": {"sequence_length": 64}, **student(max_position_embeddings=48)},
    ),
    "unknown architecture": Case(
        "student.config.model_type: 'lama' is not known to transformers; for example llama",
        recipe=student(model_type="lama"),
    ),
    "unknown field of the student": Case(
        "student.config.hiden_size: llama has no such field; did you mean 'hidden_size'?",
        recipe=student(hiden_size=64),
    ),
    "text where a size belongs": Case(
        "student.config.num_attention_heads: 'two' is out of range; give a whole number of at least 1",
        recipe=student(num_attention_heads="two"),
    ),
    "heads that cannot share": Case(
        "student.config.num_attention_heads: 3 heads cannot share 2 key/value heads evenly; make num_attention_heads a "
        "multiple of num_key_value_heads",
        recipe=student(num_attention_heads=3, num_key_value_heads=2),
    ),
    "heads of an odd width": Case(
        "student.config.num_attention_heads: heads of 3 (6 / 2) cannot be rotated in pairs; make hidden_size / "
        "num_attention_heads even",
        recipe=student(hidden_size=6),
    ),
    "layers beyond the teacher": Case(
        "student.keep_layers: layer 5 does not exist; teacher 'prose' has 0 to 2",
        recipe={"student": {**KEPT, "keep_layers": [0, 5]}},
    ),
    "more layers than the teacher": Case(
        "student.layers: 9 is more than the teacher's 3; keep at most 3",
        recipe={"student": {**KEPT, "layers": 9}},
    ),
    "features of a layer that is not there": Case(
        "losses.features.layers: pair [0, 9] does not exist; the student has layers 0 to 1, the teacher 0 to 1",
        recipe={"losses": {"features": {"layers": [[0, 9]]}}},
    ),
    "features of another width": Case(
        "losses.features.projection: none, but the student is 32 wide and teacher 'verse' 48; use projection: linear",
        recipe={"losses": {"features": {"projection": "none"}}},
    ),
    "impossible budget": Case(
        "profile device: budget.inter_token_ms_p95 1 ms: 5.5 MB read per step / 0.5 GB/s = 10.98 ms (5.1 MiB of weights "
        "do not fit in the 0 MiB last-level cache); raise it, or use a smaller student or fewer bits",
        recipe=student(hidden_size=512, intermediate_size=2048),
        profile=SLOW,
    ),
    "workload longer than the student": Case(
        "profile device: workload: prompt_tokens 128 + new_tokens 8 = 136 exceed the model's 128 tokens; shorten the "
        "workload",
        profile={"workload": {"prompt_tokens": 128}},
    ),
    "precision that the engine lacks": Case(
        "{at}/device.yaml:14: precision.weights: 'fp8' is not built for engine onnxruntime-cpu; use float32, int8, int4, nf4, fp4",
        profile={"precision": {"weights": "fp8"}},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case: str, tmp_path: Path, edgestill: Command) -> None:
    build = REFUSED[case].build_in(tmp_path)
    assert edgestill(*build.arguments) == Done(2, "", REFUSED[case].complaint(tmp_path) + "\n")
    assert not build.out.exists()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the teachers run on a GPU here, whose 4-bit kernels take any width"
)
def test_a_4_bit_teacher_that_a_cpu_would_get_wrong(tmp_path: Path, edgestill: Command) -> None:
    teachers = [{"name": "verse", "model": "verse", "precision": "4bit"}, {"name": "prose", "model": "prose"}]
    build = Case("", recipe={"teachers": teachers}).build_in(tmp_path)
    line = (
        "teacher 'verse': model.layers.0.self_attn.q_proj has 48 inputs, not a multiple of 64, which 4-bit kernels on a "
        "CPU get wrong; use precision 8bit or bfloat16"
    )
    assert edgestill(*build.arguments) == Done(2, "", f"edgestill: {line}\n")
    assert not build.out.exists()


def test_plan_and_distill_refuse_alike(tmp_path: Path, edgestill: Command) -> None:
    recipe, profile = write_recipe(tmp_path), write_profile(tmp_path)
    cut_short(tmp_path)
    planned = edgestill("plan", recipe, "--profile", profile)
    trained = edgestill("distill", recipe, "--out", tmp_path / "out")
    assert planned == trained
    assert (planned.code, len(planned.errors)) == (2, 1)
    assert not (tmp_path / "out").exists()


def test_words_are_refused_all_at_once(tmp_path: Path, edgestill: Command) -> None:
    recipe = write_recipe(tmp_path)
    text = recipe.read_text().replace("format: 1", "format: 2").replace("cross_entropy: 0.2", "cross_entropy: 1e-5")
    text = text.replace("tokens: 2048", "tokens: 1e6").replace("  cache_top_k", "  batch_size: 8\n  cache_top_k")
    recipe.write_text(text + "trian: {}\n")
    lines = recipe.read_text().splitlines()
    first, second = (number for number, line in enumerate(lines, 1) if "batch_size" in line)
    complaints = [
        (1, "format: 2 is not allowed; use 1"),
        (lines.index("  cross_entropy: 1e-5") + 1, "losses.cross_entropy: '1e-5' is text to YAML; write 1.0e-5"),
        (lines.index("  tokens: 1e6") + 1, "train.tokens: '1e6' is text to YAML; write 1000000"),
        (second, f"train.batch_size: is written twice (first in line {first}); remove one"),
        (len(lines), "trian: unknown key; did you mean 'train'?"),
    ]
    done = edgestill("build", recipe, "--profile", write_profile(tmp_path), "--out", tmp_path / "out")
    assert done == Done(2, "", "".join(f"edgestill: {recipe}:{number}: {what}\n" for number, what in complaints))
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_memory_can_order(tmp_path: Path, edgestill: Command) -> None:
    recipe = write_recipe(tmp_path, train={"tokens": 10**15})
    done = edgestill("build", recipe, "--profile", write_profile(tmp_path), "--out", tmp_path / "out")
    assert re.fullmatch(
        r"edgestill: train\.tokens: the order of 3\.12e\+13 windows alone takes [\d,]+ GiB of memory \([\d,]+ GiB are free\); "
        r"train on fewer tokens\n",
        done.err,
    )
    assert done.code == 2
    assert not (tmp_path / "out").exists()


def test_profiles_that_cannot_be_built(tmp_path: Path, edgestill: Command) -> None:
    recipe, good, same = write_recipe(tmp_path), write_profile(tmp_path), write_profile(tmp_path / "other")
    for profile, line in (
        (
            "cpu-x68",
            r"cpu-x68: unknown profile; did you mean 'cpu-x86'\? known: .*; for a file give a path, such as ./cpu-x68.yaml",
        ),
        (same, "two profiles are called device, and each names the folder of its bundle; rename one file"),
    ):
        done = edgestill("build", recipe, "--profile", good, "--profile", profile, "--out", tmp_path / "out")
        assert (done.code, done.out) == (2, "")
        assert re.fullmatch(f"edgestill: {line}\n", done.err)
        assert not (tmp_path / "out").exists()


UNREADABLE: dict[str, Case] = {
    "empty text": Case(
        "data source 'prose.txt' has no text; add some or remove the source",
        damage=lambda at: (at / "prose.txt").write_text("\n \n"),
    ),
    "text that is not UTF-8": Case(
        "{at}/prose.txt: byte 6 (0xef) is not UTF-8, the only encoding read; convert it, for instance with iconv -t UTF-8",
        damage=lambda at: (at / "prose.txt").write_bytes("The naïve fjord. ".encode("latin-1") * 500),
    ),
    "a missing column": Case(
        "{at}/prose.jsonl, row 1: no column 'text', there are 'txt', 'id'; correct the column's name",
        recipe={"data": {"sources": [{"path": "verse.txt"}, {"path": "prose.jsonl"}]}},
        damage=lambda at: (at / "prose.jsonl").write_text('{"txt": "a fjord", "id": 1}\n' * 50),
    ),
    "too little text": Case(
        "data source 'prose.txt' leaves 9 tokens for training, fewer than data.sequence_length 32; add text, shorten the "
        "windows or remove the source",
        damage=lambda at: (at / "prose.txt").write_text("the inn, and the end"),
    ),
    "held-out text inside the training text": Case(
        "99.7 % of the held-out text occurs in the training or validation text (limit 1 % of its 32-token runs), first "
        "'tetandthe lorpor tetandthe labe ginpeso'; remove it from one of them",
        recipe={"data": {"held_out": [{"path": "prose.txt"}]}},
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_text_that_cannot_be_used(case: str, tmp_path: Path, edgestill: Command) -> None:
    build = UNREADABLE[case].build_in(tmp_path)
    done = edgestill(*build.arguments)
    assert (done.code, done.errors) == (2, [UNREADABLE[case].complaint(tmp_path)])
    assert done.err.endswith(f"{done.errors[0]}\n")
    assert build.kept() == set()
    assert sorted(p.name for p in build.out.iterdir()) == [".lock", "build.json", "work"]


def test_output_that_is_no_build(tmp_path: Path, edgestill: Command) -> None:
    build = Case("", damage=foreign).build_in(tmp_path)
    line = f"edgestill: {build.out}: is not empty and not a build (no build.json); give another --out\n"
    assert edgestill(*build.arguments) == Done(2, "", line)
    assert [p.name for p in build.out.iterdir()] == ["thesis.tex"]
    shutil.rmtree(build.out)
    build.out.write_text("x")
    line = f"edgestill: {build.out}: is a file, not a folder; give another --out\n"
    assert edgestill(*build.arguments) == Done(2, "", line)
    assert build.out.read_text() == "x"


def test_a_student_larger_than_its_teachers_is_only_a_warning(tmp_path: Path, edgestill: Command) -> None:
    recipe = write_recipe(tmp_path, **student(hidden_size=128), train={"tokens": 256}, reference={"tokens": 64})
    done = edgestill("distill", recipe, "--out", tmp_path / "out")
    assert (done.code, done.errors) == (0, [])
    assert "warning: the student (214,528 parameters) is larger than its smallest teacher (54,336)\n" in done.err
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()


def test_a_prompt_over_the_limit(finished: Build, edgestill: Command) -> None:
    done = edgestill("generate", finished.bundle, "a fjord " * 100)
    line = "edgestill: 800 prompt + 1 new tokens exceed the 128 of this model; shorten the prompt or ask for less\n"
    assert done == Done(2, "", line)
