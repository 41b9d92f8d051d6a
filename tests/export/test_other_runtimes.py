"""What ships runs elsewhere: onnxruntime-genai loads a bundle, Optimum the portable graph, and both give our greedy tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import checkpoint, make_bundle

from edgestill.export.genai_config import genai_config
from edgestill.export.onnx_export import export_onnx
from edgestill.runtime.model import Model, load

PROMPT = [5, 9, 17, 30, 2, 77, 45]
NEW = 40
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {}),
    ("phi", {}),
    ("mistral", {"sliding_window": 8}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("llama", {"tie_word_embeddings": False}),
]


def ours(model: Model) -> list[int]:
    return list(model.generate(PROMPT, max_new_tokens=NEW).token_ids)


@pytest.mark.parametrize(("family", "fields"), CASES)
@pytest.mark.parametrize("fused", [True, False])
def test_genai_gives_the_same_greedy_tokens(family: str, fields: dict[str, Any], fused: bool, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    folder = make_bundle(tmp_path / "bundle", family, fused=fused, eos_token_id=319, **fields)
    model = load(folder)
    expected = ours(model)
    assert len(set(expected)) > 3  # a text that repeats one token would show little
    (folder / "genai_config.json").write_text(json.dumps(genai_config(model.facts, model.manifest.graph)))
    shutil.copy(checkpoint(family, eos_token_id=319, **fields) / "tokenizer_config.json", folder)
    parameters = genai.GeneratorParams(loaded := genai.Model(str(folder)))
    parameters.set_search_options(max_length=len(PROMPT) + NEW)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens(PROMPT)
    found: list[int] = []
    while len(found) < len(expected) and not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_optimum_gives_the_same_greedy_tokens_from_the_portable_graph(family: str, tmp_path: Path) -> None:
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    fields = {"tie_word_embeddings": False, "eos_token_id": 319}
    source = checkpoint(family, **fields)
    export_onnx(source, tmp_path / "portable")
    for name in ("config.json", "generation_config.json"):
        shutil.copy(source / name, tmp_path / "portable" / name)
    loaded = ORTModelForCausalLM.from_pretrained(tmp_path / "portable", use_io_binding=False)
    prompt = torch.tensor([PROMPT])
    found = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
    expected = ours(load(make_bundle(tmp_path / "bundle", family, fused=True, **fields)))
    assert np.asarray(found)[0, len(PROMPT) :].tolist() == expected
