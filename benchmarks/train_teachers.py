"""Train two teachers that know one domain each, as the study uses them, from public text.

    python benchmarks/train_teachers.py --texts FOLDER --out FOLDER --minutes 80              # one after the other, all cores
    python benchmarks/train_teachers.py --texts FOLDER --out FOLDER --teacher wiki            # one of them

FOLDER of texts holds `wikitext-2/{train,valid,test}.txt` and `books/{train,valid,test}.txt`:

- wikitext-2: WikiText-2 by Merity et al. (arXiv 1609.07843), the word-level files as published, renamed. Creative Commons
  Attribution-ShareAlike 3.0. Distributed by its authors and as the data set `wikitext` of the Hugging Face Hub.
- books: works in the public domain from Project Gutenberg (Austen, Carroll, Chesterton, Melville, Milton, Shakespeare, Tolstoy,
  Whitman and so on; about 12 MB), its licence header and footer removed, each work cut 92 % / 4 % / 4 % and the pieces joined.

A byte-level BPE tokenizer of 8,192 tokens is trained on both train files, then two Llamas of different width and depth, each on
its own train file: batches of 8 x 256 tokens, AdamW, one cosine over as many tokens as the minutes allow on this machine
(`--tokens` repeats a schedule elsewhere). Checkpoints are bfloat16; training.json beside each says how it was made. Killed and
started again, it goes on from where it was. The test files are read by nothing but the check that no part overlaps another.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from edgestill.compress.corpus import build_corpus, open_corpus
from edgestill.compress.pretrain import byte_level_bpe, new_llama, pretrain, tokens_in
from edgestill.profiles.schema import DataSpec, SourceSpec, TrainSpec
from edgestill.runtime.progress import Progress

VOCABULARY, CONTEXT, WINDOW, BATCH = 8192, 512, 256, 8
PIECE = 1 << 20
"""Characters of text that the tokenizer's training takes at a time."""


@dataclass(frozen=True)
class Plan:
    """One teacher: the folder of its text and its shape."""

    text: str
    shape: dict[str, int]


PLANS = {
    "wiki": Plan(
        "wikitext-2",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1024},
    ),
    "books": Plan(
        "books", {"hidden_size": 320, "num_hidden_layers": 8, "num_attention_heads": 5, "intermediate_size": 864}
    ),
}
"""Different in width and depth: a student must be able to learn from teachers of different shapes."""


def training_texts(texts: Path) -> Iterator[str]:
    """Both train files, in pieces."""
    for plan in PLANS.values():
        with (texts / plan.text / "train.txt").open(encoding="utf-8") as handle:
            while piece := handle.read(PIECE):
                yield piece


def data_of(plan: Plan, name: str) -> DataSpec:
    """Its three files as training, validation and held-out text."""

    def part(file: str) -> list[SourceSpec]:
        return [SourceSpec(path=f"{plan.text}/{file}.txt", domain=name)]

    return DataSpec(sources=part("train"), validation=part("valid"), held_out=part("test"), sequence_length=WINDOW)


def make_tokenizer(texts: Path, folder: Path, vocabulary: int, progress: Progress) -> None:
    """The tokenizer of both teachers, once."""
    if (folder / "tokenizer.json").is_file():
        return
    progress.stage(f"tokenizer: byte-level BPE of {vocabulary} tokens")
    byte_level_bpe(training_texts(texts), vocabulary, CONTEXT).save_pretrained(folder)


def make_teacher(name: str, arguments: argparse.Namespace, work: Path, progress: Progress) -> None:
    """Train one teacher, unless it is there."""
    out: Path = arguments.out / name
    if (out / "training.json").is_file():
        progress.say(f"{name}: done before ({out})")
        return
    progress.stage(f"teacher {name}")
    plan, own = PLANS[name], work / name
    if not (own / "corpus" / "corpus.json").is_file():
        build_corpus(
            data_of(plan, name),
            lambda path: arguments.texts / path,
            work / "tokenizer",
            own / "corpus",
            seed=0,
            progress=progress,
        )
    corpus = open_corpus(own / "corpus")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    model = new_llama(plan.shape, tokenizer, CONTEXT, arguments.seed)
    spec = TrainSpec(
        tokens=arguments.tokens or BATCH * WINDOW,
        batch_size=BATCH,
        learning_rate=arguments.learning_rate,
        weight_decay=0.1,
        seed=arguments.seed,
    )
    if arguments.tokens is None:
        spec = spec.model_copy(update={"tokens": tokens_in(arguments.minutes, model, corpus, spec, own)})
    progress.say(f"{name}: {spec.tokens:,} tokens of {corpus.training.token_ids.size:,}")
    pretrain(model, tokenizer, corpus, spec, out, own / "run", progress)


def main() -> None:
    """The tokenizer, then the teachers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder per teacher is written here")
    parser.add_argument("--teacher", choices=sorted(PLANS), help="default: both, one after the other")
    parser.add_argument("--minutes", type=float, default=80.0, help="of training, for each teacher")
    parser.add_argument("--tokens", type=lambda text: int(text.replace("_", "")), help="instead of --minutes")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build/study-teachers"), help="what makes it resumable")
    arguments = parser.parse_args()
    for plan in PLANS.values():
        for file in ("train", "valid", "test"):
            if not (path := arguments.texts / plan.text / f"{file}.txt").is_file():
                raise SystemExit(f"{path} is not there; --help says which texts are needed and where they come from")
    progress = Progress()
    make_tokenizer(arguments.texts, arguments.work / "tokenizer", arguments.vocabulary, progress)
    for name in [arguments.teacher] if arguments.teacher else PLANS:
        make_teacher(name, arguments, arguments.work, progress)


if __name__ == "__main__":
    main()
