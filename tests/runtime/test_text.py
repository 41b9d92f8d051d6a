"""Pieces of text joined are the text: whole characters only, ended before the first stop string."""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgestill.runtime.errors import BadInput
from edgestill.runtime.text import Detokenizer, StopStrings, without_unfinished


@functools.cache
def byte_level() -> Tokenizer:
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), merges=[("t", "h"), ("Ġ", "th"), ("ð", "Ł"), ("â", "Ĥ"), ("ðŁ", "ĺ")])
        return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


@functools.cache
def sentencepiece_like() -> Tokenizer:
    """What a Llama 2 tokenizer.json holds: byte fallback, U+2581 for spaces, the first space stripped."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdehlort,.", "▁h", "▁hello", "lo"]
    merges = [("▁", "h")]
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The whole text of byte-level tokens, without an unfinished character at its end."""
    return without_unfinished(tokenizer.decode(ids))


def decoded_by_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The whole text of sentencepiece-like tokens by way of their bytes.

    Independent of the tokenizer's decoder, which shows every byte of a run as U+FFFD when the run's end is cut.
    """
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    names = [tokenizer.id_to_token(i) for i in ids if i not in special]
    data = b"".join(
        bytes([int(n[3:5], 16)]) if re.fullmatch("<0x..>", n) else n.replace("▁", " ").encode() for n in names
    )
    return codecs.getincrementaldecoder("utf-8")().decode(data).removeprefix(" ")


def naive(decode: Callable[[Sequence[int]], str], ids: Sequence[int], stops: Sequence[str]) -> str:
    """Decode everything again after every token; end before the earliest stop string of the first text that has one."""
    text = ""
    for n in range(1, len(ids) + 1):
        text = decode(ids[:n])
        starts = [text.find(s) for s in stops if s in text]
        if starts:
            return text[: min(starts)]
    return text


def streamed(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str], special: Sequence[int] = ()) -> list[str]:
    detokenizer, stop_strings = Detokenizer(tokenizer.decode, special), StopStrings(stops)
    pieces = []
    for token in ids:
        pieces.append(stop_strings.push(detokenizer.push(token)))
        if stop_strings.stopped:
            return pieces
    return [*pieces, stop_strings.flush()]


@settings(max_examples=250, deadline=None)
@given(
    ids=st.lists(st.integers(0, 261), max_size=40),
    stops=st.lists(st.text("thaé€ \n", min_size=1, max_size=4), max_size=3),
)
def test_any_tokens_of_a_byte_level_tokenizer(ids: list[int], stops: list[str]) -> None:
    assert "".join(streamed(byte_level(), ids, stops, [0])) == naive(partial(decoded, byte_level()), ids, stops)


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("helo th,.é€😀\n", max_size=30),
    cut=st.integers(0, 100),
    stops=st.lists(st.text("helo€😀 ", min_size=1, max_size=4), max_size=3),
    specials=st.lists(st.integers(0, 100), max_size=3),
)
@pytest.mark.parametrize(
    ("tokenizer", "decode"),
    [(byte_level, decoded), (sentencepiece_like, decoded_by_bytes)],
    ids=["byte_level", "sentencepiece_like"],
)
def test_any_text_cut_anywhere_with_special_tokens_between(
    tokenizer: Callable[[], Tokenizer],
    decode: Callable[[Tokenizer, Sequence[int]], str],
    text: str,
    cut: int,
    stops: list[str],
    specials: list[int],
) -> None:
    kind = tokenizer()
    ids = kind.encode(text).ids[:cut]
    special = kind.token_to_id("</s>") or 0
    for at in specials:
        ids.insert(min(at, len(ids)), special)
    assert "".join(streamed(kind, ids, stops, [special])) == naive(partial(decode, kind), ids, stops)


def test_bytes_that_are_no_character_do_not_take_back_what_was_shown() -> None:
    """Byte fallback decodes a run of bytes as a whole: one stray byte turns the character before it into U+FFFD."""
    tokenizer = sentencepiece_like()
    euro, stray, letter = tokenizer.encode("€").ids[-3:], tokenizer.token_to_id("<0xFF>"), tokenizer.token_to_id("a")
    assert tokenizer.decode([*euro, stray, letter]) == "\ufffd" * 4 + "a"
    assert "".join(streamed(tokenizer, [*euro, stray, letter], [])) == "€\ufffda"


def test_a_character_is_shown_with_its_last_byte() -> None:
    ids = byte_level().encode("a😀b").ids
    pieces = streamed(byte_level(), ids, [])
    assert [p for p in pieces if p] == ["a", "😀", "b"]
    assert "".join(streamed(byte_level(), ids[:-2], [])) == "a"


def test_only_what_could_become_a_stop_string_is_held() -> None:
    stops = StopStrings(["</s>", "<|end"])
    assert [stops.push(t) for t in ("a <", "b <", "|e", "x<", "/")] == ["a ", "<b ", "", "<|ex", ""]
    assert not stops.stopped
    assert stops.push("s> and more") == ""
    assert stops.stopped
    assert stops.flush() == ""


def test_text_before_a_stop_string_is_kept_and_an_unfinished_one_is_flushed() -> None:
    stops = StopStrings(["\n\n"])
    assert stops.push("one\n") == "one"
    assert stops.push("two\n") == "\ntwo"
    assert stops.flush() == "\n"


def test_the_earliest_of_overlapping_stop_strings_ends_the_text() -> None:
    stops = StopStrings(["cd", "bcx", "bc"])
    assert stops.push("abcd") == "a"


@pytest.mark.parametrize("stop", ["", 3])
def test_an_empty_stop_string_is_refused(stop: object) -> None:
    with pytest.raises(BadInput, match="at least one character"):
        StopStrings([stop])  # type: ignore[list-item]
