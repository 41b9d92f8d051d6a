"""Tiny real models and tokenizers: random weights, real architectures, a byte-level tokenizer, made in a second.

Every function writes a normal Hugging Face folder (safetensors, tokenizer.json), so tests run the code that users run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VOCAB = 320
"""256 bytes, a few merges, special tokens; models are padded to this width."""

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "tie_word_embeddings": True},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "tie_word_embeddings": True},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "sliding_window": None},
    "gpt2": {"n_head": 4, "n_inner": 96},
    "gpt_neox": {"num_attention_heads": 4, "intermediate_size": 96, "rotary_pct": 0.5},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16},
    "gemma": {"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 96, "head_dim": 16},
    "phi": {"num_attention_heads": 2, "intermediate_size": 96, "partial_rotary_factor": 0.5},
}
"""Families of the export tests -> config fields beyond width, depth, vocabulary and length."""

DEFAULT_MERGES = (("t", "h"), ("th", "e"), ("a", "n"), ("i", "n"), ("Ġ", "the"), ("e", "r"))


def write_tokenizer(
    folder: Path, merges: Sequence[tuple[str, str]] = DEFAULT_MERGES, template: str | None = None
) -> None:
    """A byte-level BPE tokenizer: `<|endoftext|>` (id 0), 256 bytes, one token per merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=128
    )
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)


def write_model(
    folder: Path,
    family: str = "llama",
    *,
    width: int = 64,
    layers: int = 2,
    seed: int = 0,
    vocab: int = VOCAB,
    max_tokens: int = 128,
    merges: Sequence[tuple[str, str]] = DEFAULT_MERGES,
    template: str | None = None,
    **overrides: Any,
) -> Path:
    """A random model of `family` with its tokenizer in `folder`; returns `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(SIZES[family])
    if family == "gpt2":
        fields |= {"n_embd": width, "n_layer": layers, "n_positions": max_tokens}
    else:
        fields |= {"hidden_size": width, "num_hidden_layers": layers, "max_position_embeddings": max_tokens}
    fields |= {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 0, **overrides}
    config = AutoConfig.for_model(family, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # the default initialisation is so small that every logit is alike
            if parameter.dim() > 1:
                parameter.data.mul_(3.0)
    model.save_pretrained(folder, safe_serialization=True)
    write_tokenizer(folder, merges, template)
    return folder


def write_text(path: Path, seed: int = 0, words: int = 4000) -> Path:
    """Pseudo-English made of syllables, different for every seed; documents are paragraphs."""
    import random

    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfglmnprst" for b in ("a", "e", "in", "or", "the", "an")]
    lexicon = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(150)]
    out, line = [], 0
    for i in range(words):
        out.append(rng.choice(lexicon))
        line += 1
        if line > rng.randint(60, 90):
            out.append(".\n\n")
            line = 0
        elif i % 9 == 8:
            out.append(",")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(" ".join(out), encoding="utf-8")
    return path


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
