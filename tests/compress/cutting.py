"""What the tests of student construction share: tiny teachers of every family that can be cut, their facts, and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import SIZES, write_tokenizer

from edgestill.compress.importance import Calibration
from edgestill.compress.packing import Part
from edgestill.compress.teachers import TeacherFacts, resolve_teachers
from edgestill.profiles.schema import TeacherSpec

REAL = 263
"""Tokens of the tiny tokenizer."""
CPU = torch.device("cpu")
GATED: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**GATED, "tie_word_embeddings": True},
    "mistral": {**GATED, "sliding_window": None},
    "qwen2": {**GATED, "tie_word_embeddings": True},
    "qwen3": {**GATED, "head_dim": 16},
    "gemma": {**GATED, "head_dim": 8, "pad_token_id": None},
    "gemma3_text": {**GATED, "head_dim": 8, "sliding_window": 8, "layer_types": None, "pad_token_id": None},
}
"""Families that narrow.py takes, with untied and tied heads, biases, norms of heads and scaled embeddings among them."""


def write_teacher(folder: Path, family: str = "llama", *, layers: int = 3, width: int = 32, **fields: Any) -> Path:
    """A random model of REAL tokens with its tokenizer; every vector (norms, biases) is random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    names = {"hidden_size": width, "num_hidden_layers": layers, "max_position_embeddings": 64}
    if family == "gpt2":
        names = {"n_embd": width, "n_layer": layers, "n_positions": 64}
    own = FAMILIES.get(family) or SIZES[family]
    ids = {"vocab_size": REAL, "bos_token_id": 0, "eos_token_id": 0, "rms_norm_eps": 1e-12}
    config = AutoConfig.for_model(family, **{**own, **names, **ids, **fields})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(5.0)
            else:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def facts_of(folder: Path, name: str = "big") -> TeacherFacts:
    """The facts of a teacher folder, float32."""
    return resolve_teachers([TeacherSpec(name=name, model=str(folder), precision="float32")], Path, device=CPU)[0]


def some_text(windows: int = 9, length: int = 12, *, masked: bool = False) -> Part:
    """Random windows; `masked`: the first half of each is no label."""
    rng = np.random.default_rng(0)
    mask = np.ones((windows, length), np.uint8)
    mask[:, : length // 2] = 0
    zeros = np.zeros(windows, np.int16)
    ids = rng.integers(0, REAL, (windows, length)).astype(np.uint16)
    return Part(ids, mask if masked else None, zeros, np.arange(windows, dtype=np.int32), zeros)


def some_calibration(*, masked: bool = False) -> Calibration:
    """All of `some_text`."""
    return Calibration.of(some_text(masked=masked), 10**6)


def logits_of(model: Any, calibration: Calibration) -> torch.Tensor:
    """float32 [n, T, V]."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(calibration.token_ids, use_cache=False).logits
    return found
