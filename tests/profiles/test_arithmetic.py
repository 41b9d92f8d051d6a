"""Predictions by hand, and each refusal with its arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import write_model

from edgestill.profiles.arithmetic import (
    ModelSize,
    precision_problem,
    predict,
    refuse_impossible,
)
from edgestill.profiles.load import load_profile, packaged
from edgestill.profiles.schema import Profile
from edgestill.runtime.errors import BadInput

SMOL = ModelSize(
    parameters=134_515_008,
    embedding_parameters=28_311_552,
    head_tied=True,
    n_layers=30,
    n_kv_heads=3,
    head_size=64,
    hidden_size=576,
    vocab_size=49_152,
    max_tokens=2048,
)
"""SmolLM-135M: 2 x 30 layers x 3 heads x 64 x 4 bytes = 46,080 bytes of float32 cache per token."""

HAND = ModelSize(
    parameters=3 << 20,
    embedding_parameters=1 << 20,
    head_tied=False,
    n_layers=2,
    n_kv_heads=1,
    head_size=32,
    hidden_size=64,
    vocab_size=1 << 14,
    max_tokens=256,
)


def profile(weights: str = "int4", *, gpu: str | None = None, **sections: dict[str, Any]) -> Profile:
    """A CPU (or, with a compute capability, a TensorRT) profile of 20 GB/s and 16 MiB of cache."""
    device: dict[str, Any] = {"arch": "x86_64", "engine": "onnxruntime-cpu" if gpu is None else "tensorrt"}
    device |= {"memory_mib": 8192, "memory_bandwidth_gb_per_s": 20.0, "last_level_cache_mib": 16.0}
    device |= {"compute_capability": gpu} | sections.pop("device", {})
    precision = {"weights": weights} | sections.pop("precision", {})
    return Profile.model_validate({"format": 1, "device": device, "precision": precision, **sections})


def refusal(size: ModelSize, given: Profile) -> list[str]:
    with pytest.raises(BadInput) as caught:
        refuse_impossible(size, given, "mine")
    return str(caught.value).split("\n")


def test_smollm_by_hand() -> None:
    found = predict(SMOL, profile())  # 128 + 64 tokens
    weights = 134_515_008 * 5 / 8  # 4 bits and a 32nd of a float32 scale
    step = weights + 46_080 * (128 + 32)
    assert found.weight_mib == found.graph_mib == weights / 2**20
    assert found.cache_mib == 46_080 * 192 / 2**20
    assert found.bytes_per_token == step
    assert found.decode_tokens_per_s_bound == pytest.approx(20e9 / step, rel=1e-12)
    assert found.peak_rss_mib_floor == pytest.approx((weights + 46_080 * 192) / 2**20, rel=1e-12)


@pytest.mark.parametrize(
    ("weights", "gpu", "graph_mib", "weight_mib", "cache_bytes_per_value"),
    [
        ("float32", None, 12.0, 8.0, 4),
        ("int8", None, 3.375, 2.25, 4),  # 9 bits: 8 and a 32nd of a float32
        ("int4", None, 1.875, 1.25, 4),
        ("float16", "8.7", 6.0, 4.0, 2),
        ("bfloat16", "8.0", 6.0, 4.0, 2),
        ("fp8", "8.9", 3.09375, 2.0625, 2),  # 8.25 bits: 8 and a 64th of a float16
        ("int4", "8.9", 1.6875, 1.125, 2),  # 4.5 bits: 4 and a 32nd of a float16
        ("int8", "8.9", 3.09375, 2.0625, 2),  # one scale per output channel
        ("float32", "8.9", 12.0, 8.0, 4),
    ],
)
def test_stored_bits_of_an_untied_model(
    weights: str, gpu: str | None, graph_mib: float, weight_mib: float, cache_bytes_per_value: int
) -> None:
    found = predict(HAND, profile(weights, gpu=gpu))
    assert found.graph_mib == graph_mib
    assert found.weight_mib == weight_mib  # the table of 1 Mi weights is looked up, not read
    held = 192 if gpu is None else 256  # an engine's cache has the model's length from the start
    assert found.cache_mib == 2 * 2 * 32 * cache_bytes_per_value * held / 2**20
    assert found.decode_tokens_per_s_bound is None  # below 16 MiB


def test_blocks_and_zero_points() -> None:
    assert predict(HAND, profile(precision={"block_size": 128})).graph_mib == 3 * 4.25 / 8
    assert predict(HAND, profile(precision={"symmetric": False})).graph_mib == 3 * 5.125 / 8


def test_a_batch_shares_the_weights_and_not_the_cache() -> None:
    one, four = (predict(SMOL, profile(workload={"batch_size": n})) for n in (1, 4))
    weights = 134_515_008 * 5 / 8
    assert four.bytes_per_token == pytest.approx(weights / 4 + 46_080 * 160, rel=1e-12)
    assert four.cache_mib == 4 * one.cache_mib
    assert one.decode_tokens_per_s_bound is not None and four.decode_tokens_per_s_bound is not None
    assert 3 < four.decode_tokens_per_s_bound / one.decode_tokens_per_s_bound < 4


def test_what_is_possible_is_not_refused() -> None:
    budget = {"inter_token_ms_p95": 4.6, "decode_tokens_per_s": 218.0, "bundle_mib": 81.0, "peak_rss_mib": 89.0}
    refuse_impossible(SMOL, profile(budget=budget), "mine")


def test_faster_than_the_bandwidth() -> None:
    budget = {"inter_token_ms_p95": 4.5, "decode_tokens_per_s": 219.0, "first_token_ms_p50": 4.0}
    why = "(80.2 MiB of weights do not fit in the 16 MiB last-level cache)"
    or_else = "it, or use a smaller student or fewer bits"
    assert refusal(SMOL, profile(budget=budget)) == [
        "profile mine: budget.inter_token_ms_p95 4.5 ms: 91.4 MB read per step / 20 GB/s = 4.57 ms "
        f"{why}; raise {or_else}",
        f"profile mine: budget.decode_tokens_per_s 219: 20 GB/s / 91.4 MB read per token = 218.7 tokens/s {why}; lower {or_else}",
        f"profile mine: budget.first_token_ms_p50 4 ms: 84.1 MB of weights / 20 GB/s = 4.20 ms {why}; raise {or_else}",
    ]


def test_no_bound_on_speed_when_the_weights_fit_in_the_cache() -> None:
    fast = {"inter_token_ms_p95": 0.001, "decode_tokens_per_s": 1e6}
    assert predict(SMOL, profile(device={"last_level_cache_mib": 81.0})).decode_tokens_per_s_bound is None
    refuse_impossible(SMOL, profile(device={"last_level_cache_mib": 81.0}, budget=fast), "mine")


def test_larger_than_memory_bundle_or_resident_budget() -> None:
    given = profile(device={"memory_mib": 64}, budget={"bundle_mib": 80.0, "peak_rss_mib": 88.0})
    assert refusal(SMOL, given) == [
        "profile mine: device.memory_mib 64: the int4 graph of 134,515,008 parameters takes 80.2 MiB "
        "+ a cache of 8.4 MiB; use a smaller student or fewer bits",
        "profile mine: budget.bundle_mib 80: the int4 graph of 134,515,008 parameters takes 80.2 MiB; "
        "raise it, or use a smaller student or fewer bits",
        "profile mine: budget.peak_rss_mib 88: 80.2 MiB of weights + 8.4 MiB of cache = 88.6 MiB; "
        "raise it, or use a smaller student or fewer bits",
    ]
    on_gpu = profile("int4", gpu="8.9", budget={"peak_rss_mib": 1.0, "peak_device_mib": 80.0})
    assert [line.split(" ")[2] for line in refusal(SMOL, on_gpu)] == ["budget.peak_device_mib"]


def test_workload_longer_than_the_model() -> None:
    given = profile(workload={"prompt_tokens": 2000, "new_tokens": 49})
    assert refusal(SMOL, given) == [
        "profile mine: workload: prompt_tokens 2000 + new_tokens 49 = 2049 exceed the model's 2048 tokens; "
        "shorten the workload"
    ]
    refuse_impossible(SMOL, profile(workload={"prompt_tokens": 2000, "new_tokens": 48}), "mine")


@pytest.mark.parametrize(
    ("weights", "gpu", "problem"),
    [
        (
            "fp8",
            "8.7",
            "'fp8' is beyond a card of compute capability 8.7 in tensorrt; use int4, int8, bfloat16, float16, float32",
        ),
        (
            "bfloat16",
            "7.5",
            "'bfloat16' is beyond a card of compute capability 7.5 in tensorrt; use int8, float16, float32",
        ),
        (
            "nf4",
            "8.9",
            "'nf4' of bitsandbytes has no kernel in tensorrt; use int4 or int8, and train the student on that grid",
        ),
        ("float16", None, "'float16' is not built for engine onnxruntime-cpu; use float32, int8, int4, nf4, fp4"),
        ("fp8", "8.9", None),
        ("fp8", "12.0", None),
        ("bfloat16", "8.0", None),
        ("int4", "8.0", None),
        ("int8", "7.5", None),
        ("int8", None, None),
    ],
)
def test_precisions_that_an_engine_or_gpu_lacks(weights: str, gpu: str | None, problem: str | None) -> None:
    given = profile(weights, gpu=gpu)
    assert precision_problem(given) == problem
    if problem is not None:
        assert refusal(HAND, given) == [f"profile mine: precision.weights: {problem}"]


@pytest.mark.parametrize(
    ("weights", "gpu", "problem"),
    [
        ("bfloat16", "8.9", "'bfloat16' is not run by engine onnxruntime-cuda; use float16, or engine tensorrt or"),
        ("fp8", "8.9", "'fp8' is not run by engine onnxruntime-cuda; use float16, or engine tensorrt or tensorrt-rtx"),
        ("nf4", "8.9", "'nf4' of bitsandbytes has no kernel in onnxruntime-cuda; use int4 or int8"),
        ("int4", "7.5", "'int4' is beyond a card of compute capability 7.5 in onnxruntime-cuda; use int8"),
        ("float16", "8.9", None),
        ("int4", "8.9", None),
    ],
)
def test_precisions_that_the_cuda_provider_lacks(weights: str, gpu: str, problem: str | None, tmp_path: Path) -> None:
    given = profile(weights, gpu=gpu, device={"engine": "onnxruntime-cuda"})
    found = precision_problem(given)
    assert found is None if problem is None else str(found).startswith(problem)
    path = tmp_path / "card.yaml"
    device = "{arch: x86_64, engine: onnxruntime-cuda, memory_mib: 8192, memory_bandwidth_gb_per_s: 1008"
    path.write_text(
        f'format: 1\ndevice:\n  {device}, gpu: NVIDIA X, compute_capability: "{gpu}"}}\nprecision: {{weights: {weights}}}\n'
    )
    if problem is None:
        assert load_profile(str(path)).profile.precision.weights == weights
        return
    with pytest.raises(BadInput, match=r"card.yaml:4: precision.weights: ") as caught:
        load_profile(str(path))
    assert "onnxruntime-cuda; use" in str(caught.value)


@pytest.mark.parametrize("name", packaged("profiles"))
def test_packaged_profiles_ask_nothing_impossible(name: str) -> None:
    """cpu-x86 is tight around the quickstart's student; the others leave room for a hundred times as many parameters."""
    student = ModelSize(1_053_568, 524_288, True, 3, 4, 32, 128, 4096, 512) if name == "cpu-x86" else SMOL
    refuse_impossible(student, load_profile(name).profile, name)


def test_a_card_that_a_flavour_does_not_know_is_named_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "hopper.yaml"
    device = "{arch: x86_64, engine: tensorrt-rtx, memory_mib: 81920, memory_bandwidth_gb_per_s: 3350"
    path.write_text(f'format: 1\ndevice:\n  {device}, gpu: NVIDIA H100, compute_capability: "9.0"}}\n')
    with pytest.raises(BadInput) as caught:
        load_profile(str(path))
    assert str(caught.value) == (
        f"{path}:3: device.compute_capability: tensorrt-rtx builds nothing for NVIDIA H100 of compute capability 9.0; "
        "use engine tensorrt"
    )
    given = profile(gpu="7.0")
    assert refusal(HAND, given) == [
        "profile mine: device.compute_capability: tensorrt builds nothing for a card of compute capability 7.0; "
        "it knows 7.5, 8.0, 8.6, 8.7, 8.9, 9.0, 10.0, 10.1, 10.3, 11.0, 12.0, 12.1"
    ]


def test_a_cache_of_fixed_length_is_counted_whole() -> None:
    short = profile(gpu="8.9", workload={"cache_tokens": 512})
    assert predict(SMOL, short).cache_mib == 46_080 / 2 * 512 / 2**20
    assert predict(SMOL, profile(gpu="8.9")).cache_mib == 46_080 / 2 * 2048 / 2**20
    with pytest.raises(ValueError, match=r"cache_tokens 100 is less than prompt_tokens [+] new_tokens = 192; raise it"):
        profile(gpu="8.9", workload={"cache_tokens": 100})


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_the_prediction_is_the_size_of_a_real_graph(weights: str, tmp_path: Path) -> None:
    from edgestill.export.model_facts import load_config, size_of_config
    from edgestill.export.onnx_export import export_onnx
    from edgestill.export.quantize import quantize_graph

    checkpoint = write_model(tmp_path / "model", width=128, layers=2, vocab=2048)
    export_onnx(checkpoint, tmp_path / "float")
    given = profile(weights)
    quantized = quantize_graph(tmp_path / "float" / "model.onnx", tmp_path / "model.onnx", given.precision)
    predicted = predict(size_of_config(load_config(checkpoint)), given).graph_mib
    assert predicted <= quantized.graph_bytes / 2**20 <= predicted + 0.1  # nodes and norms
