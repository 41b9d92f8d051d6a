"""benchmarks/peers at sizes where a speed means nothing: everybody runs the same model, and the arithmetic of the JSON is right."""

from __future__ import annotations

import importlib
import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny import read_json, write_model

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
NEW, DEPTH, PROMPT = 6, 16, 24
ABSENT = "ctranslate2"
Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """A file of benchmarks/peers by its name."""
    monkeypatch.syspath_prepend(str(PEERS))
    return importlib.import_module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that every peer can take: heads of 64."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 256}
    return write_model(tmp_path_factory.mktemp("tiny") / "checkpoint", width=128, max_tokens=128, **heads)


def command(checkpoint: Path, work: Path, *more: str) -> list[str]:
    sizes = ["--threads", "1", "--rounds", "1", "--depths", str(DEPTH), "--batches", "1,2"]
    tokens = ["--new-tokens", str(NEW), "--prompt-tokens", str(PROMPT)]
    return [sys.executable, str(PEERS / "run.py"), str(checkpoint), "--work", str(work), *sizes, *tokens, *more]


@pytest.fixture(scope="module")
def measured(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of ours and torch, the latter in an interpreter that leaves a mark, and of one that is not here."""
    folder = tmp_path_factory.mktemp("peers")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\ntouch "{folder}/used"\nexec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    words = [
        "--peers",
        f"ours-block32,torch-float32,{ABSENT}",
        "--python",
        f"torch={python}",
        "--json",
        str(folder / "out.json"),
    ]
    done = subprocess.run(
        command(checkpoint, folder / "work", *words), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "out.md").read_text("utf-8").strip() == done.stdout.strip()
    return folder


def test_two_engines_are_measured_in_turn(measured: Path) -> None:
    found = read_json(measured / "out.json")
    assert {"ours-block32", "torch-float32"} <= set(found["peers"])
    cells = {"b1 d16", "b2 d16", "first token"}
    for peer in found["peers"].values():
        raw = peer["raw"]
        assert len(raw["warm_up"]) == len(raw["turns"]) == len(raw["fresh"]) == len(peer["rounds"]) == 1
        assert set(raw["turns"][0]) == cells
        assert [raw["turns"][0][cell]["new_tokens"] for cell in sorted(cells)] == [NEW, NEW, 0]
        assert all(value > 0 for row in peer["rounds"] for value in row.values())
        turn, row = raw["turns"][0]["b2 d16"], peer["rounds"][0]
        assert row["decode_tokens_per_s b2 d16"] == pytest.approx(2 * NEW / turn["decode_s"])
        assert row["prefill_tokens_per_s b2 d16"] == pytest.approx(2 * DEPTH / turn["prefill_s"])
        assert peer["medians"]["bandwidth_fraction"] > 0
    assert found["settings"]["warm_up"].endswith("excluded")
    assert (measured / "used").exists()  # torch ran in the interpreter that was named for it
    assert (measured / "out.png").stat().st_size > 0
    assert (measured / "out.svg").read_text("utf-8").lstrip().startswith("<?xml")


def test_they_run_the_same_model(measured: Path) -> None:
    agreement = read_json(measured / "out.json")["agreement"]
    assert agreement["with"] == "torch-float32"
    rows = [1 + NEW] * 3 + [1]
    assert agreement["mean_leading_tokens"]["torch-float32"] == pytest.approx(np.mean(rows))
    assert agreement["mean_leading_tokens"]["ours-block32"] > 0.5  # int4; of 320 tokens, another model would share none


def test_ours_counts_the_graph_only(measured: Path) -> None:
    files = read_json(measured / "out.json")["peers"]["ours-block32"]["files"]
    assert files
    assert all(Path(name).name.startswith("model.onnx") for name in files)
    assert not any(part in Path(name).parts for name in files for part in ("portable", "reference"))


def test_a_missing_peer_is_left_out_with_the_reason(measured: Path) -> None:
    try:
        metadata.version(ABSENT)
    except metadata.PackageNotFoundError:
        assert read_json(measured / "out.json")["left_out"] == {ABSENT: f"not installed: {ABSENT}"}
    else:
        pytest.skip(f"{ABSENT} is installed here")


def test_no_path_of_this_machine_is_written(measured: Path) -> None:
    for name in ("out.json", "out.md"):
        text = (measured / name).read_text("utf-8")
        assert str(measured) not in text
        assert sys.prefix not in text
        assert str(PEERS.parent) not in text


def test_a_conversion_is_kept_until_what_it_is_made_of_changes(measured: Path, script: Script, tmp_path: Path) -> None:
    conversion, registry = script("conversion"), script("registry")
    peer = registry.by_name("torch-float32")
    (made,) = (measured / "work").glob("*/torch-float32")
    shutil.copytree(made, tmp_path / "torch-float32")
    stored = read_json(made / "done.json")
    identity, versions = stored["made_of"]["checkpoint"], stored["made_of"]["versions"]
    arguments = (peer, "no-such-interpreter", tmp_path / "absent")  # so that converting again could only fail
    assert conversion.converted(*arguments, identity, versions, tmp_path) == (tmp_path / "torch-float32", stored)
    with pytest.raises(conversion.LeftOut):
        conversion.converted(*arguments, identity, versions | {"torch": "0"}, tmp_path)
    assert not (tmp_path / "torch-float32").exists()


def test_alone_there_is_nothing_to_compare_with(script: Script) -> None:
    results = script("results")
    found = {"environment": {"memory_bandwidth_gb_per_s": 20.0}, "peers": {"other": {"rounds": [raw_round(100)]}}}
    assert results.summarise(found)["ratios"] == {}


def test_too_deep_a_cell_is_refused_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(checkpoint, tmp_path / "work", "--depths", "128"),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode != 0
    assert "135 tokens exceed the 128 positions" in done.stderr
    assert not any((tmp_path / "work").iterdir())


def test_an_interpreter_that_is_not_there_is_a_reason(script: Script) -> None:
    conversion, registry = script("conversion"), script("registry")
    with pytest.raises(conversion.LeftOut, match="--python"):
        conversion.installed(registry.by_name("torch-float32"), "no-such-interpreter")


def test_interpreters_and_peers_by_name_and_family(script: Script) -> None:
    conversion, registry = script("conversion"), script("registry")
    pythons = {"": "all", "llama.cpp": "family", "onnxruntime-genai": "one", "torch-bfloat16": "variant"}
    found = {peer.name: conversion.interpreter_of(peer, pythons) for peer in registry.PEERS}
    assert found["ours-block32"] == sys.executable
    assert [found[f"llama.cpp-{kind}"] for kind in ("q4_0", "q8_0")] == ["family", "family"]
    assert [found[name] for name in ("onnxruntime-genai", "openvino", "torch-float32", "torch-bfloat16")] == [
        "one",
        "all",
        "all",
        "variant",
    ]
    assert [peer.name for peer in registry.chosen(["torch", "ours-block32"])] == [
        "ours-block32",
        "torch-float32",
        "torch-bfloat16",
    ]
    with pytest.raises(ValueError, match="there are ours-block32, ours-block128, llama"):
        registry.chosen(["vllm"])


def test_a_reason_holds_no_path(script: Script) -> None:
    text = "Traceback\n  File x\nRuntimeError: Error opening /home/me/models/genai_config.json: and 3/4 of it\n\n"
    reason = script("conversion").reason
    assert reason(text) == "RuntimeError: Error opening ...: and 3/4 of it"
    assert reason("a\nmod.SizeError: these do not fit:\n\tlayer 1\n\tlayer 2\n") == (
        "mod.SizeError: these do not fit: layer 1 layer 2"
    )
    assert reason("some progress\nedgestill: refused\n") == "edgestill: refused"
    assert reason("") == ""


def test_an_engine_that_stops_early_is_refused(script: Script) -> None:
    class Short:
        def prefill(self, ids: Any, new_tokens: int) -> Any:
            return ids[:, 0]

        def decode(self, n: int) -> Any:
            return np.zeros((2, n - 1), np.int64)

    with pytest.raises(ValueError, match=r"\(2, 4\) further tokens instead of \(2, 5\)"):
        script("worker").generation(Short(), np.zeros((2, 3), np.int64), 5)


def test_prompts_are_the_same_for_all_and_never_twice(script: Script) -> None:
    job = {"seed": 1, "vocab_size": 320}
    prompt = script("worker").prompt
    assert np.array_equal(prompt(job, 3, 2, 40), prompt(job, 3, 2, 40))
    assert not np.array_equal(prompt(job, 3, 2, 40), prompt(job, 4, 2, 40))


def raw_round(decode: float, load_s: float = 0.5) -> dict[str, float]:
    return {
        "file_mib": 80.0,
        "load_ms": 1e3 * load_s,
        "first_token_ms": 200.0,
        "first_prompt_ratio": 1.25,
        "peak_rss_mib": 150.0,
        "decode_tokens_per_s b1 d128": decode,
        "prefill_tokens_per_s b1 d128": 800.0,
    }


def test_ratios_are_taken_per_round_and_the_table_shows_their_median(script: Script) -> None:
    results = script("results")
    shape = {"model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "vocab_size": 49152}
    found = results.summarise(
        {
            "environment": {"cpu": "A", "memory_bandwidth_gb_per_s": 20.0, "start": {"utc": "T"}},
            "settings": {"checkpoint": shape, "batches": [1], "depths": [128], "threads": 2, "rounds": 3},
            "peers": {
                "ours": {"rounds": [raw_round(150), raw_round(60), raw_round(120)]},
                "other": {"rounds": [raw_round(100), raw_round(50, 2.0), raw_round(150)]},
            },
            "left_out": {"third": "not installed: third"},
        }
    )
    over = found["ratios"]["ours"]["other"]["decode_tokens_per_s b1 d128"]
    assert over == {"median": 1.2, "rounds": [1.5, 1.2, 0.8]}  # 120 / 100 by coincidence; 1.5, 1.2, 0.8 by round
    assert found["ratios"]["ours"]["other"]["load_ms"]["rounds"] == [1.0, 0.25, 1.0]
    text = results.table(found)
    assert "| ours | 80.0 | 500 | 200.0 | 1.25 | 150 | 0.50 |" in text  # 80 MiB x 120 / s over 20 GB/s
    assert "| decode, tokens/s | b1 d128 |\n|---|---:|\n| ours | 120 |\n| other | 100 |" in text
    assert "| decode, tokens/s, ours / peer | b1 d128 |\n|---|---:|\n| other | 1.20 |" in text
    assert "Left out: third (not installed: third)" in text
    assert "vocabulary 49,152; A, 2 threads, 20.0 GB/s; medians of 3 rounds in turn" in text


def test_leading_agreement_stops_at_the_first_difference(script: Script) -> None:
    assert script("results").leading_agreement([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]]) == 2.0


def test_gguf_rows_are_in_the_order_of_its_rotation(script: Script) -> None:
    interleaved = script("llama_gguf").interleaved
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]  # rows 0 2 1 3 of each head


def test_gguf_names_every_tensor_and_reads_every_type(script: Script, checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    llama_gguf = script("llama_gguf")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        model.to(dtype).save_pretrained(folder)
        ours = dict(llama_gguf.tensors(folder))
        theirs = {name: value.float().numpy() for name, value in model.state_dict().items() if name in ours}
        assert theirs.keys() == ours.keys() == model.state_dict().keys() - {"lm_head.weight"}
        assert all(np.array_equal(theirs[name], value) for name, value in ours.items())
    names = {llama_gguf.gguf_name(name) for name in ours}
    assert len(names) == len(ours)
    assert {"token_embd.weight", "output_norm.weight", "blk.1.attn_q.weight", "blk.0.ffn_down.weight"} <= names
    with pytest.raises(ValueError, match=r"q_norm\.weight is no tensor"):
        llama_gguf.gguf_name("model.layers.0.self_attn.q_norm.weight")


@pytest.mark.parametrize("name", ["llama.cpp-q8_0", "ctranslate2"])
def test_eight_bit_peers_say_what_torch_says(name: str, script: Script, checkpoint: Path, tmp_path: Path) -> None:
    registry, conversion, results = script("registry"), script("conversion"), script("results")
    missing = [package for package, version in registry.installed(registry.by_name(name)).items() if version is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    job = {
        "threads": 1,
        "vocab_size": 320,
        "seed": 0,
        "new_tokens": NEW,
        "first_token_prompt": PROMPT,
        "cells": [[2, DEPTH]],
    }
    rows = {}
    for peer in (name, "torch-float32"):
        folder = tmp_path / peer
        conversion.answer(sys.executable, ["convert", peer, str(checkpoint), str(folder)], 100)
        words = [sys.executable, str(PEERS / "worker.py"), "turns", peer, str(folder), json.dumps(job)]
        done = subprocess.run(words, input="go\n" * 4, capture_output=True, text=True, timeout=100, check=True)
        turns = [json.loads(line) for line in done.stdout.splitlines()[1:]]
        rows[peer] = [row for turn in turns for row in turn["tokens"]]
    assert len(rows[name]) == 6
    # a rounded weight may turn a tie, and what follows a turned tie is another text
    assert results.leading_agreement(rows["torch-float32"], rows[name]) >= 0.5 * np.mean([1 + NEW, 1 + NEW, 1])
