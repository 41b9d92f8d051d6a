"""Text to tokens, by domain, split into training, validation and held-out.

A document is encoded as the tokenizer encodes a prompt (its own special tokens included) and ends with the
end-of-sequence token. In prompt/response rows only the response and its end token count as labels. The documents of one domain
of a source stay together and are split alone, so each domain has its share in every part. Many documents are cut between
documents, after encoding; few are cut at the end of a paragraph, before it, so that every part is encoded from its own
beginning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgestill.compress.packing import Ints, Stream, cut_stream
from edgestill.compress.sources import Document, Exchange
from edgestill.runtime.errors import BadInput

WHOLE_DOCUMENTS = 20
"""From this many documents on, a domain of a source is cut between documents only."""
BATCH_DOCUMENTS = 256

Encoded = tuple[Ints, npt.NDArray[np.uint8]]
"""Token ids of a document, and 1 for each that counts as a label."""


@dataclass(frozen=True, eq=False)
class EncodedSource:
    """A source, tokenised and split."""

    streams: dict[str, dict[str, Stream]]
    """Domain, in the order of first appearance -> `training` and the shares that were asked for."""
    documents: int
    sha256: str
    """Of the text: each piece of it preceded by its number of UTF-8 bytes."""

    @property
    def domain_tokens(self) -> dict[str, int]:
        """Tokens of each domain, all parts together."""
        return {domain: sum(len(part.token_ids) for part in parts.values()) for domain, parts in self.streams.items()}


def encode_source(
    items: Iterable[Document | Exchange],
    shares: dict[str, float],
    tokenizer: Any,
    dtype: npt.DTypeLike,
    *,
    name: str,
    domain: str,
) -> EncodedSource:
    """Tokenise one source and split each of its domains: `training`, then, in their order, the named shares at its end.

    Args:
        name: of the source, for error messages.
        domain: of items that have none of their own.

    Raises:
        BadInput: no text at all, a tokenizer without an end-of-sequence token, or exchanges it has no template for.
    """
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no eos_token, which ends documents; set one in tokenizer_config.json")
    digest, documents = hashlib.sha256(), 0
    found: dict[str, _Gathered] = {}
    for item in items:
        documents += 1
        for text in _texts_of(item):
            data = text.encode("utf-8", errors="surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        found.setdefault(item.domain or domain, _Gathered(tokenizer, dtype)).add(item)
    if not found:
        raise BadInput(f"data source {name!r} has no text; add some or remove the source")
    streams = {own: gathered.finish(shares) for own, gathered in found.items()}
    return EncodedSource(streams, documents, digest.hexdigest())


class _Gathered:
    """The documents of one domain: text while they are few, tokens a batch at a time from then on."""

    def __init__(self, tokenizer: Any, dtype: npt.DTypeLike) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype
        self.waiting: list[Document | Exchange] = []
        self.encoded: list[Encoded] = []

    def add(self, item: Document | Exchange) -> None:
        self.waiting.append(item)
        if len(self.waiting) == BATCH_DOCUMENTS:
            self.encoded += self._encoded(self.waiting)
            self.waiting = []

    def finish(self, shares: dict[str, float]) -> dict[str, Stream]:
        """`training` and the named shares."""
        few = [item for item in self.waiting if isinstance(item, Document)]
        if not self.encoded and len(few) == len(self.waiting) < WHOLE_DOCUMENTS:
            return {part: _stream(self._encoded(texts), self.dtype) for part, texts in cut_texts(few, shares).items()}
        return cut_stream(_stream(self.encoded + self._encoded(self.waiting), self.dtype), shares)

    def _encoded(self, batch: Sequence[Document | Exchange]) -> list[Encoded]:
        pairs = _encode(batch, self.tokenizer) if batch else ()
        return [(np.asarray(ids, dtype=self.dtype), counted) for ids, counted in pairs]


def _stream(encoded: list[Encoded], dtype: npt.DTypeLike) -> Stream:
    tokens = [np.zeros(0, dtype), *(ids for ids, _ in encoded)]
    counts = [np.zeros(0, np.uint8), *(counted for _, counted in encoded)]
    ends = np.cumsum([len(ids) for ids, _ in encoded], dtype=np.int64)
    return Stream(np.concatenate(tokens), np.concatenate(counts), ends)


def _texts_of(item: Document | Exchange) -> Iterator[str]:
    if isinstance(item, Document):
        yield item.text
    else:
        yield from (text for message in item.prompt for text in (message["role"], message["content"]))
        yield item.response


def _encode(batch: Sequence[Document | Exchange], tokenizer: Any) -> Iterator[tuple[list[int], npt.NDArray[np.uint8]]]:
    exchanges = [item for item in batch if isinstance(item, Exchange)]
    if exchanges:
        yield from _encode_exchanges(exchanges, tokenizer)
        return
    texts = [item for item in batch if isinstance(item, Document)]
    for item, ids in zip(texts, _ids(tokenizer, [item.text for item in texts], special=True), strict=True):
        if item.complete and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
        yield ids, np.ones(len(ids), np.uint8)


def _ids(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _encode_exchanges(batch: list[Exchange], tokenizer: Any) -> Iterator[tuple[list[int], npt.NDArray[np.uint8]]]:
    """Render and encode; what precedes the response is found by rendering the prompt alone with the generation prompt."""
    prompts = _ids(tokenizer, [_render(tokenizer, item, whole=False) for item in batch], special=False)
    wholes = _ids(tokenizer, [_render(tokenizer, item, whole=True) for item in batch], special=False)
    special = np.array(sorted({*tokenizer.all_special_ids, tokenizer.eos_token_id}))
    for item, prompt, ids in zip(batch, prompts, wholes, strict=True):
        if ids[: len(prompt)] != prompt:
            raise BadInput(
                f"{item.where}: the {len(prompt)} tokens of the prompt do not begin the {len(ids)} of prompt and response, "
                "so the loss cannot be kept to the response; end the template's generation prompt at a token boundary"
            )
        closing = np.flatnonzero(np.isin(ids[len(prompt) :], special))
        if len(closing) == 0:
            ids = [*ids, tokenizer.eos_token_id]
        counted = np.zeros(len(ids), np.uint8)
        # Templates may write a line break after the end token; nobody generates past the end.
        counted[len(prompt) : len(prompt) + int(closing[-1]) + 1 if len(closing) else None] = 1
        yield ids, counted


def _render(tokenizer: Any, item: Exchange, *, whole: bool) -> str:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise BadInput(
            f"{item.where}: the tokenizer has no chat template for prompts and responses; add chat_template.jinja"
        )
    answer = [{"role": "assistant", "content": item.response}] if whole else []
    try:
        text: str = tokenizer.apply_chat_template(
            [*item.prompt, *answer], tokenize=False, add_generation_prompt=not whole
        )
    except TemplateError as error:
        raise BadInput(f"{item.where}: the chat template refuses it ({error}); correct the row") from error
    return text


def cut_texts(documents: list[Document], shares: dict[str, float]) -> dict[str, list[Document]]:
    """`training` and the named shares (of the characters) at the end of each of few documents, cut at ends of paragraphs.

    Every document is in every part: the last few of a folder are seldom like the others.
    """
    pieces: dict[str, list[Document]] = {name: [] for name in ("training", *shares)}
    for document in documents:
        length = len(document.text)
        stop, left = length, 1.0
        for name in reversed(shares):
            left -= shares[name]
            here = min(round(left * length), max(0, length - 1))
            start = min(stop, _paragraph_end(document.text, here, round(shares[name] * length) // 4))
            _add_piece(pieces[name], document, start, stop)
            stop = start
        _add_piece(pieces["training"], document, 0, stop)
    return pieces


def _add_piece(pieces: list[Document], document: Document, start: int, stop: int) -> None:
    """Append characters `start` to `stop`; a piece that is cut before its document's end gets no end token."""
    text = document.text[start:stop]
    if text.strip():
        pieces.append(Document(text, complete=document.complete and stop == len(document.text)))


def _paragraph_end(text: str, here: int, reach: int) -> int:
    """The character after the paragraph (else line, else word) end nearest to `here`, at most `reach` away; else `here`."""
    for mark in ("\n\n", "\n", " "):
        before = text.rfind(mark, max(0, here - reach), here)
        after = text.find(mark, here, here + reach)
        found = [at for at in (before, after) if at >= 0]
        if found:
            end = min(found, key=lambda at: abs(at - here))
            while end < len(text) and text[end] == mark[0]:
                end += 1
            return end
    return here
