"""Bad input and a hostile machine, through the real command: exit 2, one line with the repair, nothing half-made."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from building import Build, Command, Done
from recipes import write_profile, write_recipe
from tiny import DEFAULT_MERGES, write_tokenizer

Damage = Callable[[Path], object]


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

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], Damage | None, str]] = {
    "unknown key": (
        {"student": {"layres": 2}},
        {},
        None,
        "{at}/recipe.yaml:20: student.layres: unknown key; did you mean 'layers'?",
    ),
    "features from a cache": (
        {"losses": {"features": {}}, "train": {"teacher_cache": "always"}},
        {},
        None,
        "{at}/recipe.yaml:1: losses.features needs the teachers during training, which train.teacher_cache: always "
        "replaces; remove one",
    ),
    "missing teacher": (
        {},
        {},
        lambda at: shutil.rmtree(at / "prose"),
        "teacher 'prose': no folder {at}/prose, and 'prose' is not a Hub id with a revision; correct `model` or add "
        "`revision`",
    ),
    "teachers that differ in one merge": (
        {},
        {},
        other_merge,
        "teachers 'verse' and 'prose' do not share a tokenizer: token 'er' is 262 of 263 in one and missing of 263 in "
        "the other; use teachers of one tokenizer family",
    ),
    "teacher without tokenizer": (
        {},
        {},
        lambda at: (at / "prose" / "tokenizer.json").unlink(),
        "teacher 'prose': {at}/prose holds no tokenizer.json; write it with "
        "AutoTokenizer.from_pretrained(...).save_pretrained(...)",
    ),
    "teacher with a broken tokenizer": (
        {},
        {},
        lambda at: (at / "prose" / "tokenizer.json").write_text("{"),
        "teacher 'prose': the tokenizer in {at}/prose cannot be loaded (EOF while parsing an object at line 1 column 1); "
        "correct its files",
    ),
    "teacher cut short": (
        {},
        {},
        cut_short,
        "{at}/prose/model.safetensors: has 440644 bytes where its header declares 440744; fetch it again",
    ),
    "teacher that is no safetensors": (
        {},
        {},
        lambda at: (at / "prose" / "model.safetensors").write_bytes(b"<html>404: not found</html>"),
        "{at}/prose/model.safetensors: is no safetensors file; fetch it again",
    ),
    "teacher with a broken index": (
        {},
        {},
        lambda at: (at / "prose" / "model.safetensors.index.json").write_text("[]"),
        "teacher 'prose': {at}/prose/model.safetensors.index.json is no index of safetensors files; fetch it again",
    ),
    "pickled teacher": (
        {},
        {},
        pickled,
        "teacher 'prose': {at}/prose holds pytorch_model.bin but no safetensors, the only weights read (a pickle runs "
        "code); convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
    ),
    "4-bit teacher of the wrong width": (
        {"teachers": [{"name": "verse", "model": "verse", "precision": "4bit"}, {"name": "prose", "model": "prose"}]},
        {},
        None,
        "teacher 'verse': model.layers.0.self_attn.q_proj has 48 inputs, not a multiple of 64, which 4-bit kernels on a "
        "CPU get wrong; use precision 8bit or bfloat16",
    ),
    "missing text": (
        {},
        {},
        lambda at: (at / "prose.txt").unlink(),
        "data source 'prose.txt': there is no {at}/prose.txt; correct `path`",
    ),
    "windows longer than the teachers": (
        {"data": {"sequence_length": 129}, **student(max_position_embeddings=256)},
        {},
        None,
        "data.sequence_length: 129 tokens, but teacher 'prose' was made for 128; shorten the windows",
    ),
    "windows longer than the student": (
        {"data": {"sequence_length": 64}, **student(max_position_embeddings=48)},
        {},
        None,
        "data.sequence_length: 64 tokens, but the student's max_position_embeddings is 48; shorten the windows",
    ),
    "unknown architecture": (
        student(model_type="lama"),
        {},
        None,
        "student.config.model_type: 'lama' is not known to transformers; for example llama",
    ),
    "unknown field of the student": (
        student(hiden_size=64),
        {},
        None,
        "student.config.hiden_size: llama has no such field; did you mean 'hidden_size'?",
    ),
    "text where a size belongs": (
        student(num_attention_heads="two"),
        {},
        None,
        "student.config.num_attention_heads: 'two' is out of range; give a whole number of at least 1",
    ),
    "heads that cannot share": (
        student(num_attention_heads=3, num_key_value_heads=2),
        {},
        None,
        "student.config.num_attention_heads: 3 heads cannot share 2 key/value heads evenly; make num_attention_heads a "
        "multiple of num_key_value_heads",
    ),
    "heads of an odd width": (
        student(hidden_size=6),
        {},
        None,
        "student.config.num_attention_heads: heads of 3 (6 / 2) cannot be rotated in pairs; make hidden_size / "
        "num_attention_heads even",
    ),
    "layers beyond the teacher": (
        {"student": {**KEPT, "keep_layers": [0, 5]}},
        {},
        None,
        "student.keep_layers: layer 5 does not exist; teacher 'prose' has 0 to 2",
    ),
    "more layers than the teacher": (
        {"student": {**KEPT, "layers": 9}},
        {},
        None,
        "student.layers: 9 is more than the teacher's 3; keep at most 3",
    ),
    "features of a layer that is not there": (
        {"losses": {"features": {"layers": [[0, 9]]}}},
        {},
        None,
        "losses.features.layers: pair [0, 9] does not exist; the student has layers 0 to 1, the teacher 0 to 1",
    ),
    "features of another width": (
        {"losses": {"features": {"projection": "none"}}},
        {},
        None,
        "losses.features.projection: none, but the student is 32 wide and teacher 'verse' 48; use projection: linear",
    ),
    "impossible budget": (
        student(hidden_size=512, intermediate_size=2048),
        SLOW,
        None,
        "profile device: budget.inter_token_ms_p95 1 ms: 5.5 MB read per step / 0.5 GB/s = 10.98 ms (5.1 MiB of weights "
        "do not fit in the 0 MiB last-level cache); raise it, or use a smaller student or fewer bits",
    ),
    "workload longer than the student": (
        {},
        {"workload": {"prompt_tokens": 128}},
        None,
        "profile device: workload: prompt_tokens 128 + new_tokens 8 = 136 exceed the model's 128 tokens; shorten the "
        "workload",
    ),
    "precision that the engine lacks": (
        {},
        {"precision": {"weights": "fp8"}},
        None,
        "{at}/device.yaml:14: precision.weights: 'fp8' is not built for engine onnxruntime-cpu; use float32, int8, int4",
    ),
}
"""Name -> changes of the recipe, changes of the profile, damage to the folder, the line."""


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case: str, tmp_path: Path, edgestill: Command) -> None:
    recipe, profile, damage, line = REFUSED[case]
    build = Build(tmp_path)
    write_recipe(tmp_path, **recipe)
    write_profile(tmp_path, **profile)
    if damage is not None:
        damage(tmp_path)
    done = edgestill(*build.arguments)
    assert done == Done(2, "", f"edgestill: {line.replace('{at}', str(tmp_path))}\n")
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
        ("rtx-4090", r"profile rtx-4090: engine tensorrt-rtx is not built yet; .* use engine onnxruntime-cpu .*"),
        (same, "two profiles are called device, and each names the folder of its bundle; rename one file"),
    ):
        done = edgestill("build", recipe, "--profile", good, "--profile", profile, "--out", tmp_path / "out")
        assert (done.code, done.out) == (2, "")
        assert re.fullmatch(f"edgestill: {line}\n", done.err)
        assert not (tmp_path / "out").exists()


UNREADABLE: dict[str, tuple[dict[str, Any], Damage | None, str]] = {
    "empty text": (
        {},
        lambda at: (at / "prose.txt").write_text("\n \n"),
        "data source 'prose.txt' has no text; add some or remove the source",
    ),
    "text that is not UTF-8": (
        {},
        lambda at: (at / "prose.txt").write_bytes("The naïve fjord. ".encode("latin-1") * 500),
        "{at}/prose.txt: byte 6 (0xef) is not UTF-8, the only encoding read; convert it, for instance with iconv -t UTF-8",
    ),
    "a missing column": (
        {"data": {"sources": [{"path": "verse.txt"}, {"path": "prose.jsonl"}]}},
        lambda at: (at / "prose.jsonl").write_text('{"txt": "a fjord", "id": 1}\n' * 50),
        "{at}/prose.jsonl, row 1: no column 'text', there are 'txt', 'id'; correct the column's name",
    ),
    "too little text": (
        {},
        lambda at: (at / "prose.txt").write_text("the inn, and the end"),
        "data source 'prose.txt' leaves 9 tokens for training, fewer than data.sequence_length 32; add text, shorten the "
        "windows or remove the source",
    ),
    "held-out text inside the training text": (
        {"data": {"held_out": [{"path": "prose.txt"}]}},
        None,
        "99.7 % of the held-out text occurs in the training or validation text (limit 1 % of its 32-token runs), first "
        "'tetandthe lorpor tetandthe labe ginpeso'; remove it from one of them",
    ),
}
"""Name -> changes of the recipe, damage to the folder, the line."""


@pytest.mark.parametrize("case", UNREADABLE)
def test_text_that_cannot_be_used(case: str, tmp_path: Path, edgestill: Command) -> None:
    recipe, damage, line = UNREADABLE[case]
    build = Build(tmp_path)
    write_recipe(tmp_path, **recipe)
    write_profile(tmp_path)
    if damage is not None:
        damage(tmp_path)
    done = edgestill(*build.arguments)
    assert (done.code, done.errors) == (2, [f"edgestill: {line.replace('{at}', str(tmp_path))}"])
    assert done.err.endswith(f"{done.errors[0]}\n")
    assert build.kept() == set()
    assert sorted(p.name for p in build.out.iterdir()) == [".lock", "build.json", "work"]


def test_output_that_is_no_build(tmp_path: Path, edgestill: Command) -> None:
    build = Build(tmp_path)
    write_recipe(tmp_path)
    write_profile(tmp_path)
    foreign(tmp_path)
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


# export of a checkpoint ---------------------------------------------------------------------------------------------


def config_of(checkpoint: Path, **fields: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **fields}))


CHECKPOINTS: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "{at} has no config.json with a model_type; give a Hugging Face checkpoint folder"),
    "no weights": (
        lambda at: (at / "model.safetensors").unlink(),
        "{at}: holds no *.safetensors; save the checkpoint with save_pretrained",
    ),
    "weights cut short": (
        lambda at: os.truncate(at / "model.safetensors", 118000),
        "{at}/model.safetensors: has 118000 bytes where its header declares 118256; fetch it again",
    ),
    "no tokenizer": (
        lambda at: (at / "tokenizer.json").unlink(),
        "{at} has no tokenizer.json; save it with a fast tokenizer (AutoTokenizer, save_pretrained)",
    ),
    "foreign architecture": (
        lambda at: config_of(at, model_type="megabrain"),
        "{at}/config.json: model_type 'megabrain' cannot be loaded by transformers (The checkpoint you are trying to load "
        "has model type `megabrain` but Transformers does not recognize this architecture); use a causal language model "
        "that transformers ships",
    ),
}
"""Name -> damage to the checkpoint, the line."""


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_export_refuses_a_checkpoint(case: str, finished: Build, tmp_path: Path, edgestill: Command) -> None:
    damage, line = CHECKPOINTS[case]
    checkpoint, out = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(finished.stage("train") / "student", checkpoint)
    damage(checkpoint)
    done = edgestill("export", checkpoint, "--profile", write_profile(tmp_path), "--out", out)
    assert done == Done(2, "", f"edgestill: {line.replace('{at}', str(checkpoint))}\n")
    assert not out.exists()


def test_export_refuses_text_and_limits(finished: Build, tmp_path: Path, edgestill: Command) -> None:
    checkpoint, out, profile = finished.stage("train") / "student", tmp_path / "out", write_profile(tmp_path)
    limits, wrong, latin = (tmp_path / name for name in ("limits.yaml", "wrong.yaml", "latin.txt"))
    limits.write_text("format: 1\nlimits: {quantization_perplexity_ratio: 1.1}\n")
    wrong.write_text("format: 1\nlimits: {bundle_mib: 5}\n")
    latin.write_bytes(b"\xe9" * 4000)
    for arguments, line, claimed in (
        (
            ["--limits", limits],
            "limits on quantization_perplexity_ratio need text to judge on; give --held-out TEXT",
            False,
        ),
        (
            ["--limits", tmp_path / "no"],
            f"{tmp_path}/no: there is no such file; write one with `format: 1` and `limits:`",
            False,
        ),
        (
            ["--limits", wrong],
            f"{wrong}:2: limits.bundle_mib: belongs in the budget of a profile; move it there",
            False,
        ),
        (
            ["--held-out", tmp_path / "no"],
            f"--held-out {tmp_path}/no: there is no such file or folder; give text to judge on",
            False,
        ),
        (
            ["--held-out", latin],
            f"{latin}: byte 0 (0xe9) is not UTF-8, the only encoding read; convert it, for instance with iconv -t UTF-8",
            True,
        ),
    ):
        done = edgestill("export", checkpoint, "--profile", profile, "--out", out, *arguments)
        assert (done.code, done.errors) == (2, [f"edgestill: {line}"])
        assert out.exists() == claimed
        if not claimed:
            assert done.err == f"edgestill: {line}\n"
        else:
            assert not [p for p in (out / "work").iterdir() if not p.name.endswith(".partial")]


# a machine that refuses ---------------------------------------------------------------------------------------------


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """As `ulimit -f`, in bytes, for this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


TOO_LARGE = "the file would be larger than this process may write; raise the limit (ulimit -f) or write elsewhere"
LATER = {
    "train": ("train", "reference", "onnx", "quantize-device"),
    "onnx": ("onnx", "quantize-device"),
    "quantize-device": ("quantize-device",),
    "bundle": (),
}


@pytest.mark.parametrize(
    ("stage", "size"),
    [
        ("train", 100_000),
        ("train", 200_000),
        ("onnx", 50_000),
        ("quantize-device", 60_000),
        ("bundle", 80_000),
        ("bundle", 150_000),
    ],
)
def test_files_that_may_not_be_written(
    stage: str, size: int, finished: Build, tmp_path: Path, edgestill: Command
) -> None:
    """Within safetensors, torch.save, the ONNX export, the quantizer, the bundle's files, the bundle's report."""
    build = finished.without(*LATER[stage], folder=tmp_path / "copy")
    before = build.kept()
    with no_file_larger_than(size):
        done = edgestill(*build.arguments)
    assert (done.code, done.out) == (2, "")
    assert len(done.errors) == 1
    assert done.err.endswith(f": {TOO_LARGE}\n")
    assert done.errors[0].startswith(f"edgestill: {build.out}")
    assert build.kept() >= before
    assert sorted(p.name for p in build.out.iterdir()) == [".lock", "build.json", "work"]
    if stage in ("onnx", "bundle"):  # the others end alike, and a build takes seconds
        again = edgestill(*build.arguments)
        assert (again.code, again.errors) == (0, [])
        assert again.err.count(": done before, unchanged\n") == 7 - len(LATER[stage])
        assert edgestill("verify", build.bundle).code == 0


SMALL_DISK = textwrap.dedent(
    """
    import json, subprocess, sys
    from pathlib import Path
    from edgestill.runtime.cli import run

    out, *command = sys.argv[1:]
    def mount(options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", out], check=True)

    mount("size=400k")
    for change in ("remount,size=64m", "remount,ro", None):
        code = run(command)
        print(json.dumps({"code": code, "names": sorted(p.relative_to(out).as_posix() for p in Path(out).glob("work/*"))}))
        print("== next", file=sys.stderr, flush=True)
        if change:
            mount(change)
    """
)


def mounting(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a mount namespace of its own; skips where that is not permitted."""
    prefix = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None:
        pytest.skip("unshare (util-linux) is not installed")
    with_tmpfs = [*prefix, "mount", "-t", "tmpfs", "tmpfs", arguments[0]]
    if subprocess.run(with_tmpfs, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not permitted here")
    command = [*prefix, sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_full_disk_and_a_read_only_one(tmp_path: Path) -> None:
    """First there is room for some stages, then for all; then the finished build cannot be written any more."""
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    out.mkdir()
    done = mounting(SMALL_DISK, str(out), "distill", str(recipe), "--out", str(out))
    assert done.returncode == 0, done.stderr
    first, second, third = (json.loads(line) for line in done.stdout.splitlines())
    full, enough, read_only, _ = done.stderr.split("== next\n")
    assert first["code"] == 2
    assert re.search(
        rf"\nedgestill: {out}[^\n]*: no space is left on the device; free some or write elsewhere\n$", full
    )
    assert full.count("edgestill: ") == 1
    finished = [name for name in first["names"] if not name.endswith(".partial")]
    assert [name.rpartition("-")[0] for name in finished] == ["work/calibrate", "work/corpus"]
    assert second["code"] == 0
    assert set(second["names"]) > set(finished)
    assert enough.count(": done before, unchanged\n") == len(finished)
    assert third["code"] == 2
    assert read_only == f"edgestill: {out}: cannot be written (Read-only file system); give another --out\n"


def test_a_folder_without_permission(tmp_path: Path) -> None:
    """Root is made subject to modes by taking its capability to override them away."""
    recipe, profile, locked = write_recipe(tmp_path), write_profile(tmp_path), tmp_path / "locked"
    locked.mkdir(mode=0o555)
    prefix: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root ignores modes, and setpriv (util-linux) is not installed")
        prefix = ["setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override"]
    code = "from edgestill.runtime.cli import main; main()"
    command = [*prefix, sys.executable, "-c", code, "build", str(recipe), "--profile", str(profile)]
    done = subprocess.run(
        [*command, "--out", str(locked / "out")], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"edgestill: {locked / 'out'}: cannot be written (Permission denied); give another --out\n"
    assert list(locked.iterdir()) == []


# two at once, and Ctrl-C --------------------------------------------------------------------------------------------


def test_a_second_build_is_refused_and_an_interrupted_one_goes_on(tmp_path: Path, edgestill: Command) -> None:
    build = Build(tmp_path)
    recipe = write_recipe(tmp_path, train={"tokens": 16384})
    write_profile(tmp_path)
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from edgestill.runtime.cli import main; main()"
    command = [sys.executable, "-c", code, *build.arguments]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list(build.out.glob("work/train-*.partial/run/checkpoint-*")):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)  # held in the middle of training while the second one comes
        second = edgestill(*build.arguments)
        assert second == Done(
            2,
            "",
            f"edgestill: {build.out}: another build is running in this folder (process {first.pid}); wait for it or give "
            "another --out\n",
        )
        os.killpg(first.pid, signal.SIGINT)  # as a terminal does it, to the whole group
        os.killpg(first.pid, signal.SIGCONT)
        out, err = first.communicate(timeout=60)
    finally:
        if first.poll() is None:
            first.kill()
    assert (first.returncode, out) == (130, "")
    assert err.endswith("stopped; the same command goes on from here\n")
    assert "edgestill: " not in err
    assert "Traceback" not in err
    assert build.kept() == {"corpus", "calibrate"}
    resumed = edgestill("distill", recipe, "--out", build.out)
    assert (resumed.code, resumed.errors) == (0, [])
    assert resumed.err.count(": done before, unchanged\n") == 2
    record = json.loads((build.stage("train") / "stage.json").read_text())
    assert record["info"]["resumed_from_step"] >= 4
    assert not list(build.out.glob("work/*.partial"))


def test_an_interrupt_that_lands_in_a_finalizer_is_not_lost() -> None:
    planted = textwrap.dedent(
        """
        import sys, time
        from edgestill.runtime import cli

        class Interrupted:
            def __del__(self):
                raise KeyboardInterrupt

        @cli.app.command("planted")
        def planted():
            Interrupted()
            time.sleep(60)

        sys.argv = ["edgestill", "planted"]
        cli.main()
        """
    )
    done = subprocess.run([sys.executable, "-c", planted], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
