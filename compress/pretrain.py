"""A causal language model from scratch, by cross-entropy alone: how the teachers of the quickstart and of the study were made.

Nothing of a build needs it. It is the project's own corpus and trainer, so that a teacher is trained on the windows, and in
the precision, that its students will meet.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from edgestill.compress.corpus import Corpus, training_order
from edgestill.compress.distill_module import DistillModule
from edgestill.compress.fused_head import OutputLoss
from edgestill.compress.reference import choose_windows, perplexity
from edgestill.compress.teachers import best_device
from edgestill.compress.trainer import autocast_bfloat16, train
from edgestill.compress.windows import OrderedWindows
from edgestill.profiles.schema import TrainSpec
from edgestill.runtime.files import write_atomically
from edgestill.runtime.progress import Progress, QuietProgress

END_OF_TEXT = "<|endoftext|>"
JUDGED_TOKENS = 1 << 20
"""Validation tokens that the finished model is judged on, at most."""
SPEED_STEPS = 30
"""Steps that tell how many fit into a time."""


def byte_level_bpe(
    texts: Iterable[str], vocabulary: int, max_tokens: int, *, digits_alone: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text survives encode and decode, `<|endoftext|>` is token 0, begins and ends a text.

    Args:
        digits_alone: every digit is a token of its own, so that numbers are not memorised in chunks.
    """
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_only])
        if digits_alone
        else bytes_only
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )


def new_llama(shape: Mapping[str, int], tokenizer: Any, max_tokens: int, seed: int) -> PreTrainedModel:
    """A Llama with random weights and a tied head. `shape`: hidden_size, num_hidden_layers, num_attention_heads and so on."""
    config = AutoConfig.for_model(
        "llama",
        **{"num_key_value_heads": shape["num_attention_heads"], **shape},
        vocab_size=len(tokenizer),
        max_position_embeddings=max_tokens,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def pretrain(
    model: PreTrainedModel, tokenizer: Any, corpus: Corpus, spec: TrainSpec, out: Path, run: Path, progress: Progress
) -> dict[str, Any]:
    """Train `model` on the training part and write the checkpoint (bfloat16), its tokenizer and training.json to `out`.

    Args:
        run: checkpoints of the training; killed and called again, it goes on from the newest.

    Returns:
        What training.json says: steps, tokens, seconds, validation perplexity and so on.
    """
    run.mkdir(parents=True, exist_ok=True)
    with progress.task(out.name, spec.tokens, "tokens") as task:
        facts = train(*_lesson(model, corpus, spec), spec, run, task, names=_names(corpus))
    model = model.eval().float().cpu()
    windows = choose_windows(corpus.validation, JUDGED_TOKENS)
    facts["validation_perplexity"] = round(perplexity(model, corpus.validation, windows, batch_size=spec.batch_size), 2)
    facts |= {"command_tokens": spec.tokens, "seed": spec.seed}
    beside = out.with_name(out.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.parent.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    (beside / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)
    progress.say(f"{out.name}: validation perplexity {facts['validation_perplexity']} ({out})")
    return facts


def tokens_in(minutes: float, model: PreTrainedModel, corpus: Corpus, spec: TrainSpec, work: Path) -> int:
    """Training tokens that fit into `minutes` on this machine, found by training a throw-away copy for some steps.

    The answer is kept in `work`, so that a run that is started again has the same schedule.
    """
    kept = work / "tokens.json"
    if not kept.exists():
        per_step = spec.batch_size * corpus.sequence_length
        state = {name: value.clone() for name, value in model.state_dict().items()}
        trial = spec.model_copy(update={"tokens": SPEED_STEPS * per_step})
        shutil.rmtree(work / "speed", ignore_errors=True)
        (work / "speed").mkdir(parents=True)
        with QuietProgress().task("", 1) as task:
            facts = train(*_lesson(model, corpus, trial), trial, work / "speed", task, names=_names(corpus))
        shutil.rmtree(work / "speed")
        model.load_state_dict(state)
        steps = max(1, int(minutes * 60 * facts["tokens_per_s"] / per_step))
        write_atomically(kept, json.dumps({"tokens": steps * per_step}).encode())
    return int(json.loads(kept.read_text(encoding="utf-8"))["tokens"])


def _lesson(model: PreTrainedModel, corpus: Corpus, spec: TrainSpec) -> tuple[DistillModule, OrderedWindows]:
    """What is trained, and on which windows in which order."""
    model = model.to(best_device())
    dtype = torch.bfloat16 if autocast_bfloat16(spec, best_device()) else torch.float32
    module = DistillModule(
        model, None, OutputLoss(weight=0.0, cross_entropy=1.0, matmul_dtype=dtype), len(corpus.domains)
    )
    per_step = spec.batch_size * spec.gradient_accumulation * corpus.sequence_length
    order = training_order(corpus, math.ceil(spec.tokens / per_step) * per_step, spec.seed)
    return module, OrderedWindows(corpus.training, order)


def _names(corpus: Corpus) -> dict[str, tuple[str, ...]]:
    return {"teachers": (), "domains": corpus.domains}
