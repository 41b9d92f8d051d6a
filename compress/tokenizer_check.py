"""Teachers must read text alike: same tokens, same ids, same encodings of 1,000 probe strings.

Equal vocabulary sizes prove nothing: two tokenizers of one size may differ in a merge, a normaliser or the special tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgestill.runtime.errors import BadInput

PROBES = 1000
SPECIAL = ("bos_token_id", "eos_token_id", "unk_token_id")
"""Padding is left out: nothing here pads, and releases of one model often differ in it."""

WORDS = (
    "the",
    "naïve",
    "Straße",
    "don't",
    "re-entry",
    "e.g.",
    "İstanbul",
    "coöperate",
    "fjörd",
    "HTTPServer",
    "snake_case",
)
SCRIPTS = (
    "日本語の文",
    "中文字符",
    "한국어",
    "Привет",
    "γειά",
    "שלום",
    "مرحبا",
    "हिन्दी",
    "ไทย",
    "ქართული",
    "👩‍👩‍👧‍👦🇪🇺",
)
CODE = (
    "def f(x):\n    return x**2",
    "for(i=0;i<n;++i){}",
    "SELECT * FROM t;",
    "<a href='#'>x</a>",
    "\\frac{a}{b}",
    "&&||!=",
)
SPACE = (" ", "  ", "\n", "\n\n", "\t", "\r\n", " \n ", "\u00a0", "\u200b", "\u3000", "        ")
PUNCTUATION = ("...", "?!", "“quoted”", "—", "«»", "§4.2", "(a)", "[1]", "'s", "'LL", "€5", "™", "½", "x²")


def probe_strings(seed: int = 0) -> list[str]:
    """PROBES strings, the same for the same seed: words, numbers, code, white space, many scripts, stray code points."""
    rng = random.Random(seed)

    def piece() -> str:
        kind = rng.randrange(8)
        if kind < 6:
            return rng.choice((WORDS, SCRIPTS, CODE, SPACE, PUNCTUATION, WORDS)[kind])
        if kind == 6:
            return rng.choice(("", "-", "0x", "1.")) + str(rng.randrange(10 ** rng.randrange(1, 12)))
        return "".join(chr(rng.choice((rng.randrange(32, 0x250), rng.randrange(0x250, 0xD800)))) for _ in range(3))

    joints = ("", " ", "", "\n")
    return ["".join(piece() + rng.choice(joints) for _ in range(rng.randrange(1, 12))) for _ in range(PROBES)]


def load_tokenizer(folder: Path, name: str, *, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer in `folder`; `name` is what an error calls it.

    Raises:
        BadInput: no tokenizer.json there, or files that transformers cannot read.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise BadInput(
            f"{name}: {folder} holds no tokenizer.json; write it with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        if not isinstance(error, (OSError, ValueError)) and type(error) is not Exception:
            raise  # what the tokenizers library cannot read, it reports as a plain Exception
        reason = " ".join(str(error).split())[:160]
        raise BadInput(f"{name}: the tokenizer in {folder} cannot be loaded ({reason}); correct its files") from error
    if not tokenizer.is_fast:
        raise BadInput(f"{name}: {folder} names a slow tokenizer class; name a fast one in tokenizer_config.json")
    return tokenizer


def real_vocabulary(tokenizer: Any) -> int:
    """Ids a tokenizer can produce: len(tokenizer), or more where its ids have holes. Never the padded width of a head."""
    highest: int = max(tokenizer.get_vocab().values())
    return max(len(tokenizer), highest + 1)


def compare_tokenizers(names: Sequence[str], tokenizers: Sequence[Any]) -> int:
    """The real vocabulary size that all `tokenizers` share.

    Raises:
        BadInput: the first difference: a token, a special token, or a probe string, with both ids.
    """
    first, probes = tokenizers[0], probe_strings()
    expected = first(probes, return_attention_mask=False, verbose=False)["input_ids"]
    for name, other in zip(names[1:], tokenizers[1:], strict=True):
        pair = f"teachers {names[0]!r} and {name!r} do not share a tokenizer"
        repair = "use teachers of one tokenizer family"
        _compare_vocabularies(first.get_vocab(), other.get_vocab(), pair, repair)
        for field in SPECIAL:
            ours, theirs = getattr(first, field), getattr(other, field)
            if ours != theirs:
                raise BadInput(f"{pair}: {field} is {ours} in one and {theirs} in the other; {repair}")
        found = other(probes, return_attention_mask=False, verbose=False)["input_ids"]
        for probe, ours, theirs in zip(probes, expected, found, strict=True):
            if ours != theirs:
                at = next(
                    (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                    min(len(ours), len(theirs)),
                )
                raise BadInput(
                    f"{pair}: {probe[:60]!r} becomes {_around(ours, at)} in one and {_around(theirs, at)} in the other "
                    f"(from token {at}); {repair}"
                )
    return real_vocabulary(first)


def _compare_vocabularies(ours: dict[str, int], theirs: dict[str, int], pair: str, repair: str) -> None:
    if ours == theirs:
        return
    tokens = sorted(ours.keys() | theirs.keys(), key=lambda t: (min(ours.get(t, 1 << 60), theirs.get(t, 1 << 60)), t))
    token = next(t for t in tokens if ours.get(t) != theirs.get(t))
    ids = [str(v[token]) if token in v else "missing" for v in (ours, theirs)]
    raise BadInput(
        f"{pair}: token {token!r} is {ids[0]} of {len(ours)} in one and {ids[1]} of {len(theirs)} in the other; {repair}"
    )


def _around(ids: list[int], at: int) -> list[int]:
    return ids[at : at + 5]
