"""Budgets of the GPU profiles: derived from published figures, every one, with its arithmetic and its source in the file."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import pytest

from edgestill.profiles.load import load_profile, packaged

TOKENS = 4096
"""Longest text that the memory is budgeted for."""


@dataclass(frozen=True)
class Student:
    """The largest that a profile is meant for."""

    parameters: float
    n_layers: int
    n_kv_heads: int
    head_size: int
    vocab_size: int
    hidden_size: int


SMALL = Student(5e8, 24, 2, 64, 65_536, 1024)
MEDIUM = Student(1e9, 16, 8, 64, 131_072, 2048)
LARGE = Student(3e9, 28, 8, 128, 131_072, 3072)
TARGETS = {
    "jetson-orin-nano": (SMALL, 17),
    "jetson-agx-orin": (MEDIUM, 42),
    "l4": (MEDIUM, 121),
    "rtx-4090": (MEDIUM, 165),
    "rtx-5090": (MEDIUM, 209),
    "a100": (LARGE, 312),
    "h100": (LARGE, 989),
    "h200": (LARGE, 989),
}
"""Profile -> (student, dense TFLOPS in 16 bits)."""


def test_every_gpu_profile_is_derived() -> None:
    assert {name for name in packaged("profiles") if load_profile(name).profile.device.on_gpu} == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_budgets_follow_from_the_figures_and_the_file_shows_how(name: str) -> None:
    loaded, (student, tflops) = load_profile(name), TARGETS[name]
    profile, work = loaded.profile, loaded.profile.workload
    precision = profile.precision  # fp8: one scale per output channel is nothing
    bits = {"bfloat16": 16.0, "fp8": 8.0, "int4": 4 + 16 / precision.block_size}[precision.weights]
    weights = student.parameters * bits / 8
    row = 2 * student.n_layers * student.n_kv_heads * student.head_size * 2
    step = weights + work.batch_size * row * (work.prompt_tokens + work.new_tokens / 2)
    between = step / (profile.device.memory_bandwidth_gb_per_s * 1e9 / 3) * 1e3 + 1
    first = work.batch_size * work.prompt_tokens * 2 * student.parameters / (tflops * 1e12 / 6) * 1e3
    table = 0 if bits == 16 else student.vocab_size * student.hidden_size * 2
    bundle = (weights + table) / 2**20 + 32
    held = work.batch_size * (row * TOKENS + work.prompt_tokens * 65_536)
    device = (2 * weights + table + held) / 2**20 + 512
    text = loaded.text
    for shown in (
        f"= {row:,} bytes a token",
        f"= {step / 1e6:,.0f} MB\n",
        f"= {between:.2f} ms\n",
        f"= {first:,.1f} ms\n",
        f"= {bundle:,.0f} MiB\n",
        f"= {device:,.0f} MiB\n",
    ):
        assert shown in text, shown
    assert profile.budget == {
        "first_token_ms_p95": rounded_up(first, 10 ** (len(str(int(first))) - 2)),
        "inter_token_ms_p95": rounded_up(between, 0.5),
        "peak_device_mib": rounded_up(device, 256),
        "bundle_mib": rounded_up(bundle, 256),
    }
    assert device < profile.device.memory_mib


@pytest.mark.parametrize("name", TARGETS)
def test_the_document_is_named_with_where_it_is(name: str) -> None:
    text = re.sub(r"\n# ", " ", load_profile(name).text)
    assert re.search(r'Figures: "NVIDIA [^"]+" (datasheet|whitepaper|technical brief), \w*\.?nvidia\.com/', text)
    assert f"{TARGETS[name][1]} TFLOPS" in text or f"{TARGETS[name][1]} without" in text
    assert "developer.nvidia.com/cuda-gpus" in text


def rounded_up(value: float, step: float) -> float:
    return math.ceil(value / step) * step
