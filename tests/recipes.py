"""A tiny recipe and a tiny device for whole builds: two random teachers, two texts, seconds of training.

    recipe = write_recipe(tmp_path, train={"tokens": 512}, limits={"kl_nats_per_token": 9.0})
    profile = write_profile(tmp_path, budget={"bundle_mib": 1})

Changes are merged into the sections below; lists and scalars replace what is there. Teachers (`verse`, `prose`) and texts
(`verse.txt`, `prose.txt`) are written beside the recipe once, so they can be damaged without touching another test's.
"""

from __future__ import annotations

import copy
import functools
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from tiny import write_model, write_text

VOCAB = 263
"""Tokens of the tiny tokenizer."""

RECIPE: dict[str, Any] = {
    "format": 1,
    "teachers": [{"name": "verse", "model": "verse"}, {"name": "prose", "model": "prose"}],
    "fusion": {"entropy_temperature": 0.1},
    "student": {
        "init": "config",
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        },
    },
    "losses": {"output": {"divergence": "forward_kl"}, "cross_entropy": 0.2},
    "data": {
        "sources": [{"path": "verse.txt", "domain": "verse"}, {"path": "prose.txt", "domain": "prose"}],
        "validation": {"fraction": 0.1},
        "held_out": {"fraction": 0.1},
        "sequence_length": 32,
    },
    "train": {
        "tokens": 2048,
        "batch_size": 4,
        "checkpoint_every_steps": 4,
        "precision": "float32",
        "teacher_cache": "never",
        "cache_top_k": 16,
    },
    "reference": {"tokens": 512, "top_k": 8},
}

PROFILE: dict[str, Any] = {
    "format": 1,
    "device": {
        "arch": "aarch64" if platform.machine() in ("aarch64", "arm64") else "x86_64",
        "engine": "onnxruntime-cpu",
        "threads": 1,
        "memory_mib": 4096,
        "memory_bandwidth_gb_per_s": 10,
        "last_level_cache_mib": 8,
    },
    "workload": {"prompt_tokens": 16, "new_tokens": 8, "batch_size": 1},
    "precision": {"weights": "int4", "block_size": 32, "accuracy_level": 4},
    "budget": {"bundle_mib": 50},
}


def write_recipe(folder: Path, name: str = "recipe", **changes: Any) -> Path:
    """`folder/<name>.yaml`, its teachers and its texts beside it; returns the path of the recipe."""
    write_material(folder)
    return _write(folder / f"{name}.yaml", RECIPE, changes)


def write_profile(folder: Path, name: str = "device", **changes: Any) -> Path:
    """`folder/<name>.yaml`: a processor with a small workload; the bundle will be called `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    return _write(folder / f"{name}.yaml", PROFILE, changes)


def write_material(folder: Path) -> None:
    """The teachers and texts of the recipe, where they are not there yet."""
    for source in _material().iterdir():
        target = folder / source.name
        if source.is_dir() and not target.exists():
            shutil.copytree(source, target)
        elif not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


_kept: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when the process ends."""


@functools.cache
def _material() -> Path:
    _kept.append(tempfile.TemporaryDirectory(prefix="edgestill-tests-"))
    folder = Path(_kept[-1].name)
    write_model(folder / "verse", width=48, layers=2, seed=1, vocab=VOCAB)
    write_model(folder / "prose", width=64, layers=3, seed=2, vocab=VOCAB)
    write_text(folder / "verse.txt", seed=1)
    write_text(folder / "prose.txt", seed=2)
    return folder


def _write(path: Path, words: dict[str, Any], changes: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(merged(words, changes), sort_keys=False), encoding="utf-8")
    return path


def merged(words: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `words` with nested `changes`."""
    result = copy.deepcopy(words)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
