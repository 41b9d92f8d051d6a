"""The quickstart's student in a real engine on a card: answers of the CPU's artifact, integers inside, nothing leaks, fast.

Skipped without a GPU. `pytest -m gpu -n 0` on a machine with one, after `pip install 'edgestill[rtx]'` or `'edgestill[tensorrt]'`.
What is reported rather than asserted is printed as the tests run.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from comparing import compare_500, logits_of, mean_kl
from engines import make_engine_bundle
from quickstart import CPU, CPU_WEIGHTS, Bundle, Say, student_of

from edgestill.runtime.backends import fixed_cache
from edgestill.runtime.backends.ort import OrtBackend
from edgestill.runtime.backends.tensorrt import TensorRTBackend
from edgestill.runtime.bundle import open_bundle
from edgestill.runtime.gate import check_bundle
from edgestill.runtime.gpu import Gpu, open_gpu
from edgestill.runtime.measure import measure_bundle
from edgestill.runtime.model import Model, load
from edgestill.runtime.reference import FOLDER, load_reference
from edgestill.runtime.workload import generate_once

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Pair:
    """One precision: the engine, and the CPU's artifact beside it."""

    weights: str
    folder: Path
    cpu_folder: Path
    engine: Model
    cpu: Model


@pytest.fixture(scope="module", params=["float16", "int4"])
def pair(request: pytest.FixtureRequest, flavour: str, bundle: Bundle) -> Pair:
    weights = request.param
    folder, cpu = bundle(flavour, weights), bundle(CPU, CPU_WEIGHTS[weights])
    return Pair(weights, folder, cpu, load(folder), load(cpu))


@pytest.mark.parametrize("path", ["prefill", "cached"])
def test_answers_are_those_of_the_cpus_artifact(path: str, pair: Pair, say: Say) -> None:
    windows = load_reference(pair.folder / FOLDER).token_ids
    kl = mean_kl(pair.cpu, pair.engine, windows, path)  # type: ignore[arg-type]
    say(f"KL of the {pair.weights} engine from the CPU's artifact, {path}, {windows.size} tokens", f"{kl:.2e} nats")
    assert kl <= 1e-3


def test_the_verdicts_are_the_same(pair: Pair) -> None:
    here, there = (check_bundle(folder, keep=False) for folder in (pair.folder, pair.cpu_folder))
    limited = [{row.name: row.passed for row in report.checks if row.limit is not None} for report in (here, there)]
    assert limited[0] == limited[1] and len(limited[0]) >= 7
    assert here.verdict == there.verdict
    assert here.environment["engine"] == open_bundle(pair.folder).manifest.engine


def test_500_greedy_tokens_agree_but_for_ties(pair: Pair, say: Say) -> None:
    compare_500(pair.engine, same_graph(pair.folder), pair.folder, say)


def same_graph(folder: Path) -> Model:
    """The engine's own graph in onnxruntime on the CPU."""
    opened = open_bundle(folder)
    return Model(opened, OrtBackend(opened.path("model.onnx"), opened.manifest.model, opened.manifest.graph))


def test_steps_are_recorded_anew_where_more_is_attended(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 16 tokens instead of 128, so that a short text crosses it; twice, so that the second finds what the first left."""
    prompt = np.random.default_rng(1).integers(1, 300, 10).tolist()
    text = np.array([[*prompt, *pair.engine.generate(prompt, max_new_tokens=100, temperature=0.0).token_ids]])
    monkeypatch.setattr(fixed_cache, "ATTENDED_STEP", 16)
    for _ in range(2):
        ours, theirs = (logits_of(model, text, "cached") for model in (pair.engine, same_graph(pair.folder)))
        assert np.abs(ours - theirs).max() <= 0.05 * np.abs(theirs).max()


def used(gpu: Gpu) -> float:
    """Device memory of this process; all that the card has in use where the driver hides it."""
    gc.collect()
    found = gpu.process_mib()
    found = gpu.used_mib() if found is None else found
    if found is None:
        pytest.skip("this card says nothing of its memory")
    return found


def test_no_memory_grows_over_10_000_tokens(pair: Pair, say: Say) -> None:
    backend, gpu = pair.engine.backend, open_gpu()
    assert isinstance(backend, TensorRTBackend)
    if gpu is None:
        pytest.skip("needs nvidia-ml-py")
    assert backend.plan.capacity > 3 * 128, "the decode step is captured for several numbers of attended slots"
    prompt, new = np.array([[1, 2, 3]]), backend.plan.capacity - 3
    generate_once(backend, prompt, new)  # every shape has run once
    before, tokens = used(gpu), 0
    while tokens < 10_000:
        generate_once(backend, prompt, new)
        tokens += new
    after = used(gpu)
    say(f"device memory before and after {tokens} tokens, {pair.weights}", f"{before:.1f}, {after:.1f} MiB")
    assert after <= before


def test_the_inspector_shows_integer_weights(pair: Pair) -> None:
    backend = pair.engine.backend
    assert isinstance(backend, TensorRTBackend)
    lines = backend.inspect()
    assert lines
    if pair.weights == "int4":
        assert any("int4" in line.lower() for line in lines), lines[:5]


def test_decoding_is_no_slower_than_torch_with_cuda_graphs(pair: Pair, quickstart: Path, say: Say) -> None:
    if pair.weights != "float16":
        pytest.skip("torch has the student in float16")
    torch_speed = pytest.importorskip("edgestill.compress.torch_speed")
    if not torch_speed.on_cuda():
        pytest.skip("needs a torch that has CUDA")
    counts = {"prompt_tokens": 128, "new_tokens": 128, "threads": 2}
    (theirs,) = torch_speed.measure_apart([(student_of(quickstart), "float16")], **counts, compiled=True)
    found = measure_bundle(pair.folder, **counts, batch_size=1)
    ours = found.estimates["decode_tokens_per_s"].value
    assert ours is not None, found.estimates["decode_tokens_per_s"].reason
    say(
        "decode at batch 1, tokens/s: engine, torch.compile with CUDA graphs",
        f"{ours:.0f}, {theirs.decode_tokens_per_s:.0f}",
    )
    fraction = found.estimates["bandwidth_fraction"]
    say(
        "bandwidth fraction of the quickstart's student",
        fraction.value if fraction.value is not None else fraction.reason,
    )
    say("the card while it decoded", found.gpu)
    assert ours / theirs.decode_tokens_per_s >= 1.0


def test_two_engines_in_one_process(pair: Pair, flavour: str, tmp_path: Path) -> None:
    other = load(make_engine_bundle(tmp_path / "other", "gpt2", "float16", engine=flavour))
    first = pair.engine.generate([5, 6, 7], max_new_tokens=20, temperature=0.0).token_ids
    other.generate([5, 6, 7], max_new_tokens=20, temperature=0.0)
    assert pair.engine.generate([5, 6, 7], max_new_tokens=20, temperature=0.0).token_ids == first
