"""The command line: help, exit codes, one line per error, and what it must not import."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from bundles import make_bundle

from edgestill.profiles.load import load_profile, packaged
from edgestill.runtime.cli import EXTRAS, describe, run
from edgestill.runtime.commands_build import _print_stored
from edgestill.runtime.commands_profiles import profile_text
from edgestill.runtime.commands_shared import EXIT_CODES, finish, save_json
from edgestill.runtime.errors import BadInput, BundleError, MissingPart
from edgestill.runtime.gate import Check, Report

ROOT = Path(__file__).parents[2]
COMMANDS = [
    *("build", "plan", "distill", "ablate", "export"),
    *("check", "bench", "engine", "tune", "report", "verify"),
    *("generate", "chat", "profiles"),
]
OPTIONS = {
    "build": ["--profile", "--out", "--force"],
    "plan": ["--profile"],
    "distill": ["--out"],
    "ablate": ["--out", "--seeds", "--tokens", "--rows", "--only", "--jobs", "--held-out"],
    "export": ["--profile", "--out", "--held-out", "--limits"],
    "check": ["--json"],
    "bench": ["--prompt-tokens", "--new-tokens", "--batch", "--sweep", "--beside", "--torch", "--plot", "--json"],
    "engine": ["--ahead", "--compute-capability", "--json"],
    "generate": [
        "--max-new-tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--seed",
        "--stop",
        "--draft",
        "--no-verify",
    ],
    "chat": ["--system", "--max-new-tokens", "--temperature", "--seed", "--draft", "--no-verify"],
    "tune": ["--json"],
}
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("cli") / "plain")


def cli(*arguments: str, prelude: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after `prelude` (Python) has prepared it."""
    code = f"{prelude}\nimport sys\nfrom edgestill.runtime.cli import app, run\n"
    if "@app" in prelude:
        code = f"import sys\nfrom edgestill.runtime.cli import app, run\n{prelude}\n"
    code += "sys.exit(run(sys.argv[1:]))"
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=variables,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns_and_shows_an_example(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(rf"Example:\n +edgestill {command}", text)
    assert all(option in text for option in OPTIONS.get(command, []))
    assert "..." not in text.replace("[ARGS]...", "")  # no summary is cut


def test_the_command_lists_all_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    listed = capsys.readouterr().out.partition("Commands:\n")[2]
    assert [line.split()[0] for line in listed.splitlines()] == COMMANDS


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert capsys.readouterr().out == f"edgestill {declared}\n"


def test_the_command_line_starts_light() -> None:
    heavy = [*EXTRAS["build"], *EXTRAS["report"], "onnxruntime", "tokenizers", "numpy", "rich", "jinja2"]
    code = f"import sys, edgestill.runtime.cli; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["plan"], ["nothing"], ["bench", "x", "--batch", "0"], ["build", "x"]):
        assert run(arguments) == 2
        assert "Usage: edgestill" in capsys.readouterr().err


def test_profiles_lists_devices_and_recipes_without_yaml() -> None:
    done = cli("profiles", prelude="import sys; sys.modules['yaml'] = None", COLUMNS="80")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    names = [line.split()[0] for line in lines if re.match(r"  \S", line)]
    assert names == [*packaged("profiles"), *(packaged("recipes") or ["none"])]
    assert "  cpu-arm64         Raspberry Pi 5 (8 GB): four Cortex-A76 at 2.4 GHz, CPU only." in lines


def test_profiles_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profiles", "cpu-x86"]) == 0
    assert capsys.readouterr().out == load_profile("cpu-x86").text
    assert run(["profiles", "cpu-x68"]) == 2
    assert capsys.readouterr().err.startswith("edgestill: cpu-x68: unknown profile; did you mean 'cpu-x86'? known: ")


def test_this_machine_as_a_profile_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profiles", "detect"]) == 0
    path = tmp_path / "here.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    profile = load_profile(str(path)).profile
    assert profile.device.engine == "onnxruntime-cpu"
    assert profile.device.memory_bandwidth_gb_per_s > 0


DEVICE: dict[str, Any] = {
    "arch": "aarch64",
    "engine": "onnxruntime-cpu",
    "cpu": "Board\nwith: a # odd name",
    "threads": 4,
    "memory_mib": 7900,
    "last_level_cache_mib": None,
    "memory_bandwidth_gb_per_s": 9.0,
    "gpu": None,
    "compute_capability": None,
}


@pytest.mark.parametrize(
    ("facts", "gpu", "capability", "cache"),
    [
        ({}, None, None, 0),
        ({"gpu": 'Orin "nano": é', "compute_capability": "8.7"}, 'Orin "nano": é', "8.7", 0),
        ({"gpu": "old", "compute_capability": "[N/A]", "last_level_cache_mib": 2.0}, "old", None, 2.0),
    ],
)
def test_odd_machines_as_profiles(
    facts: dict[str, Any], gpu: str | None, capability: str | None, cache: float, tmp_path: Path
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(profile_text({**DEVICE, **facts}), encoding="utf-8")
    device = load_profile(str(path)).profile.device
    assert (device.gpu, device.compute_capability, device.last_level_cache_mib) == (gpu, capability, cache)
    assert (device.arch, device.threads, device.memory_mib) == ("aarch64", 4, 7900)


def test_machines_that_no_profile_names() -> None:
    with pytest.raises(BadInput, match=r"^this machine is riscv64; profiles are for x86_64 and aarch64$"):
        profile_text({**DEVICE, "arch": "riscv64"})
    with pytest.raises(BadInput, match="memory could not be measured"):
        profile_text({**DEVICE, "memory_mib": None})


def test_verify(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(bundle)]) == 0
    assert capsys.readouterr().out == f"{bundle}: whole\n"
    damaged = make_bundle(tmp_path / "damaged")
    (damaged / "extra.txt").write_text("x")
    assert run(["verify", str(damaged)]) == 1
    assert "extra.txt" in capsys.readouterr().err
    assert run(["verify", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        f"edgestill: {tmp_path / 'none'}: no such folder; give the folder of a bundle, such as build/quickstart/cpu-x86\n"
    )


def test_check_of_a_damaged_bundle_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = make_bundle(tmp_path / "damaged")
    (damaged / "tokenizer.json").unlink()
    assert run(["check", str(damaged)]) == 2
    assert capsys.readouterr().err.startswith("edgestill: ")


def test_generate_streams_and_passes_options_on(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgestill.runtime.model import load

    options = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 3}
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert run(["generate", str(bundle), "the inn", *flags, "--repetition-penalty", "1.2", "--stats"]) == 0
    printed = capsys.readouterr()
    ours = load(bundle).generate("the inn", **options, repetition_penalty=1.2)  # type: ignore[arg-type]
    assert printed.out == ours.text + "\n"
    prompt, new = ours.statistics.prompt_tokens, ours.statistics.new_tokens
    assert printed.err.startswith(f"{prompt} prompt + {new} new tokens ({ours.finish_reason}); first after ")


def test_generate_without_options_is_the_librarys_default(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgestill.runtime.model import load

    assert run(["generate", str(bundle), "an inn", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == load(bundle).generate("an inn", max_new_tokens=6).text + "\n"


def test_generate_refuses_in_one_line(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(bundle), "x", "--top-p", "2"]) == 2
    assert capsys.readouterr().err == "edgestill: top_p is 2.0; give a number in (0, 1]\n"
    assert run(["generate", str(bundle), "x" * 500]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_chat_needs_a_template(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", str(bundle)]) == 2
    assert capsys.readouterr().err == (
        "edgestill: this bundle has no chat_template.jinja: the model was not trained on chats; use generate or stream\n"
    )


def test_chat_answers_every_line_with_all_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgestill.runtime.model import load

    folder = make_bundle(tmp_path / "chatty", template=CHAT)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nand\n"))
    assert run(["chat", str(folder), "--system", "be", "--max-new-tokens", "4"]) == 0
    model = load(folder)
    messages, expected = [{"role": "system", "content": "be"}], ""
    for question in ("hi", "and"):
        messages.append({"role": "user", "content": question})
        ids = model.tokenize(model.render_chat(messages), add_special_tokens=False)
        answer = model.generate(ids, max_new_tokens=4).text
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert capsys.readouterr().out == expected


def test_a_missing_extra_is_named_with_its_pip_line() -> None:
    absent = [name for name in EXTRAS["build"] if not name.startswith("pydantic")]  # typer itself needs pydantic
    blocked = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))"
    done = cli("distill", "quickstart", "--out", "x", prelude=blocked)
    assert done.returncode == 2
    assert re.fullmatch(r"edgestill: \w+ is not installed; pip install 'edgestill\[build\]'\n", done.stderr)
    assert describe(ModuleNotFoundError(name="matplotlib.pyplot")) == (
        2,
        ["matplotlib is not installed; pip install 'edgestill[report]'"],
    )
    assert describe(ModuleNotFoundError("No module named 'edgestill.x'", name="edgestill.x"))[0] == 70


def test_every_build_dependency_is_known_as_an_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"[<>=\[ ]", line)[0] for line in extras["build"]}
    modules = {{"pyyaml": "yaml", "optimum-onnx": "optimum"}.get(n, n.replace("-", "_")) for n in names}
    assert modules <= {module for known in EXTRAS.values() for module in known}


PLANTED = """
@app.command("planted")
def planted() -> None:
    {body}
"""


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        (
            "raise ValueError('a\\nb')",
            70,
            "unexpected ValueError: a b; this is a bug: set EDGESTILL_DEBUG=1 for the traceback",
        ),
        ("raise KeyError", 70, "unexpected KeyError; this is a bug: set EDGESTILL_DEBUG=1 for the traceback"),
        ("import edgestill.nothing", 70, "unexpected ModuleNotFoundError: No module named 'edgestill.nothing'; "),
        ("raise KeyboardInterrupt", 130, ""),
        ("print(file=open('/dev/full', 'w'), flush=True)", 2, "the output: no space is left on the device; "),
        (
            "from edgestill.runtime.commands_shared import writing\n"
            "    with writing('my/out'): print(file=open('/dev/full', 'w'), flush=True)",
            2,
            "my/out: no space is left on the device; free some or write elsewhere",
        ),
        ("open('/' + 'x' * 300)", 2, "/" + "x" * 300 + ": the name is too long; use a shorter one"),
    ],
)
def test_whatever_escapes_becomes_one_line(body: str, code: int, line: str) -> None:
    done = cli("planted", prelude=PLANTED.format(body=body))
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(f"edgestill: {line}" if line else "")
    assert done.stderr.count("\n") == (1 if line else 0)


def test_tracebacks_on_request() -> None:
    done = cli("planted", prelude=PLANTED.format(body="raise ValueError('x')"), EDGESTILL_DEBUG="1")
    assert done.returncode == 70
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("traceback\n")


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (BadInput("a: 1\nb: 2"), 2, ["a: 1", "b: 2"]),
        (BundleError("broken"), 2, ["broken"]),
        (MissingPart("no engine", "pip install x"), 2, ["no engine; pip install x"]),
        (
            OSError(errno.EROFS, "r", "/ro/f"),
            2,
            ["/ro/f: the file system is read-only; write elsewhere"],
        ),
        (
            PermissionError(errno.EACCES, "p", "/root/f"),
            2,
            ["/root/f: permission denied; change its mode or owner, or use another place"],
        ),
        (
            MemoryError("Unable to allocate 9 GiB"),
            2,
            ["memory is used up (Unable to allocate 9 GiB); free some, or ask for less"],
        ),
        (
            OSError(errno.ENOSPC, "f", "from", None, "to"),
            2,
            ["to: no space is left on the device; free some or write elsewhere"],
        ),
        (
            OSError(errno.EDQUOT, "q", "f"),
            2,
            ["f: the disk quota is used up; free some space or write elsewhere"],
        ),
    ],
)
def test_what_an_error_becomes(error: Exception, code: int, lines: list[str]) -> None:
    assert describe(error) == (code, lines)


def test_a_reader_that_goes_away_is_no_verdict() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    code = "from edgestill.runtime.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "profiles", "cpu-x86"], stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_newest_report_of_a_build_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    def write(path: Path, name: str, passed: bool, seconds: int) -> None:
        check = Check(name, 2.0, None, 100, 2.0, 1.0, "lower", "", passed, None)
        report = Report("pass" if passed else "fail", (check,), {}, {}, name=name)
        path.parent.mkdir(parents=True)
        path.write_text(report.text(), encoding="utf-8")
        os.utime(path, (seconds, seconds))

    bundle = tmp_path / "cpu-x86"
    _print_stored(bundle)
    assert capsys.readouterr().out == f"\n{bundle}\nno report was written\n"
    write(bundle / "report" / "report.json", "load_ms", True, 1000)
    _print_stored(bundle)
    assert "VERDICT: pass (1 of 1 limits hold)" in capsys.readouterr().out
    write(tmp_path / "cpu-x86.failed" / "report.json", "parity/cached", False, 2000)
    _print_stored(bundle)
    assert "VERDICT: fail (0 of 1 limits hold; failed: parity/cached)" in capsys.readouterr().out


@pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("fail", 1), ("incomplete", 3)])
def test_verdicts_and_their_exit_codes(verdict: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert EXIT_CODES[verdict] == code
    with pytest.raises(typer.Exit) as end:
        finish(verdict)
    assert end.value.exit_code == code
    assert ("edgestill check" in capsys.readouterr().out) == (verdict == "incomplete")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    save_json({"a": 1.5, "é": None}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1.5, "é": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_json({"a": float("nan")}, path)
    assert json.loads(path.read_text(encoding="utf-8"))["a"] == 1.5
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    with pytest.raises(BadInput, match="its folder does not exist"):
        save_json({}, tmp_path / "no" / "out.json")
