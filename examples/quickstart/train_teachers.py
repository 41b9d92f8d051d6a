"""Train the two teachers of the quickstart, one per domain, with the project's own trainer (cross-entropy only).

    python examples/quickstart/train_teachers.py verse            # one of them, on all cores
    python examples/quickstart/train_teachers.py prose --tokens 200_000 --out /tmp/try

Each teacher sees only its own folder of `corpus/`, cut as the recipe cuts it (the last shares of every work are validation and
held-out text, which no teacher sees). The checkpoint is stored in bfloat16; `training.json` beside it says how it was made.
Killed and started again, it goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from edgestill.compress.corpus import build_corpus, open_corpus, training_order
from edgestill.compress.distill_module import DistillModule
from edgestill.compress.fused_head import OutputLoss
from edgestill.compress.reference import choose_windows, perplexity
from edgestill.compress.trainer import OrderedWindows, autocast_bfloat16, train
from edgestill.profiles.schema import DataSpec, SourceSpec, SplitSpec, TrainSpec
from edgestill.runtime.progress import Progress

HERE = Path(__file__).parent
SHAPES: dict[str, dict[str, Any]] = {
    "verse": {"hidden_size": 224, "num_hidden_layers": 4, "num_attention_heads": 7, "num_key_value_heads": 7},
    "prose": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8},
}
"""Different widths on purpose: a student must be able to learn from teachers of different shapes."""


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
    shape = SHAPES[arguments.domain]
    config = AutoConfig.for_model(
        "llama",
        **shape,
        intermediate_size=shape["hidden_size"] * 8 // 3 // 32 * 32,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(arguments.seed)
    model = AutoModelForCausalLM.from_config(config)
    bf16 = autocast_bfloat16(spec, torch.device("cpu"))
    loss = OutputLoss(weight=0.0, cross_entropy=1.0, matmul_dtype=torch.bfloat16 if bf16 else torch.float32)
    module = DistillModule(model, None, loss, None, 1)
    steps = math.ceil(spec.tokens / (spec.batch_size * corpus.sequence_length))
    order = training_order(corpus, steps * spec.batch_size * corpus.sequence_length, spec.seed)
    (work / "run").mkdir(exist_ok=True)
    names = {"teachers": (), "domains": (arguments.domain,)}
    with progress.task(arguments.domain, spec.tokens, "tokens") as task:
        facts = train(module, OrderedWindows(corpus.training, order), spec, work / "run", task, names=names)
    model = model.eval().float().cpu()
    windows = choose_windows(corpus.validation, 1 << 20)
    facts["validation_perplexity"] = round(perplexity(model, corpus.validation, windows, batch_size=8), 2)
    folder = arguments.out / arguments.domain
    shutil.rmtree(folder, ignore_errors=True)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts |= {"command_tokens": arguments.tokens, "seed": arguments.seed}
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    progress.say(f"{arguments.domain}: validation perplexity {facts['validation_perplexity']} ({folder})")


if __name__ == "__main__":
    main()
