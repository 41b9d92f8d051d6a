"""A real engine on a real card: the same tokens and answers as onnxruntime on the same graph, nothing leaks, integers inside.

Skipped without a GPU. `pytest -m gpu` on a machine with one, after `pip install 'edgestill[rtx]'` or `'edgestill[tensorrt]'`.
"""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from engines import make_engine_bundle

from edgestill.runtime.backends import fixed_cache
from edgestill.runtime.backends.ort import OrtBackend
from edgestill.runtime.backends.tensorrt import TensorRTBackend
from edgestill.runtime.bundle import open_bundle
from edgestill.runtime.engines.capabilities import PRECISIONS
from edgestill.runtime.engines.cuda import Cuda
from edgestill.runtime.engines.flavour import FLAVOURS, open_library
from edgestill.runtime.errors import MissingPart
from edgestill.runtime.gpu import open_gpu
from edgestill.runtime.model import Model, load

pytestmark = pytest.mark.gpu
TIE = 0.05
"""Nats between the two likeliest tokens below which float16 may choose either."""


def flavour_here() -> str:
    """The flavour that is installed and knows the card at hand; skips the test without one."""
    try:
        card = Cuda().card()
    except MissingPart as missing:
        pytest.skip(f"needs an NVIDIA GPU ({missing})")
    for name in FLAVOURS:
        try:
            open_library(name)
        except MissingPart:
            continue
        if card.compute_capability in PRECISIONS[name]:
            return name
    pytest.skip(f"no TensorRT here that builds for compute capability {card.compute_capability}")


@pytest.fixture(scope="module", params=["float16", "int4"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """(engine, onnxruntime on the same graph)."""
    flavour = flavour_here()
    folder = tmp_path_factory.mktemp("gpu") / "bundle"
    make_engine_bundle(folder, "llama", request.param, engine=flavour)
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    cpu = OrtBackend(bundle.path("model.onnx"), manifest.model, manifest.graph)
    return load(folder), Model(bundle, cpu)


def test_answers_agree(models: tuple[Model, Model]) -> None:
    ids = np.random.default_rng(0).integers(0, 300, (2, 96))
    for path in ("prefill", "cached"):
        ours, theirs = (
            np.concatenate([logits.copy() for _, logits in model.forward_windows(ids, path)], axis=1)  # type: ignore[arg-type]
            for model in models
        )
        log_p, log_q = (
            x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
            for x in (theirs, ours)
        )
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        assert kl.mean() <= 1e-3, path


def test_greedy_tokens_agree_but_for_ties(models: tuple[Model, Model]) -> None:
    engine, cpu = models
    compared = 0
    for seed in range(8):
        prompt = np.random.default_rng(seed).integers(1, 300, 40).tolist()
        ours = engine.generate(prompt, max_new_tokens=64, temperature=0.0).token_ids
        text = [*prompt, *ours]
        logits = np.concatenate([x.copy() for _, x in cpu.forward_windows(np.array([text[:-1]]))], axis=1)[0]
        for i, token in enumerate(ours):
            row = logits[len(prompt) - 1 + i]
            assert row.max() - row[token] <= TIE, "another token, and no tie"
            compared += 1
    assert compared >= 500


def test_steps_are_recorded_anew_where_more_is_attended(
    models: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 16 tokens instead of 128, so that a short text crosses it; twice, so that the second finds what the first left."""
    prompt = np.random.default_rng(1).integers(1, 300, 10).tolist()
    wanted = models[0].generate(prompt, max_new_tokens=100, temperature=0.0).token_ids
    monkeypatch.setattr(fixed_cache, "ATTENDED_STEP", 16)
    for _ in range(2):
        logits = [
            np.concatenate(
                [x.copy() for _, x in model.forward_windows(np.array([[*prompt, *wanted]]), "cached")], axis=1
            )
            for model in models
        ]
        assert np.abs(logits[0] - logits[1]).max() <= 0.05 * np.abs(logits[1]).max()


def test_onnxruntime_on_cuda_agrees(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs pip install 'edgestill[cuda]'")
    bundle = open_bundle(make_engine_bundle(tmp_path / "bundle", "llama", "float16", engine="onnxruntime-cuda"))
    cpu = OrtBackend(bundle.path("model.onnx"), bundle.manifest.model, bundle.manifest.graph)
    ours = load(bundle.folder)
    print(ours.backend.session["cuda_graph"])
    ids = np.random.default_rng(0).integers(0, 300, (2, 96))
    for path in ("prefill", "cached"):
        got, wanted = (
            np.concatenate([x.copy() for _, x in model.forward_windows(ids, path)], axis=1)  # type: ignore[arg-type]
            for model in (ours, Model(bundle, cpu))
        )
        assert np.abs(got - wanted).max() <= 0.05 * np.abs(wanted).max()


def test_no_memory_grows(models: tuple[Model, Model]) -> None:
    engine, gpu = models[0], open_gpu()
    if gpu is None:
        pytest.skip("needs nvidia-ml-py")
    used = []
    for _ in range(2):
        for _ in range(50):
            engine.generate([1, 2, 3], max_new_tokens=100, temperature=0.0)
        gc.collect()
        used.append(gpu.used_mib())
    assert used[1] <= used[0] + 1, used  # type: ignore[operator]


def test_the_engine_holds_integers(models: tuple[Model, Model]) -> None:
    backend = models[0].backend
    assert isinstance(backend, TensorRTBackend)
    lines = backend.inspect()
    assert lines
    if backend.plan.precision == "int4":
        assert any("int4" in line.lower() for line in lines)


def test_two_engines_in_one_process(models: tuple[Model, Model], tmp_path: Path) -> None:
    other = load(make_engine_bundle(tmp_path / "other", "gpt2", "float16", engine=flavour_here()))
    first = models[0].generate([5, 6, 7], max_new_tokens=20, temperature=0.0).token_ids
    other.generate([5, 6, 7], max_new_tokens=20, temperature=0.0)
    assert models[0].generate([5, 6, 7], max_new_tokens=20, temperature=0.0).token_ids == first
