"""Generation equals transformers' greedy search, streams honestly, stops when told, and refuses what can't be done."""

from __future__ import annotations

import functools
import gc
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import PROFILE, checkpoint, make_bundle, write_manifest
from tiny import read_json
from transformers import AutoModelForCausalLM

from edgestill.runtime.backends.ort_states import GrowingState, SharedState
from edgestill.runtime.errors import BadInput, BundleError, MissingPart, PromptTooLong
from edgestill.runtime.generate import Piece
from edgestill.runtime.model import Model, load
from edgestill.runtime.text import without_unfinished

FAMILIES = ("llama", "gpt2", "gpt_neox")
PROMPT = "the thin man in there"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("bundles")
    return {f: load(make_bundle(root / f, f)) for f in FAMILIES}


@pytest.fixture
def model(models: dict[str, Model]) -> Model:
    return models["llama"]


@functools.cache
def their_model(family: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint(family)).eval()


def their_greedy(family: str, ids: list[int], new: int, **words: Any) -> list[int]:
    prompt = torch.tensor([ids])
    with torch.no_grad():
        out = their_model(family).generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=0, **words
        )
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_those_of_transformers(models: dict[str, Model], family: str, penalty: float) -> None:
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(1, 263, 12).tolist()
        ours = models[family].generate(ids, max_new_tokens=40, repetition_penalty=penalty)
        assert list(ours.token_ids) == their_greedy(family, ids, 40, repetition_penalty=penalty)
        assert ours.finish_reason == ("length" if len(ours.token_ids) == 40 and ours.token_ids[-1] != 0 else "eos")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_is_its_generation_and_its_scores(models: dict[str, Model], family: str) -> None:
    model = models[family]
    words: dict[str, Any] = {"max_new_tokens": 25, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    pieces = list(model.stream(PROMPT, **words))
    whole = model.generate(PROMPT, **words)
    assert whole.text == "".join(p.text for p in pieces)
    assert whole.text == without_unfinished(model.detokenize(whole.token_ids))
    assert whole.token_ids == tuple(p.token_id for p in pieces)
    assert [p.finish for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    prompt = model.tokenize(PROMPT)
    scores = model.score([*prompt, *whole.token_ids])[len(prompt) - 1 :]
    np.testing.assert_allclose(whole.logprobs, scores, rtol=0, atol=1e-4)


def test_statistics_count_and_add_up(model: Model) -> None:
    last = list(model.stream(PROMPT, max_new_tokens=10))[-1]
    statistics = last.statistics
    assert statistics is not None
    assert statistics.finish_reason == last.finish
    assert (statistics.prompt_tokens, statistics.new_tokens) == (len(model.tokenize(PROMPT)), 10)
    assert len(statistics.inter_token_ms) == 9
    assert min(statistics.first_token_ms, *statistics.inter_token_ms) > 0
    assert statistics.prefill_tokens_per_s == pytest.approx(1000 * statistics.prompt_tokens / statistics.first_token_ms)
    assert statistics.decode_tokens_per_s == pytest.approx(1000 / np.mean(statistics.inter_token_ms))
    assert statistics.inter_token_ms_mean == pytest.approx(np.mean(statistics.inter_token_ms))
    assert statistics.inter_token_ms_percentile(100) == max(statistics.inter_token_ms)
    one = model.generate(PROMPT, max_new_tokens=1).statistics
    assert (one.decode_tokens_per_s, one.inter_token_ms_mean, one.inter_token_ms_percentile(95)) == (None, None, None)


def test_times_leave_out_what_the_caller_does(model: Model) -> None:
    """However slow the machine is, the model's times and the caller's pauses fit beside each other into the whole."""
    pause_s, started = 0.05, time.perf_counter()
    statistics = None
    for piece in model.stream(PROMPT, max_new_tokens=6):
        statistics = piece.statistics
        time.sleep(pause_s)
    whole_ms = 1000 * (time.perf_counter() - started)
    assert statistics is not None
    model_ms = statistics.first_token_ms + sum(statistics.inter_token_ms)
    assert model_ms + 6 * 1000 * pause_s <= whole_ms


def test_the_models_end_ends_the_text(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b")
    greedy = load(folder).generate(PROMPT, max_new_tokens=20).token_ids
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    write_manifest(folder, read_json(checkpoint() / "config.json"), PROFILE, {})
    assert load(folder).generate(PROMPT, max_new_tokens=20).token_ids == greedy
    end = greedy[5]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [319, end]}))
    write_manifest(folder, read_json(checkpoint() / "config.json"), PROFILE, {})
    ended = load(folder).generate(PROMPT, max_new_tokens=20)
    cut = greedy[: greedy.index(end) + 1]
    assert (ended.token_ids, ended.finish_reason) == (cut, "eos")
    assert ended.text == without_unfinished(load(folder).detokenize(cut[:-1]))
    assert cut == tuple(their_greedy("llama", load(folder).tokenize(PROMPT), 20, eos_token_id=[319, end]))


def test_stop_tokens_and_stop_strings_end_the_text(models: dict[str, Model]) -> None:
    model = models["gpt2"]  # repeats " the", so that there is text to stop in
    free = model.generate(PROMPT, max_new_tokens=20)
    token = free.token_ids[3]
    stopped = model.generate(PROMPT, max_new_tokens=20, stop_token_ids=[token])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    assert len(free.text) > 8
    stop = free.text[3:7]  # crosses tokens
    for given in (stop, [stop], ["never in there", stop]):
        stopped = model.generate(PROMPT, max_new_tokens=20, stop=given)
        assert (stopped.finish_reason, stopped.text) == ("stop", free.text[: free.text.index(stop)])
        assert len(stopped.token_ids) < 20


def test_held_text_comes_out_at_the_end(models: dict[str, Model]) -> None:
    free = models["gpt2"].generate(PROMPT, max_new_tokens=6)
    held = models["gpt2"].generate(PROMPT, max_new_tokens=6, stop=[free.text[-2:] + "\x00"])
    assert (held.text, held.finish_reason) == (free.text, "length")


def test_leaving_the_loop_frees_the_cache(model: Model) -> None:
    def states() -> int:
        gc.collect()
        return sum(
            type(o) in (GrowingState, SharedState) for o in gc.get_objects()
        )  # isinstance would wake deprecated proxies of torch

    before = states()
    for _ in model.stream(PROMPT, max_new_tokens=50):
        assert states() == before + 1
        break
    assert states() == before
    stream = model.stream(PROMPT, max_new_tokens=50)
    assert states() == before  # nothing is done before the first piece is asked for
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert states() == before


def test_threads_get_the_tokens_they_would_get_alone(model: Model) -> None:
    def run(seed: int) -> tuple[int, ...]:
        ids = np.random.default_rng(seed).integers(1, 263, 5 + seed).tolist()
        return model.generate(ids, max_new_tokens=60, temperature=1.0, seed=seed, repetition_penalty=1.1).token_ids

    alone = [run(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(8)))
    assert together == alone
    assert len(set(alone)) == 8


def test_streams_can_be_interleaved_in_one_thread(model: Model) -> None:
    alone = [list(model.stream([i + 1, i + 2], max_new_tokens=10)) for i in range(2)]
    together = list(zip(*(model.stream([i + 1, i + 2], max_new_tokens=10) for i in range(2)), strict=True))

    def tokens(pieces: Any) -> list[int]:
        return [p.token_id for p in pieces if isinstance(p, Piece)]

    assert [tokens(p) for p in zip(*together, strict=True)] == [tokens(p) for p in alone]


def test_what_does_not_fit_is_refused_and_nothing_is_truncated(model: Model) -> None:
    with pytest.raises(PromptTooLong, match="100 prompt \\+ 29 new tokens exceed the 128"):
        model.stream([1] * 100, max_new_tokens=29)
    with pytest.raises(PromptTooLong, match="128 prompt"):
        model.stream([1] * 128)
    with pytest.raises(PromptTooLong):
        model.stream("x" * 500)
    assert model.generate([1] * 100, max_new_tokens=28).statistics.new_tokens <= 28
    free = model.generate([1, 2, 3], stop_token_ids=())
    assert free.finish_reason == "eos" or free.statistics.new_tokens == 125


def test_a_tokenizer_that_would_truncate_is_not_obeyed(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = make_bundle(tmp_path / "b")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_manifest(folder, read_json(checkpoint() / "config.json"), PROFILE, {})
    assert load(folder).detokenize(load(folder).tokenize(PROMPT)) == PROMPT


def test_an_empty_prompt_begins_with_the_first_token_or_is_refused(tmp_path: Path, model: Model) -> None:
    assert model.generate("", max_new_tokens=5).token_ids == model.generate([0], max_new_tokens=5).token_ids
    config = {**read_json(checkpoint() / "config.json"), "bos_token_id": None}
    folder = make_bundle(tmp_path / "b")
    write_manifest(folder, config, PROFILE, {})
    with pytest.raises(BadInput, match="prompt is empty"):
        load(folder).stream("")


@pytest.mark.parametrize(
    ("prompt", "words", "why"),
    [
        ([1, 320], {}, "prompt holds 320; the vocabulary has ids 0..319"),
        ([-1], {}, "prompt holds -1"),
        ([0.5], {}, "whole numbers"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"max_new_tokens": -3}, "max_new_tokens is -3"),
        ([1], {"temperature": -1.0}, "temperature is -1.0"),
        ([1], {"top_p": 2.0}, "top_p is 2.0"),
        ([1], {"stop": [""]}, "at least one character"),
        ([1], {"stop_token_ids": [400]}, "stop_token_ids holds 400"),
    ],
)
def test_arguments_are_refused_when_given(model: Model, prompt: list[int], words: dict[str, Any], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        model.stream(prompt, **words)


def test_load_refuses_bad_threads_foreign_engines_and_broken_files(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b")
    with pytest.raises(BadInput, match="threads is 0"):
        load(folder, threads=0)
    foreign = {**PROFILE, "device": {"engine": "another"}}
    with pytest.raises(MissingPart, match="engine another"):
        load(make_bundle(tmp_path / "another", profile=foreign))
    unfit = {**PROFILE, "device": {"engine": "tensorrt"}}
    with pytest.raises(BundleError, match="growing cache, no engine can be built of it"):
        load(make_bundle(tmp_path / "trt", profile=unfit))
    greedy = {**PROFILE, "device": {**PROFILE["device"], "threads": 10_000}}
    load(make_bundle(tmp_path / "many", profile=greedy))
    odd = {**PROFILE, "device": {**PROFILE["device"], "threads": "2"}}
    with pytest.raises(BundleError, match="threads is '2'"):
        load(make_bundle(tmp_path / "odd", profile=odd))
    for i, content in enumerate(("[1]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [320]}')):
        broken = make_bundle(tmp_path / str(i), extra_files={"generation_config.json": content.encode()})
        with pytest.raises(BundleError, match=r"generation_config\.json"):
            load(broken)
