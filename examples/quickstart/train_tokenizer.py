"""Train the quickstart's tokenizer: byte-level BPE, 4,096 tokens, on the training share of the corpus.

    python examples/quickstart/train_tokenizer.py

Any UTF-8 text survives encode and decode unchanged: the alphabet is the 256 bytes, nothing is normalised, and no space
is added in front. Digits stand alone, so that numbers are not memorised in chunks. `<|endoftext|>` is token 0 and both
begins and ends a text. The same corpus gives the same files, byte for byte.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from edgestill.compress.pretrain import byte_level_bpe

HERE = Path(__file__).resolve().parent
VOCABULARY = 4096
MAX_TOKENS = 512
TRAINING_SHARE = 0.92
"""The rest of each work is validation and held-out text, which must not shape the tokenizer it is judged with."""


def training_texts(corpus: Path) -> Iterator[str]:
    """The first 92 % of each work's characters, works in the order of their paths."""
    for path in sorted(corpus.glob("*/*.txt")):
        text = path.read_text(encoding="utf-8")
        yield text[: int(len(text) * TRAINING_SHARE)]


def train(corpus: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `corpus`/*/*.txt."""
    return byte_level_bpe(training_texts(corpus), VOCABULARY, MAX_TOKENS, digits_alone=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the quickstart's tokenizer.")
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus", help="folder of <domain>/<work>.txt")
    parser.add_argument("--out", type=Path, default=HERE / "tokenizer", help="folder to write")
    arguments = parser.parse_args()
    tokenizer = train(arguments.corpus)
    tokenizer.save_pretrained(arguments.out)
    print(f"{len(tokenizer)} tokens -> {arguments.out}")


if __name__ == "__main__":
    main()
