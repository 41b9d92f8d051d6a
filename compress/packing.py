"""Documents to windows: tokens back to back, cut into rows of T, with the labels that count and standard-error blocks.

A document is encoded as the tokenizer encodes a prompt (its own special tokens included) and ends with the
end-of-sequence token. In prompt/response rows only the response and its end token count as labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from edgestill.compress.sources import Document, Exchange
from edgestill.runtime.errors import BadInput

WHOLE_DOCUMENTS = 20
"""From this many documents on, a source is cut between documents only; below, inside one, at the end of a paragraph."""
BLOCK_WINDOWS = 4
"""Longest standard-error block, in windows: neighbours in one document are not independent samples."""
BATCH_DOCUMENTS = 256

Ints = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Part:
    """Training, validation or held-out text as n windows of T tokens.

    token_ids: uint16 or uint32 [n, T]; loss_mask: uint8 [n, T], 1 where token i is a label that counts, None when all do;
    domain int16 [n] (index into Corpus.domains); block int32 [n] (windows of one block are one stretch of one document);
    source int16 [n] (index into Corpus.sources).
    """

    token_ids: npt.NDArray[Any]
    loss_mask: npt.NDArray[np.uint8] | None
    domain: npt.NDArray[np.int16]
    block: npt.NDArray[np.int32]
    source: npt.NDArray[np.int16]

    @property
    def n_windows(self) -> int:
        return int(self.token_ids.shape[0])


@dataclass(frozen=True, eq=False)
class Stream:
    """A tokenised source: token_ids [n], counts uint8 [n] (labels that count), ends int64 [documents] (exclusive)."""

    token_ids: Ints
    counts: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]
    sha256: str = ""
    """Of the text: each document's UTF-8 bytes preceded by their number."""
    texts: tuple[str, ...] = ()
    """The documents themselves while there are few of plain text, so that one can be cut at a paragraph."""

    def between(self, start: int, stop: int) -> Stream:
        """Tokens start to stop; a document that is cut ends there."""
        inside = self.ends[(self.ends > start) & (self.ends < stop)] - start
        ends = np.append(inside, stop - start) if stop > start else inside
        return Stream(self.token_ids[start:stop], self.counts[start:stop], ends.astype(np.int64))

    @classmethod
    def joined(cls, streams: Sequence[Stream]) -> Stream:
        """One after the other."""
        offsets = np.cumsum([0, *(len(stream.token_ids) for stream in streams)])
        return cls(
            np.concatenate([stream.token_ids for stream in streams]),
            np.concatenate([stream.counts for stream in streams]),
            np.concatenate([stream.ends + offset for stream, offset in zip(streams, offsets, strict=False)]),
        )

    def shuffled(self, rng: np.random.Generator) -> Stream:
        """The same documents in another order: neighbours in a file are often alike, and a window should not be."""
        starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)
        order = rng.permutation(len(self.ends))
        index = np.concatenate([np.arange(starts[i], self.ends[i]) for i in order])
        ends = np.cumsum((self.ends - starts)[order])
        return Stream(self.token_ids[index], self.counts[index], ends.astype(np.int64), self.sha256)


def encode_source(items: Iterable[Document | Exchange], tokenizer: Any, dtype: npt.DTypeLike, name: str) -> Stream:
    """Tokenise one source.

    Raises:
        BadInput: no text at all, a tokenizer without an end-of-sequence token, or exchanges it has no template for.
    """
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no eos_token, which ends documents; set one in tokenizer_config.json")
    digest = hashlib.sha256()
    tokens: list[Ints] = []
    counts: list[npt.NDArray[np.uint8]] = []
    texts: list[str] = []
    iterator, few = iter(items), True
    while batch := list(islice(iterator, BATCH_DOCUMENTS)):
        for text in _texts_of(batch):
            data = text.encode("utf-8", errors="surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        for ids, counted in _encode(batch, tokenizer):
            tokens.append(np.asarray(ids, dtype=dtype))
            counts.append(counted)
        few = few and len(tokens) < WHOLE_DOCUMENTS and all(isinstance(item, Document) for item in batch)
        texts = [*texts, *_texts_of(batch)] if few else []
    if not tokens:
        raise BadInput(f"data source {name!r} has no text; add some or remove the source")
    ends = np.cumsum([len(ids) for ids in tokens]).astype(np.int64)
    return Stream(np.concatenate(tokens), np.concatenate(counts), ends, digest.hexdigest(), tuple(texts))


def _texts_of(items: list[Document | Exchange]) -> Iterator[str]:
    for item in items:
        if isinstance(item, Document):
            yield item.text
        else:
            yield from (text for message in item.prompt for text in (message["role"], message["content"]))
            yield item.response


def _encode(batch: list[Document | Exchange], tokenizer: Any) -> Iterator[tuple[list[int], npt.NDArray[np.uint8]]]:
    exchanges = [item for item in batch if isinstance(item, Exchange)]
    if exchanges:
        yield from _encode_exchanges(exchanges, tokenizer)
        return
    eos = tokenizer.eos_token_id
    for ids in _ids(tokenizer, [item.text for item in batch if isinstance(item, Document)], special=True):
        if not ids or ids[-1] != eos:
            ids = [*ids, eos]
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


def cut_near(stream: Stream, position: int, tokenizer: Any) -> int:
    """Where to cut `stream` near token `position`: between documents, or in plain text of few documents at a paragraph end."""
    if not stream.texts:
        inner = stream.ends[:-1]
        return int(inner[np.argmin(np.abs(inner - position))]) if len(inner) else len(stream.token_ids)
    position = min(position, len(stream.token_ids) - 1)
    number = int(np.searchsorted(stream.ends, position, side="right"))
    start = int(stream.ends[number - 1]) if number else 0
    encoded = tokenizer(stream.texts[number], return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    # Special tokens at the end have the offset (0, 0).
    offsets = np.maximum.accumulate(np.asarray(encoded["offset_mapping"], dtype=np.int64)[:, 0])
    here = int(offsets[min(position - start, len(offsets) - 1)])
    left = int(stream.ends[number]) - position
    reach = max(256, left // 4)  # characters: no more than about a sixteenth of the part
    end = _paragraph_end(stream.texts[number], here, reach)
    return start + int(np.searchsorted(offsets, end, side="left"))


def _paragraph_end(text: str, here: int, reach: int) -> int:
    """The character after the paragraph (failing that, line) end nearest to `here`, at most `reach` away; else `here`."""
    for mark in ("\n\n", "\n"):
        before = text.rfind(mark, max(0, here - reach), here)
        after = text.find(mark, here, here + reach)
        found = [at for at in (before, after) if at >= 0]
        if found:
            nearest = min(found, key=lambda at: abs(at - here))
            return nearest + len(text[nearest:]) - len(text[nearest:].lstrip("\n"))
    return here


def split(stream: Stream, shares: dict[str, float], tokenizer: Any) -> dict[str, Stream]:
    """`training` and, in the order of `shares`, the named stretches at the end of `stream`, each of about its share."""
    pieces, stop, left = {}, len(stream.token_ids), 1.0
    for name in reversed(shares):
        left -= shares[name]
        start = min(stop, cut_near(stream, round(left * len(stream.token_ids)), tokenizer))
        pieces[name] = stream.between(start, stop)
        stop = start
    return {**pieces, "training": stream.between(0, stop)}


def pack(streams: list[tuple[Stream, int, int]], length: int) -> Part:
    """Windows of `length` tokens from (stream, source index, domain index); what is left at a source's end is dropped."""
    rows, masks, domains, blocks, sources = [], [], [], [], []
    first_block = 0
    for stream, source, domain in streams:
        n = len(stream.token_ids) // length
        rows.append(stream.token_ids[: n * length].reshape(n, length))
        masks.append(stream.counts[: n * length].reshape(n, length))
        block = window_blocks(stream.ends, n, length) + first_block
        first_block = int(block[-1]) + 1 if n else first_block
        blocks.append(block)
        domains.append(np.full(n, domain, np.int16))
        sources.append(np.full(n, source, np.int16))
    mask = np.concatenate(masks)
    return Part(
        token_ids=np.concatenate(rows),
        loss_mask=None if mask.all() else mask,
        domain=np.concatenate(domains),
        block=np.concatenate(blocks).astype(np.int32),
        source=np.concatenate(sources),
    )


def window_blocks(ends: npt.NDArray[np.int64], n: int, length: int) -> npt.NDArray[np.int32]:
    """int32 [n]: at most BLOCK_WINDOWS neighbours that lie in one document share a block; a window of several has its own.

    Documents of 10 windows: blocks 0 0 0 0 1 1 1 1 2 2. `ends` are the documents' exclusive ends in tokens.
    """
    if n == 0:
        return np.zeros(0, np.int32)
    starts = np.arange(n, dtype=np.int64) * length
    first = np.searchsorted(ends, starts, side="right")
    inside = first == np.searchsorted(ends, starts + length - 1, side="right")
    fresh = np.ones(n, bool)
    fresh[1:] = ~inside[1:] | ~inside[:-1] | (first[1:] != first[:-1])
    run_start = np.maximum.accumulate(np.where(fresh, np.arange(n), 0))
    fresh |= (np.arange(n) - run_start) % BLOCK_WINDOWS == 0
    return (np.cumsum(fresh) - 1).astype(np.int32)
