"""A bundle, opened for use: stream, generate, score.

    model = load("build/quickstart/cpu-x86")
    text = model.generate("It was a bright cold day", max_new_tokens=64).text

One `Model` serves several threads: calls are independent. Each has its own cache and random generator, the weights are shared,
and onnxruntime runs them side by side on one pool of threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgestill.runtime import score as scoring
from edgestill.runtime.backends import F32, I64, Backend
from edgestill.runtime.bundle import Bundle, open_bundle
from edgestill.runtime.chat import TEMPLATE, render_chat
from edgestill.runtime.engines.flavour import is_engine
from edgestill.runtime.errors import BadInput, BundleError, MissingPart, PromptTooLong
from edgestill.runtime.generate import Ending, Generation, Piece, generate_pieces
from edgestill.runtime.manifest import Manifest, ModelFacts
from edgestill.runtime.manifest_reader import TOKENIZER
from edgestill.runtime.sampling import Sampler, SamplingOptions
from edgestill.runtime.settings import SessionSettings, default_threads, read_settings
from edgestill.runtime.speculation import Drafter, DraftModel, PromptLookup
from edgestill.runtime.text import Detokenizer, StopStrings

DEFAULTS = SamplingOptions()
GENERATION_CONFIG = "generation_config.json"


def load(path: str | Path, *, verify: bool = True, threads: int | None = None) -> Model:
    """Open the bundle in folder `path`.

    `verify=False` skips the hashes of the files (the manifest's digest and the folder's structure are always checked).
    `threads`: None takes what `edgestill tune` chose on this machine, else those of the profile, at most the processors of this
    process.

    Raises:
        BundleError: the bundle is damaged, incomplete, unsafe or too new.
        MissingPart: its engine is not here: TensorRT, the driver or the GPU.

    An engine that was not built on this machine yet is built now, which may take minutes (`edgestill engine` does it before).
    """
    if threads is not None and threads < 1:
        raise BadInput(f"threads is {threads}; give at least 1")
    bundle = open_bundle(Path(path), verify)
    return Model(bundle, open_backend(bundle, threads))


def open_backend(bundle: Bundle, threads: int | None = None) -> Backend:
    """The engine that the bundle's profile names, with the bundle's graph in it."""
    engine, wanted = bundle.manifest.engine, bundle.manifest.profile.get("device", {}).get("threads")
    if is_engine(engine):
        from edgestill.runtime.engines.opening import (
            open_engine,
        )  # a process without a GPU is spared what builds engines

        return open_engine(bundle)
    if engine not in ("onnxruntime-cpu", "onnxruntime-cuda"):
        raise MissingPart(
            f"the engine {engine} of this bundle can't be run here", "build it for engine onnxruntime-cpu"
        )
    if wanted is not None and (type(wanted) is not int or wanted < 1):
        raise BundleError(
            f"{bundle.folder}: device.threads is {wanted!r}, not a positive integer; build the bundle again"
        )
    settings = read_settings(bundle) or SessionSettings(default_threads(bundle))
    return open_with(bundle, replace(settings, threads=threads) if threads is not None else settings)


def open_with(bundle: Bundle, settings: SessionSettings) -> Backend:
    """The bundle's graph in onnxruntime, with these settings."""
    from edgestill.runtime.backends.ort import OrtBackend

    graph = bundle.manifest.graph
    return OrtBackend(
        bundle.path(graph.file),
        bundle.manifest.model,
        graph,
        threads=settings.threads,
        session_options=settings.session_options,
        prefill_chunk=settings.prefill_chunk,
        device="cuda" if bundle.manifest.engine == "onnxruntime-cuda" else "cpu",
    )


class Model:
    """A causal language model with its tokenizer. Several threads may use one: calls are independent."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        """Use `load`; this takes the parts apart for those who bring their own backend."""
        self.bundle = bundle
        self.backend = backend
        bundle.path(
            TOKENIZER
        )  # its hash is checked now; it is read when text is, for it may take as much memory as a cache
        self._eos_token_ids = _eos_token_ids(bundle)
        self._template = bundle.path(TEMPLATE).read_text("utf-8") if TEMPLATE in bundle else None

    @cached_property
    def _tokenizer(self) -> Any:
        return _open_tokenizer(self.bundle)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    @property
    def manifest(self) -> Manifest:
        """What ships, what it is, where it came from."""
        return self.bundle.manifest

    @property
    def facts(self) -> ModelFacts:
        """Sizes, lengths and special tokens of the model."""
        return self.bundle.manifest.model

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. A rendered chat has its special tokens already: `add_special_tokens=False`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt for chat `messages`, by the bundle's template; tokenize it with `add_special_tokens=False`.

        Raises:
            BadInput: the bundle has no template, or the template refuses the messages.
        """
        if self._template is None:
            raise BadInput(f"this bundle has no {TEMPLATE}: the model was not trained on chats; use generate or stream")
        bos, eos = self.facts.bos_token_id, next(iter(self.facts.eos_token_ids), None)
        return render_chat(
            self._template,
            messages,
            bos_token=self._token_text(bos),
            eos_token=self._token_text(eos),
            add_generation_prompt=add_generation_prompt,
        )

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        temperature: float = DEFAULTS.temperature,
        top_k: int = DEFAULTS.top_k,
        top_p: float = DEFAULTS.top_p,
        min_p: float = DEFAULTS.min_p,
        repetition_penalty: float = DEFAULTS.repetition_penalty,
        seed: int | None = DEFAULTS.seed,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        draft: Literal["lookup"] | Model | None = None,
    ) -> Iterator[Piece]:
        """Continue `prompt` (text or token ids), one `Piece` per token. Leaving the loop stops the work.

        `max_new_tokens`: None takes what fits. `stop`: strings that end the text and are not part of it. The sampling
        arguments are those of `SamplingOptions`. `draft`: where guesses come from that are verified along with a token, the text
        itself or a smaller model; they change no choice, but their number follows the clock, and with it the last bits of the
        logits: a seeded draw that falls on such a bit may differ. Arguments are checked now, the work begins with the first piece.

        Raises:
            PromptTooLong: prompt and new tokens exceed the model's length. Nothing is truncated.
            BadInput: any other argument that can't be used.
        """
        options = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        prompt_ids = self._prompt_ids(prompt)
        ending = Ending(
            self._room(len(prompt_ids), max_new_tokens),
            self._eos_token_ids,
            frozenset(self._checked_ids(stop_token_ids, "stop_token_ids").tolist()),
        )
        stops = StopStrings([stop] if isinstance(stop, str) else list(stop))
        sampler = Sampler(options, self.facts.vocab_size, prompt_ids)
        drafter = self._drafter(draft, len(prompt_ids) + ending.max_new_tokens)
        return generate_pieces(self.backend, prompt_ids, sampler, self.detokenizer(), stops, ending, drafter)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        temperature: float = DEFAULTS.temperature,
        top_k: int = DEFAULTS.top_k,
        top_p: float = DEFAULTS.top_p,
        min_p: float = DEFAULTS.min_p,
        repetition_penalty: float = DEFAULTS.repetition_penalty,
        seed: int | None = DEFAULTS.seed,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        draft: Literal["lookup"] | Model | None = None,
    ) -> Generation:
        """`stream` to its end: the whole text, its tokens, why it ended, and the timings."""
        pieces = list(
            self.stream(
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                stop=stop,
                stop_token_ids=stop_token_ids,
                draft=draft,
            )
        )
        statistics = pieces[-1].statistics
        if statistics is None:
            raise RuntimeError("the last piece of a stream has no statistics")
        return Generation(
            text="".join(p.text for p in pieces),
            token_ids=tuple(p.token_id for p in pieces),
            logprobs=tuple(p.logprob for p in pieces),
            finish_reason=statistics.finish_reason,
            statistics=statistics,
        )

    def score(self, token_ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> F32:
        """log p(token i | tokens before it), i = 1 .. n - 1: float32 [n - 1], nats.

        Raises:
            BadInput: no token, or one outside the vocabulary. PromptTooLong: more tokens than the model takes.
        """
        ids = self._checked_ids(token_ids, "token_ids")
        if ids.ndim != 1 or ids.size == 0:
            raise BadInput(f"token_ids has shape {ids.shape}; give a list of at least one token")
        self._room(ids.size - 1, 1)
        return scoring.score(self.backend, ids)

    def forward_windows(
        self, token_ids: npt.NDArray[np.integer[Any]], path: scoring.ScorePath = "prefill"
    ) -> Iterator[tuple[int, F32]]:
        """Logits of every position of `token_ids` (integers [B, T]): see `score.forward_windows`.

        Raises:
            BadInput, PromptTooLong: as `score`, when called.
        """
        ids = self._checked_ids(token_ids, "token_ids")
        if ids.ndim != 2 or ids.size == 0:
            raise BadInput(f"token_ids has shape {ids.shape}; give [windows, tokens]")
        if path not in ("prefill", "cached"):
            raise BadInput(f"path is {path!r}; give 'prefill' or 'cached'")
        self._room(ids.shape[1] - 1, 1)
        return scoring.forward_windows(self.backend, ids, path=path)

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental detokenizer, for tokens that come from elsewhere."""
        return Detokenizer(self._tokenizer.decode, self._special_ids)

    def _drafter(self, draft: Literal["lookup"] | Model | None, tokens: int) -> Drafter | None:
        """A fresh source of guesses for a text of so many tokens."""
        if draft is None:
            return None
        if not self.backend.rewinds:
            raise BadInput("this model's cache can't be rewound, so guesses can't be taken back; leave draft out")
        if draft == "lookup":
            return PromptLookup()
        if not isinstance(draft, Model):
            raise BadInput(f"draft is {draft!r}; give 'lookup', a loaded model or None")
        ours, theirs = self._tokenizer.get_vocab(), draft._tokenizer.get_vocab()
        if ours != theirs or self.facts.vocab_size != draft.facts.vocab_size:
            raise BadInput(
                f"the draft model {draft.manifest.name} has another vocabulary; give a student of the same teachers"
            )
        return DraftModel(draft.backend, tokens)

    def _token_text(self, token_id: int | None) -> str:
        return "" if token_id is None else self._tokenizer.id_to_token(token_id) or ""

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        checked: list[int] = self._checked_ids(ids, "prompt").tolist()
        if not checked and self.facts.bos_token_id is not None:
            return [self.facts.bos_token_id]
        if not checked:
            raise BadInput("the prompt is empty and the model has no token to begin with; give at least one token")
        return checked

    def _checked_ids(self, token_ids: Sequence[int] | npt.NDArray[np.integer[Any]], name: str) -> I64:
        ids = np.asarray(token_ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise BadInput(f"{name} holds {ids.dtype}; give whole numbers")
        limit = self.facts.vocab_size
        if ids.size and (ids.min() < 0 or ids.max() >= limit):
            worst = int(ids.min() if ids.min() < 0 else ids.max())
            raise BadInput(f"{name} holds {worst}; the vocabulary has ids 0..{limit - 1}")
        return ids.astype(np.int64)

    def _room(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """New tokens to make: `max_new_tokens`, or what fits."""
        limit = self.facts.max_tokens
        if max_new_tokens is not None and (isinstance(max_new_tokens, bool) or max_new_tokens < 1):
            raise BadInput(f"max_new_tokens is {max_new_tokens!r}; give at least 1")
        new = max(1, limit - prompt_tokens) if max_new_tokens is None else max_new_tokens
        if prompt_tokens + new > limit:
            raise PromptTooLong(
                f"{prompt_tokens} prompt + {new} new tokens exceed the {limit} of this model; shorten the prompt or ask for less"
            )
        return new


def _open_tokenizer(bundle: Bundle) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle.path(TOKENIZER)))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _eos_token_ids(bundle: Bundle) -> frozenset[int]:
    """Those of generation_config.json (it may know more than the model's config), else the manifest's."""
    facts = bundle.manifest.model
    if GENERATION_CONFIG not in bundle:
        return frozenset(facts.eos_token_ids)
    path = bundle.path(GENERATION_CONFIG)
    try:
        found = json.loads(path.read_bytes()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise BundleError(f"{path}: not a JSON object ({error}); copy or build the bundle again") from error
    if found is None:
        return frozenset(facts.eos_token_ids)
    ids = found if isinstance(found, list) else [found]
    if not all(type(i) is int and 0 <= i < facts.vocab_size for i in ids):
        raise BundleError(f"{path}: eos_token_id is {found!r}, not ids of the vocabulary; build the bundle again")
    return frozenset(ids)
