"""The gate: limits on one-sided bounds, null never passes, every row independent of the code it judges."""

from __future__ import annotations

import ctypes
import dataclasses
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import PROFILE, checkpoint, make_bundle

from edgestill.runtime.bundle import read_manifest
from edgestill.runtime.errors import BadInput, BundleError
from edgestill.runtime.gate import Report, check_bundle, judge, wrong_machine
from edgestill.runtime.manifest import manifest_to_json
from edgestill.runtime.progress import Progress
from edgestill.runtime.reference import FusedAnswers, Reference, save_parity, save_reference
from edgestill.runtime.statistics import Estimate

WINDOWS, LENGTH, K = 6, 12, 5


def estimate(value: float, lower: float, upper: float) -> Estimate:
    return Estimate(value, (upper - lower) / 3.3, 100, lower, upper)


@pytest.mark.parametrize(
    ("name", "limit", "verdict"),
    [
        ("perplexity", 11.5, "pass"),  # value 10, upper bound 11
        ("perplexity", 10.5, "fail"),  # the value holds, its bound does not
        ("decode_tokens_per_s", 8.5, "pass"),  # lower bound 9
        ("decode_tokens_per_s", 9.5, "fail"),
        ("perplexity/verse", 10.5, "fail"),
    ],
)
def test_a_limit_is_tested_on_the_bound_of_its_direction(name: str, limit: float, verdict: str) -> None:
    found, (row,) = judge({name: estimate(10, 9, 11)}, {name: limit})
    assert (found, row.passed, row.value) == (verdict, verdict == "pass", 10)


def test_a_value_that_is_missing_never_passes_and_a_failure_outweighs_it() -> None:
    missing = {"peak_rss_mib": Estimate.missing("no such file")}
    verdict, (row,) = judge(missing, {"peak_rss_mib": 1e9})
    assert (verdict, row.passed, row.reason) == ("incomplete", None, "no such file")
    verdict, _ = judge(missing | {"perplexity": estimate(10, 9, 11)}, {"peak_rss_mib": 1e9, "perplexity": 1})
    assert verdict == "fail"
    assert judge(missing, {})[0] == "pass"
    assert judge({}, {"load_ms": 5})[0] == "incomplete"


def test_names_that_are_no_metric_are_refused() -> None:
    with pytest.raises(BadInput, match="perplexitty: no such metric"):
        judge({}, {"perplexitty": 1})
    with pytest.raises(BadInput, match="perplexity/: no such metric"):
        judge({"perplexity/": estimate(10, 9, 11)}, {})


def test_a_value_without_a_bound_is_not_tested_and_one_that_is_not_finite_fails() -> None:
    unbounded = Estimate(10.0, None, 3, reason="3 samples are too few")
    verdict, (row,) = judge({"load_ms": unbounded}, {"load_ms": 1e9})
    assert (verdict, row.passed, row.value, row.reason) == ("incomplete", None, 10.0, "3 samples are too few")
    verdict, (row,) = judge({"perplexity": Estimate.not_finite(1, 5)}, {"perplexity": 1e9})
    assert (verdict, row.passed, row.value) == ("fail", False, None)


def test_a_report_of_another_version_is_refused() -> None:
    good = Report("pass", judge({"load_ms": estimate(2, 1, 3)}, {})[1], {}, {}).to_json()
    assert Report.from_json(good).to_json() == good
    for wrong in ({**good, "surprise": 1}, {k: v for k, v in good.items() if k != "checks"}):
        with pytest.raises(BadInput, match="edgestill check"):
            Report.from_json(wrong)


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """Held-out windows, their logits by torch, and a made-up fused target over K tokens and a tail."""
    import torch
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32).eval()
    ids = rng.integers(1, 300, (WINDOWS, LENGTH)).astype(np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    target = rng.normal(size=(WINDOWS * (LENGTH - 1), logits.shape[-1])) * 2
    target -= np.log(np.exp(target).sum(1, keepdims=True))
    order = np.argsort(-target, axis=1)[:, :K]
    top = np.take_along_axis(target, order, 1)
    return {"ids": ids, "logits": logits, "target": target, "top_ids": order.astype(np.int32), "top": top}


def reference(answers: dict[str, Any], *, teachers: bool = True) -> Reference:
    n = WINDOWS * (LENGTH - 1)
    labels = answers["ids"][:, 1:].reshape(-1)
    of_label = answers["target"][np.arange(n), labels].astype(np.float32)
    fused = FusedAnswers(
        answers["top_ids"],
        answers["top"].astype(np.float32),
        np.log1p(-np.exp(answers["top"]).sum(1)).astype(np.float32),
        np.zeros(n, np.float32),
        of_label,
    )
    return Reference(
        token_ids=answers["ids"],
        scored=np.ones(n, np.uint8),
        domain=np.array([0, 0, 0, 1, 1, 1], np.int16),
        block=np.arange(WINDOWS, dtype=np.int32),
        student_label_logp=label_logp(answers).astype(np.float32),
        domains=("verse", "prose"),
        teacher_names=("one",) if teachers else (),
        teacher_label_logp=of_label[None] if teachers else np.zeros((0, 0), np.float32),
        fused=fused if teachers else None,
    )


def log_softmax(answers: dict[str, Any]) -> Any:
    z = answers["logits"][:, :-1].reshape(-1, answers["logits"].shape[-1]).astype(np.float64)
    return z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)


def label_logp(answers: dict[str, Any]) -> Any:
    return log_softmax(answers)[np.arange(WINDOWS * (LENGTH - 1)), answers["ids"][:, 1:].reshape(-1)]


def bundle_with(folder: Path, answers: dict[str, Any], *, teachers: bool = True, **words: Any) -> Path:
    save_reference(reference(answers, teachers=teachers), folder / "reference")
    positions = np.array([[0, 3], [2, 7]], np.int32)
    save_parity(positions, answers["logits"][positions[:, 0], positions[:, 1]], folder / "reference")
    files = {f"reference/{p.name}": p.read_bytes() for p in (folder / "reference").iterdir()}
    shutil.rmtree(folder / "reference")
    return make_bundle(folder / "bundle", extra_files=files, **words)


def rows(report: Report) -> dict[str, Any]:
    return {check.name: check for check in report.checks}


def test_quality_equals_an_independent_computation(tmp_path: Path, answers: dict[str, Any]) -> None:
    report = check_bundle(bundle_with(tmp_path, answers, limits={"parity_max_abs_logit": 1e-4}), keep=False)
    found, log_q = rows(report), log_softmax(answers)
    mine, fused = label_logp(answers), reference(answers).fused
    assert fused is not None
    assert found["perplexity"].value == pytest.approx(np.exp(-mine.mean()), rel=1e-5)
    assert found["perplexity/prose"].value == pytest.approx(np.exp(-mine[33:].mean()), rel=1e-5)
    ratio = np.exp((fused.label_logp - mine).mean())
    assert found["perplexity_ratio_to_teacher"].value == pytest.approx(ratio, rel=1e-5)
    inside = np.take_along_axis(log_q, answers["top_ids"], 1)
    tail_q = np.log(1 - np.exp(inside).sum(1))
    kl = (np.exp(answers["top"]) * (answers["top"] - inside)).sum(1) + np.exp(fused.tail_logp) * (
        fused.tail_logp - tail_q
    )
    assert found["kl_nats_per_token"].value == pytest.approx(kl.mean(), rel=1e-5)
    assert found["top1_agreement"].value == pytest.approx((log_q.argmax(1) == answers["top_ids"][:, 0]).mean())
    assert found["quantization_perplexity_ratio"].value == pytest.approx(1, abs=1e-5)
    assert found["parity_max_abs_logit"].value < 1e-4
    assert (report.verdict, found["perplexity"].n) == ("pass", WINDOWS * (LENGTH - 1))


def test_without_teachers_their_rows_are_null(tmp_path: Path, answers: dict[str, Any]) -> None:
    found = rows(check_bundle(bundle_with(tmp_path, answers, teachers=False), keep=False))
    for name in ("perplexity_ratio_to_teacher", "kl_nats_per_token", "top1_agreement"):
        assert (found[name].value, found[name].reason) == (None, "no teacher")
    assert found["perplexity"].value is not None


def test_reports_are_kept_in_local_and_read_back(tmp_path: Path, answers: dict[str, Any]) -> None:
    bundle = bundle_with(tmp_path, answers, limits={"peak_rss_mib": 1.0})
    report = check_bundle(bundle)
    assert report.verdict == "fail"
    (kept,) = (bundle / "local").glob("check-*.json")
    assert Report.from_json(json.loads(kept.read_text())).to_json() == report.to_json()


def test_another_architecture_leaves_resources_unmeasured(tmp_path: Path, answers: dict[str, Any]) -> None:
    other = "aarch64" if platform.machine() == "x86_64" else "x86_64"
    profile = {**PROFILE, "device": {**PROFILE["device"], "arch": other}}
    report = check_bundle(bundle_with(tmp_path, answers, profile=profile, limits={"peak_rss_mib": 1e6}), keep=False)
    found = rows(report)
    assert report.verdict == "incomplete"
    assert f"built for {other}" in str(found["peak_rss_mib"].reason)
    assert "run `edgestill check` on the target" in str(found["peak_rss_mib"].reason)
    assert found["bundle_mib"].value is not None
    assert found["perplexity"].value is not None


@pytest.mark.parametrize(("here", "target"), [("x86_64", "aarch64"), ("aarch64", "x86_64")])
def test_the_other_machine_is_named_whichever_it_is(here: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: here)
    assert wrong_machine({"arch": here, "engine": "onnxruntime-cpu"}) is None
    assert wrong_machine({"arch": target, "engine": "onnxruntime-cpu"}) == (
        f"built for {target}, this machine is {here}: run `edgestill check` on the target"
    )
    assert "engine tensorrt" in str(wrong_machine({"arch": here, "engine": "tensorrt"}))


def test_a_workload_longer_than_the_model_is_a_reason_not_a_crash(tmp_path: Path, answers: dict[str, Any]) -> None:
    profile = {**PROFILE, "workload": {"prompt_tokens": 120, "new_tokens": 9, "batch_size": 1}}
    report = check_bundle(bundle_with(tmp_path, answers, profile=profile, limits={"load_ms": 1e9}), keep=False)
    found = rows(report)["load_ms"]
    assert (report.verdict, found.value) == ("incomplete", None)
    assert "129 exceed the model's 128" in str(found.reason)


@contextmanager
def unprivileged() -> Iterator[None]:
    """This thread without the capability by which root ignores the modes of folders (capget(2): header, then 2 x 3 words)."""
    if os.geteuid() != 0:
        yield
        return
    libc, words = ctypes.CDLL(None, use_errno=True), ctypes.c_uint32 * 6
    header, had = (ctypes.c_uint32 * 2)(0x20080522, 0), words()
    assert libc.capget(header, had) == 0
    assert libc.capset(header, words(had[0] & ~0b10, *had[1:])) == 0  # effective, without CAP_DAC_OVERRIDE
    try:
        yield
    finally:
        assert libc.capset(header, had) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_read_only_bundle_is_checked_but_its_report_is_not_kept(tmp_path: Path, answers: dict[str, Any]) -> None:
    said = io.StringIO()
    bundle = bundle_with(tmp_path, answers, limits={"perplexity": 1e6})
    bundle.chmod(0o555)
    with unprivileged():
        report = check_bundle(bundle, Progress(said))
    bundle.chmod(0o755)
    assert report.verdict == "pass"
    assert "report not kept" in said.getvalue()
    assert not (bundle / "local").exists()


def test_a_damaged_bundle_is_not_measured(tmp_path: Path, answers: dict[str, Any]) -> None:
    bundle = bundle_with(tmp_path, answers)
    (bundle / "model.onnx").write_bytes(b"x" + (bundle / "model.onnx").read_bytes()[1:])
    with pytest.raises(BundleError, match=r"model\.onnx"):
        check_bundle(bundle)


def test_a_graph_that_cannot_run_gives_rows_without_values_and_their_reason(
    tmp_path: Path, answers: dict[str, Any]
) -> None:
    """The manifest declares what is there, so the bundle is whole; the measuring processes fail on the graph."""
    bundle = bundle_with(tmp_path, answers, limits={"perplexity": 1e6})
    manifest = read_manifest(bundle)
    model = dataclasses.replace(manifest.model, n_layers=manifest.model.n_layers + 1)
    (bundle / "manifest.json").write_text(manifest_to_json(dataclasses.replace(manifest, model=model)))
    report = check_bundle(bundle, keep=False)
    found = rows(report)
    assert report.verdict == "incomplete"
    assert found["perplexity"].value is None
    assert found["perplexity"].reason
    assert found["first_token_ms_p50"].value is None
