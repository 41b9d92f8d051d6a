"""The onnxruntime back end gives torch's logits in any chunking, and takes no memory per step."""

from __future__ import annotations

import mmap
import shutil
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from bundles import checkpoint, make_bundle
from hand_graphs import MAX_TOKENS, VOCAB, facts, fused_attention, fused_attention_reference, running_sum
from transformers import AutoModelForCausalLM

from edgestill.runtime.backends import LOGITS_BYTES, chunk_tokens, prefill
from edgestill.runtime.backends.ort import PROMPT_TOKENS, OrtBackend
from edgestill.runtime.bundle import open_bundle
from edgestill.runtime.errors import BadInput, BundleError, PromptTooLong
from edgestill.runtime.kv_cache import aligned_zeros
from edgestill.runtime.manifest import TensorSpec

FAMILIES = ("llama", "gpt2", "gpt_neox")
FUSED = ("llama", "gpt2", "qwen2")
ALL = (*FAMILIES, *(f"fused {family}" for family in FUSED))
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


def open_backend(folder: Path) -> OrtBackend:
    bundle = open_bundle(folder)
    return OrtBackend(bundle.path("model.onnx"), bundle.manifest.model, bundle.manifest.graph, threads=1)


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OrtBackend]:
    root = tmp_path_factory.mktemp("bundles")
    plain = {family: open_backend(make_bundle(root / family, family)) for family in FAMILIES}
    fused = {f"fused {f}": open_backend(make_bundle(root / f"fused-{f}", f, fused=True)) for f in FUSED}
    return plain | fused


def theirs(family: str, ids: I64, mask: I64 | None = None) -> F32:
    """Logits [B, T, V] of the checkpoint in torch, positions as transformers' generate counts them."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family.removeprefix("fused "))).eval()
    words = {}
    if mask is not None:
        attention = torch.from_numpy(mask)
        words = {"attention_mask": attention, "position_ids": (attention.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        logits: F32 = model(torch.from_numpy(ids), **words).logits.numpy()
    return logits


def random_ids(rows: int, tokens: int, seed: int = 0, vocab: int = 320) -> I64:
    return np.random.default_rng(seed).integers(0, vocab, (rows, tokens))


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("steps", [(40,), (1,) * 40, (7, 1, 1, 20, 11)])
def test_logits_are_those_of_torch_in_any_chunking(
    backends: dict[str, OrtBackend], family: str, steps: tuple[int, ...]
) -> None:
    ids = random_ids(2, 40)
    expected = theirs(family, ids)
    state = backends[family].new_state(2, 40)
    for n in steps:
        start = state.length
        ours = backends[family].step(state, ids[:, start : start + n])
        np.testing.assert_allclose(ours, expected[:, start : start + n], rtol=0, atol=1e-4)
    assert state.length == 40


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize(
    ("padding", "steps"),
    [
        ([0, 3, 9], ((0, 12), (12, 13), (13, 20))),
        ([0, 9, 11], ((0, 3), (3, 4), (4, 10), (10, 11), (11, 12), (12, 20))),  # it outlasts the first steps
    ],
)
def test_padded_rows_are_those_of_torch(
    backends: dict[str, OrtBackend], family: str, padding: list[int], steps: tuple[tuple[int, int], ...]
) -> None:
    ids = random_ids(3, 20)
    mask = (np.arange(20) >= np.array(padding)[:, None]).astype(np.int64)
    expected = theirs(family, ids, mask)
    state = backends[family].new_state(3, 20, left_padding=padding)
    seen = np.concatenate([backends[family].step(state, ids[:, a:b]).copy() for a, b in steps], 1)
    real = mask.astype(bool)
    np.testing.assert_allclose(seen[real], expected[real], rtol=0, atol=1e-4)
    unpadded = theirs(family, ids[2:, padding[2] :])  # and those of the same row alone
    np.testing.assert_allclose(seen[2, padding[2] :], unpadded[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("padding", [None, [0, 5]])
def test_kept_logits_are_the_last_ones(backends: dict[str, OrtBackend], family: str, padding: list[int] | None) -> None:
    backend, ids = backends[family], random_ids(2, 24)
    whole, some = (backend.new_state(2, 24, left_padding=padding) for _ in range(2))
    for (a, b), keep in (((0, 12), 1), ((12, 13), 1), ((13, 20), 3), ((20, 24), 4)):
        expected = backend.step(whole, ids[:, a:b])[:, -keep:].copy()
        found = backend.step(some, ids[:, a:b], keep=keep)
        assert found.shape == (2, keep, 320)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    for wrong in (0, 3):
        with pytest.raises(BadInput, match="of 2 tokens"):
            backend.step(backend.new_state(1, 8), ids[:1, :2], keep=wrong)


@pytest.mark.parametrize("family", [family for family in ALL if family.startswith("fused")])
def test_a_rewound_state_goes_on_as_if_nothing_had_followed(backends: dict[str, OrtBackend], family: str) -> None:
    backend, ids = backends[family], random_ids(2, 20)
    state = backend.new_state(2, 20, left_padding=[0, 4])
    backend.step(state, ids[:, :8])
    expected = backend.step(state, ids[:, 8:9]).copy()
    backend.step(state, random_ids(2, 6, seed=1))
    backend.rewind(state, 8)
    assert state.length == 8
    np.testing.assert_allclose(backend.step(state, ids[:, 8:9]), expected, rtol=0, atol=1e-6)
    with pytest.raises(BadInput, match="of 9 tokens can't go back to 10"):
        backend.rewind(state, 10)


def test_a_growing_cache_cannot_be_rewound(backends: dict[str, OrtBackend]) -> None:
    assert [backends[family].rewinds for family in ("llama", "fused llama")] == [False, True]
    with pytest.raises(BadInput, match="build the bundle with fused attention"):
        backends["llama"].rewind(backends["llama"].new_state(1, 4), 0)


def test_states_do_not_touch_each_other(backends: dict[str, OrtBackend]) -> None:
    backend, ids = backends["llama"], random_ids(2, 12)
    expected = theirs("llama", ids)
    states = [backend.new_state(1, 12), backend.new_state(1, 12)]
    for t in range(12):
        rows = [backend.step(s, ids[i : i + 1, t : t + 1]).copy() for i, s in enumerate(states)]
        np.testing.assert_allclose(np.concatenate(rows)[:, 0], expected[:, t], rtol=0, atol=1e-4)


def test_what_does_not_fit_is_refused_and_the_state_goes_on(backends: dict[str, OrtBackend]) -> None:
    backend, ids = backends["gpt2"], random_ids(1, 10)
    with pytest.raises(PromptTooLong, match="129 tokens exceed the 128"):
        backend.new_state(1, 129)
    state = backend.new_state(1, 10)
    backend.step(state, ids[:, :8])
    with pytest.raises(PromptTooLong, match=r"8 \+ 3 tokens exceed the 10"):
        backend.step(state, random_ids(1, 3))
    np.testing.assert_allclose(backend.step(state, ids[:, 8:]), theirs("gpt2", ids)[:, 8:], rtol=0, atol=1e-4)
    for wrong in (random_ids(2, 1), np.zeros((1, 0), np.int64), np.zeros(1, np.int64)):
        with pytest.raises(BadInput, match="token_ids has shape"):
            backend.step(state, wrong)


@pytest.mark.parametrize("arguments", [(0, 5), (1, 0), (2, 5, [1]), (1, 5, [-1]), (1, 5, [5])])
def test_states_that_make_no_sense_are_refused(backends: dict[str, OrtBackend], arguments: tuple[int, int]) -> None:
    with pytest.raises(BadInput):
        backends["llama"].new_state(*arguments)


def test_a_step_allocates_nothing_in_proportion_to_the_cache(backends: dict[str, OrtBackend]) -> None:
    """Cache of 64 rows x 128 tokens x 2 layers x 2 x 2 heads x 16 floats = 4 MiB; a decode step takes less than 64 KiB."""
    backend, ids = backends["llama"], random_ids(64, 1)
    state = backend.new_state(64, 128)
    assert state.cache.nbytes >= 2 * 64 * 128 * 2 * 2 * 2 * 16 * 4
    for _ in range(3):
        backend.step(state, ids)
    buffers = {*state.cache.past, *state.cache.present}
    tracemalloc.start()
    try:
        for _ in range(100):
            backend.step(state, ids)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 10
    assert buffers == {*state.cache.past, *state.cache.present}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_a_large_cache_takes_memory_as_it_fills_and_gives_it_back() -> None:

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before, size = resident(), 256 << 20
    cache = aligned_zeros(size)
    assert (len(cache), cache.ctypes.data % 64) == (size, 0) and not cache[:: 1 << 24].any()
    assert resident() - before < size // 8
    cache[: size // 2] = 1
    assert resident() - before > size // 4
    del cache
    assert resident() - before < size // 8


def test_prefill_bounds_the_logits_and_loses_no_position(backends: dict[str, OrtBackend]) -> None:
    backend, ids = backends["llama"], random_ids(1, 50)
    chunks = [(start, logits.copy()) for start, logits in prefill(backend, backend.new_state(1, 50), ids, chunk=16)]
    assert [(start, logits.shape[1]) for start, logits in chunks] == [(0, 16), (16, 16), (32, 16), (48, 2)]
    np.testing.assert_allclose(np.concatenate([c for _, c in chunks], 1), theirs("llama", ids), rtol=0, atol=1e-4)
    assert chunk_tokens(320) == 512
    assert chunk_tokens(152_064) * 152_064 * 4 <= LOGITS_BYTES
    assert chunk_tokens(10**9) == 1


def test_float16_graphs_keep_a_float16_cache_and_give_float32_logits(tmp_path: Path) -> None:
    graph, embedding = running_sum(tmp_path / "sum.onnx")
    backend = OrtBackend(tmp_path / "sum.onnx", facts(1, 1), graph, threads=1)
    ids = random_ids(2, 20, vocab=VOCAB)
    state = backend.new_state(2, 20)
    expected = embedding[ids].cumsum(1)[:, :, :VOCAB]
    for a, b in ((0, 1), (1, 9), (9, 10), (10, 20)):
        logits = backend.step(state, ids[:, a:b])
        assert logits.dtype == np.float32
        assert np.array_equal(logits, expected[:, a:b])
    assert state.cache.nbytes < 2 * 2 * 2 * 20 * 16 * 4


def test_a_shared_cache_is_written_in_place(tmp_path: Path) -> None:
    graph, weights = fused_attention(tmp_path / "gqa.onnx")
    backend = OrtBackend(tmp_path / "gqa.onnx", facts(2, 1), graph, threads=1)
    for rows in (1, 2):
        ids = random_ids(rows, 20, vocab=VOCAB)
        expected = np.stack([fused_attention_reference(weights, row) for row in ids])
        state = backend.new_state(rows, MAX_TOKENS)
        assert state.cache.past is state.cache.present
        for a, b in ((0, 7), (7, 8), (8, 9), (9, 20)):
            np.testing.assert_allclose(backend.step(state, ids[:, a:b]), expected[:, a:b], rtol=0, atol=1e-4)
    padded = backend.new_state(2, MAX_TOKENS, left_padding=[0, 5])
    np.testing.assert_allclose(
        backend.step(padded, np.stack([ids[0], np.roll(ids[1], 5)]))[1, 5:], expected[1, :15], rtol=0, atol=1e-4
    )


def test_one_token_and_guesses_take_turns_without_binding_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, weights = fused_attention(tmp_path / "gqa.onnx")
    backend = OrtBackend(tmp_path / "gqa.onnx", facts(2, 1), graph, threads=1)
    made, io_binding = [], onnxruntime.InferenceSession.io_binding
    monkeypatch.setattr(onnxruntime.InferenceSession, "io_binding", lambda self: made.append(1) or io_binding(self))
    ids = random_ids(1, 24, vocab=VOCAB)
    expected = fused_attention_reference(weights, ids[0])
    state, at = backend.new_state(1, MAX_TOKENS), 0
    for new in (1, 4, 1, 4, 6, 1, 4, 1, 2):
        np.testing.assert_allclose(backend.step(state, ids[:, at : at + new])[0], expected[at : at + new], atol=1e-4)
        at += new
    assert len(made) == 5  # four shapes, and the first of them again once several tokens had moved the logits


def test_pages_go_back_after_a_prompts_chunk_of_large_weights_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, _ = fused_attention(tmp_path / "gqa.onnx")
    backend = OrtBackend(tmp_path / "gqa.onnx", facts(2, 1), graph, threads=1)
    given_back: list[int] = []
    for worth_it, expected in ((False, []), (True, [PROMPT_TOKENS])):
        monkeypatch.setattr(backend._weights, "worth_it", worth_it)
        for tokens in (1, PROMPT_TOKENS - 1, PROMPT_TOKENS):
            monkeypatch.setattr(backend._weights, "release", partial(given_back.append, tokens))
            backend.step(backend.new_state(1, MAX_TOKENS), random_ids(1, tokens, vocab=VOCAB))
        assert given_back == expected


def test_a_graph_that_is_not_the_declared_one_is_refused(tmp_path: Path) -> None:
    graph, _ = running_sum(tmp_path / "g.onnx")
    mask = next(s for s in graph.inputs if s.name == "attention_mask")
    extra = TensorSpec("position_ids", "int64", ("B", "n"))
    cases = [
        (
            replace(graph, inputs=(*graph.inputs, extra)),
            1,
            "input position_ids is absent in the graph and int64 in the",
        ),
        (replace(graph, inputs=tuple(s for s in graph.inputs if s != mask)), 1, "attention_mask is int64 in the graph"),
        (
            replace(graph, outputs=(replace(graph.outputs[0], dtype="float32"), *graph.outputs[1:])),
            1,
            "logits is float16",
        ),
        (graph, 2, r"has no input past_key_values\.1\.key"),
    ]
    for declared, layers, why in cases:
        with pytest.raises(BundleError, match=why):
            OrtBackend(tmp_path / "g.onnx", replace(facts(1, 1), n_layers=layers), declared, threads=1)


def test_a_file_that_is_no_graph_is_refused_in_one_line(tmp_path: Path) -> None:
    graph, _ = running_sum(tmp_path / "g.onnx")
    shutil.copy(__file__, tmp_path / "g.onnx")
    with pytest.raises(BundleError, match=r"onnxruntime .* can't open it") as refusal:
        OrtBackend(tmp_path / "g.onnx", facts(1, 1), graph, threads=1)
    assert "\n" not in str(refusal.value)
