"""The walls of the house, each seen to hold on this tree and to fall on a planted violation."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HOUSE = ("runtime", "profiles", "compress", "export")
LINES_OF_A_FILE = 350
LINES_OF_A_FUNCTION = 60


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the packages as edgestill/..., with pyproject.toml beside it; returns the folder of both."""
    for package in HOUSE:
        shutil.copytree(ROOT / package, tmp_path / "edgestill" / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def tool(name: str, *arguments: str, tree: Path) -> tuple[int, str]:
    """Exit code and output of a tool of the [test] extra, run in the copied tree."""
    program = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert program is not None, f"{name} is not installed; pip install -e '.[test]'"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tree), "MYPYPATH": str(tree), "COLUMNS": "200"}
    done = subprocess.run(
        [program, *arguments], cwd=tree, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout + done.stderr


def plant(tree: Path, package: str, text: str) -> Path:
    path = tree / "edgestill" / package / "planted.py"
    path.write_text(f'"""Planted."""\n\nfrom __future__ import annotations\n\n{text}\n', encoding="utf-8")
    return path


def test_ruff_passes_here_and_fails_on_what_is_planted(tree: Path) -> None:
    assert tool("ruff", "check", "--no-cache", ".", tree=tree) == (0, "All checks passed!\n")
    for package, text, rule in (
        *(("export", f"import {name}\n\n__all__ = ['{name}']", "TID251") for name in HOUSE),
        ("compress", "import pickle\n\n__all__ = ['pickle']", "TID251"),
        ("runtime", "from runtime.errors import BadInput\n\n__all__ = ['BadInput']", "TID251"),
        ("export", "print('hello')", "T201"),
        ("runtime", "try:\n    value = 1\nexcept Exception:\n    value = 2", "BLE001"),
    ):
        path = plant(tree, package, text)
        code, output = tool("ruff", "check", "--no-cache", "--output-format", "concise", ".", tree=tree)
        assert code == 1, text
        assert re.search(rf"edgestill/{package}/planted\.py:\d+:\d+: {rule} ", output), output
        path.unlink()


FLOORS = "floors of the house"
LEAN = "the runtime needs no training stack"
OPTIMUM = "only export/onnx_export.py knows Optimum"


def test_import_rules_hold_here_and_fall_on_what_is_planted(tree: Path) -> None:
    code, output = tool("lint-imports", "--no-cache", "--no-logo", tree=tree)
    assert (code, broken(output)) == (0, []), output
    assert output.count(" KEPT") == 3
    for package, text, contracts in (
        ("runtime", "import torch", [LEAN]),
        ("runtime", "def later() -> None:\n    import yaml", [LEAN]),
        ("runtime", "from edgestill.export import build", [FLOORS, LEAN, OPTIMUM]),
        ("runtime", "import edgestill.profiles.nearest", [FLOORS]),
        ("profiles", "from edgestill.compress import corpus", [FLOORS]),
        ("compress", "def later() -> None:\n    from optimum.exporters import onnx", [OPTIMUM]),
        ("profiles", "import onnx", [OPTIMUM]),
    ):
        path = plant(tree, package, text)
        code, output = tool("lint-imports", "--no-cache", "--no-logo", tree=tree)
        assert (code, broken(output)) == (1, contracts), output
        assert f"edgestill.{package}.planted" in output
        path.unlink()


def broken(output: str) -> list[str]:
    """Names of the broken contracts, up to a colon."""
    return [line.removesuffix(" BROKEN").partition(":")[0] for line in output.splitlines() if line.endswith(" BROKEN")]


def test_mypy_fails_on_what_is_planted(tree: Path) -> None:
    """That the whole tree passes is left to .ci/run; here a file without fault stands for it."""
    plant(tree, "runtime", "def untyped(value):\n    return value")
    (tree / "edgestill" / "runtime" / "wrong.py").write_text('COUNT: int = "three"\n')
    files = [f"edgestill/runtime/{name}.py" for name in ("planted", "wrong", "metrics", "errors")]
    arguments = ["--config-file", "pyproject.toml", "--explicit-package-bases", "--namespace-packages"]
    code, output = tool("mypy", *arguments, "--cache-dir", str(tree / "cache"), *files, tree=tree)
    assert code == 1
    errors = re.findall(r"^(\S+?):\d+: error: .*\[([\w-]+)\]$", output, re.MULTILINE)
    assert sorted(errors) == [
        ("edgestill/runtime/planted.py", "no-untyped-def"),
        ("edgestill/runtime/wrong.py", "assignment"),
    ], output


def test_no_folder_shadows_the_packages() -> None:
    assert not (ROOT / "edgestill").exists()


def test_every_folder_with_code_is_listed(settings: dict[str, Any]) -> None:
    folders = {path.parent.relative_to(ROOT) for package in HOUSE for path in (ROOT / package).rglob("*.py")}
    setuptools = settings["tool"]["setuptools"]
    assert {".".join(("edgestill", *folder.parts)) for folder in folders} == set(setuptools["packages"])
    assert setuptools["package-dir"] == {f"edgestill.{package}": package for package in HOUSE}
    assert set(settings["tool"]["mypy"]["packages"]) == {f"edgestill.{package}" for package in HOUSE}


def sources() -> Iterator[Path]:
    for package in HOUSE:
        yield from sorted((ROOT / package).rglob("*.py"))


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {name: lines for name, lines in lengths.items() if lines > LINES_OF_A_FILE} == {}


def test_no_function_is_long() -> None:
    long = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LINES_OF_A_FUNCTION:
                    long[f"{path.relative_to(ROOT)}: {node.name}"] = lines
    assert long == {}


def test_the_changelog_begins_with_this_version(settings: dict[str, Any]) -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[?(\d+\.\d+\.\d+)\]?", text, re.MULTILINE)
    assert headings[0] == settings["project"]["version"]


def test_python_is_what_the_project_says(settings: dict[str, Any]) -> None:
    """Else a green run here says nothing about the oldest Python that is promised."""
    oldest = tuple(map(int, re.findall(r"\d+", settings["project"]["requires-python"])))
    assert sys.version_info[:2] >= oldest
    assert settings["tool"]["ruff"]["target-version"] == f"py{oldest[0]}{oldest[1]}"
    assert settings["tool"]["mypy"]["python_version"] == f"{oldest[0]}.{oldest[1]}"
