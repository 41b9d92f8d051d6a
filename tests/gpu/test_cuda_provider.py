"""The quickstart's student in onnxruntime's CUDA provider: the second way to a GPU gives the CPU's answers too.

Skipped without a GPU, and where onnxruntime has no such provider (`pip uninstall onnxruntime`, `pip install 'edgestill[cuda]'`).
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
from comparing import compare_500, mean_kl
from quickstart import CPU, CPU_WEIGHTS, Bundle, Say

from edgestill.runtime.backends.ort import OrtBackend
from edgestill.runtime.bundle import open_bundle
from edgestill.runtime.engines.cuda import Card
from edgestill.runtime.gate import check_bundle
from edgestill.runtime.model import Model, load
from edgestill.runtime.reference import FOLDER, load_reference

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]
ENGINE = "onnxruntime-cuda"


@pytest.fixture(scope="module", params=["float16", "int4"])
def folders(request: pytest.FixtureRequest, card: Card, bundle: Bundle) -> tuple[Path, Path]:
    """(for the provider, for the CPU)."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip(f"onnxruntime here has no CUDA provider, though {card.name} is here")
    return bundle(ENGINE, request.param), bundle(CPU, CPU_WEIGHTS[request.param])


@pytest.mark.parametrize("path", ["prefill", "cached"])
def test_answers_are_those_of_the_cpus_artifact(path: str, folders: tuple[Path, Path], say: Say) -> None:
    windows = load_reference(folders[0] / FOLDER).token_ids
    kl = mean_kl(load(folders[1]), load(folders[0]), windows, path)  # type: ignore[arg-type]
    say(f"KL of {ENGINE} from the CPU's artifact, {path}, {windows.size} tokens", f"{kl:.2e} nats")
    assert kl <= 1e-3


def test_500_greedy_tokens_agree_but_for_ties(folders: tuple[Path, Path], say: Say) -> None:
    opened = open_bundle(folders[0])
    same = Model(opened, OrtBackend(opened.path("model.onnx"), opened.manifest.model, opened.manifest.graph))
    compare_500(load(folders[0]), same, folders[0], say)


def test_it_is_judged_and_names_its_engine(folders: tuple[Path, Path]) -> None:
    report = check_bundle(folders[0], keep=False)
    rows = {row.name: row for row in report.checks}
    assert report.verdict in ("pass", "fail") and report.environment["engine"] == ENGINE
    assert rows["decode_tokens_per_s"].value and rows["peak_device_mib"].value
