"""The checkpoint that is measured when none is given: a Llama of 134.5 M parameters, weights random, tokenizer of full size."""

from __future__ import annotations

import hashlib
import json
from itertools import islice, product
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SEED = 0
END = "<|endoftext|>"


def random_checkpoint(folder: Path) -> Path:
    """`folder` with a model of SHAPE in it, made where it is not there yet."""
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    beside = folder.with_name(f"{folder.name}.tmp")
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(beside)
    write_tokenizer(beside, SHAPE["vocab_size"], SHAPE["max_position_embeddings"])
    beside.rename(folder)
    return folder


def write_tokenizer(folder: Path, size: int, max_tokens: int) -> None:
    """A byte-level tokenizer of exactly `size` tokens: end of text, 256 bytes, and pairs of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(islice(product(alphabet, alphabet), size - len(alphabet) - 1))
    words = [END, *alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END, model_max_length=max_tokens
    )
    fast.save_pretrained(folder)


def describe(checkpoint: Path) -> dict[str, Any]:
    """Architecture, sizes and content of a checkpoint.

    Raises:
        SystemExit: there is no checkpoint in that folder.
    """
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights or not (checkpoint / "config.json").is_file():
        raise SystemExit(
            f"{checkpoint} holds no config.json with *.safetensors; save a checkpoint with save_pretrained"
        )
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    for file in [*weights, checkpoint / "config.json", checkpoint / "tokenizer.json"]:
        if file.is_file():
            with file.open("rb") as handle:
                digest.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return {
        "name": checkpoint.resolve().name,
        "sha256": digest.hexdigest(),
        "bytes": sum(file.stat().st_size for file in weights),
        **{key: config.get(key) for key in ("model_type", *SHAPE)},
    }
