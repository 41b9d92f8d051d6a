"""Train the two teachers of the quickstart, one per domain, with the project's own trainer (cross-entropy only).

    python examples/quickstart/train_teachers.py verse            # one of them, on all cores
    python examples/quickstart/train_teachers.py prose --tokens 200_000 --out /tmp/try

Each teacher sees only its own folder of `corpus/`, cut as the recipe cuts it (the last shares of every work are validation and
held-out text, which no teacher sees). The checkpoint is stored in bfloat16; `training.json` beside it says how it was made.
Killed and started again, it goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from edgestill.compress.corpus import build_corpus, open_corpus
from edgestill.compress.pretrain import new_llama, pretrain
from edgestill.profiles.schema import DataSpec, SourceSpec, SplitSpec, TrainSpec
from edgestill.runtime.progress import Progress

HERE = Path(__file__).parent
SHAPES = {
    "verse": {"hidden_size": 224, "num_hidden_layers": 4, "num_attention_heads": 7, "intermediate_size": 576},
    "prose": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 672},
}
"""Different widths on purpose: a student must be able to learn from teachers of different shapes."""
MAX_TOKENS = 512


def recipe(domain: str, tokens: int, seed: int) -> tuple[DataSpec, TrainSpec]:
    """What is trained on, and how."""
    data = DataSpec(
        sources=[SourceSpec(path=f"corpus/{domain}", domain=domain)],
        validation=SplitSpec(fraction=0.04),
        held_out=SplitSpec(fraction=0.04),
        sequence_length=256,
    )
    return data, TrainSpec(tokens=tokens, batch_size=8, learning_rate=2e-3, weight_decay=0.1, seed=seed)


def main() -> None:
    """Train one teacher and store it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=sorted(SHAPES))
    parser.add_argument("--tokens", type=lambda text: int(text.replace("_", "")), default=2_400_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "teachers")
    parser.add_argument("--work", type=Path, default=Path("build/quickstart-teachers"))
    arguments = parser.parse_args()
    progress = Progress()
    data, spec = recipe(arguments.domain, arguments.tokens, arguments.seed)
    work = arguments.work / arguments.domain
    build_corpus(data, lambda path: HERE / path, HERE / "tokenizer", work / "corpus", seed=0, progress=progress)
    corpus = open_corpus(work / "corpus")
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tokenizer")
    model = new_llama(SHAPES[arguments.domain], tokenizer, MAX_TOKENS, arguments.seed)
    pretrain(model, tokenizer, corpus, spec, arguments.out / arguments.domain, work / "run", progress)


if __name__ == "__main__":
    main()
