"""The torch column: both ways to decode choose the same tokens, and what was measured says how."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_model

from edgestill.compress import torch_speed
from edgestill.compress.low_rank import load_student
from edgestill.compress.torch_speed import FixedCache, GrowingCache, TorchSpeed, measure_apart, on_cuda

STEP = {"as it is": lambda step: step, "traced whole": torch.compile(backend="eager", fullgraph=True)}


@pytest.mark.parametrize("way", STEP)
@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_a_cache_of_fixed_length_gives_the_tokens_of_one_that_grows(way: str, tmp_path: Path) -> None:
    model = load_student(write_model(tmp_path / "model"), torch.float32)
    growing, fixed = GrowingCache(model), FixedCache(model, 40, STEP[way])
    with torch.no_grad():
        for seed in range(3):  # the second text meets a cache that holds the first
            ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 300, (1, 9 + seed)))
            chosen = []
            for decoder in (growing, fixed):
                token = decoder.prefill(ids)
                tokens = [int(token)]
                for _ in range(20):
                    token = decoder.step(token)
                    tokens.append(int(token))
                chosen.append(tokens)
            assert chosen[0] == chosen[1] and len(set(chosen[0])) > 1


def test_a_measurement_says_its_precision_and_whether_it_was_compiled(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    found = measure_apart([(path, "float32"), (path, "float16")], prompt_tokens=8, new_tokens=4, threads=1)
    assert [(row.precision, row.compiled) for row in found] == [("float32", False), ("float16", False)]
    assert found[0].device.startswith("cuda" if on_cuda() else "cpu") and found[0].inter_token_ms_p50 > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_torch_compile_is_not_measured_in_a_fork(
    compiled: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its workers hang there; everything else is, for a peak of its own."""
    speed = TorchSpeed(1.0, 2.0, 500.0, 300.0, 8, 4, 8, 2, 1, "float16", "cuda", compiled)
    called = []
    monkeypatch.setattr(torch_speed, "measure", lambda *_, **__: called.append("here") or speed)
    monkeypatch.setattr(torch_speed, "_in_a_fork", lambda *_, **__: called.append("fork") or speed)
    request = {"models": [["m", "float16"]], "prompt_tokens": 8, "new_tokens": 4, "threads": 1, "compiled": compiled}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(request)))
    torch_speed.main()
    assert called == ["here" if compiled else "fork"]
    assert TorchSpeed(**json.loads(capsys.readouterr().out)[0]) == speed
