"""`import edgestill.runtime` is fast because it loads nothing heavy, and using it loads no training stack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import make_bundle

import edgestill.runtime

TRAINING = {
    "torch",
    "transformers",
    "optimum",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "yaml",
    "pydantic",
    "datasets",
    "accelerate",
}
HEAVY = TRAINING | {"onnxruntime", "tokenizers", "numpy", "jinja2", "safetensors", "typer", "rich"}


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_import_loads_nothing_heavy() -> None:
    assert modules_after("import edgestill.runtime") & HEAVY == set()


@pytest.mark.parametrize("module", ["bundle", "errors", "manifest", "manifest_reader", "metrics"])
def test_reading_a_manifest_needs_no_engine(module: str) -> None:
    assert modules_after(f"import edgestill.runtime.{module}") & HEAVY == set()


def test_the_model_module_loads_no_engine_before_a_bundle_is_opened() -> None:
    assert modules_after("from edgestill.runtime import load") & (HEAVY - {"numpy"}) == set()


def test_opening_a_bundle_for_a_cpu_reads_nothing_of_engines_or_measuring(tmp_path: Path) -> None:
    """What these import would be a tenth of the memory of a small model."""
    code = f"from edgestill.runtime import load; load({str(make_bundle(tmp_path / 'b'))!r})"
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "edgestill.runtime.backends.ort" in loaded
    apart = ("engines.opening", "engines.store", "device", "child", "gpu")
    assert not loaded & {f"edgestill.runtime.{name}" for name in apart}


def test_generating_and_scoring_load_no_training_stack(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b", template="{{ messages[0].content }}")
    loaded = modules_after(
        "from edgestill.runtime import load\n"
        f"m = load({str(folder)!r})\n"
        "m.generate(m.render_chat([{'role': 'user', 'content': 'hi'}]), max_new_tokens=3, temperature=1.0, seed=0)\n"
        "m.score([1, 2, 3])"
    )
    assert {"onnxruntime", "tokenizers", "jinja2"} <= loaded
    assert loaded & TRAINING == set()


def test_every_public_name_is_there_and_others_are_not() -> None:
    for name in edgestill.runtime.__all__:
        assert getattr(edgestill.runtime, name).__name__ == name
    assert set(edgestill.runtime.__all__) <= set(dir(edgestill.runtime))
    with pytest.raises(AttributeError, match="nothing"):
        _ = edgestill.runtime.nothing
