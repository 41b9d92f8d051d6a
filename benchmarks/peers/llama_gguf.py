"""A Llama checkpoint as a float32 GGUF file, by the `gguf` package.

No tokenizer goes in (`tokenizer.ggml.model: none`): prompts are token ids, and the size of the file is that of the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(checkpoint: Path, out: Path) -> None:
    """Write `out` from the safetensors of `checkpoint`.

    Raises:
        ValueError: not a plain Llama.
    """
    from gguf import GGUFWriter

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    _check(config)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer = GGUFWriter(out, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(_rope(config).get("rope_theta", 10_000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("none")
    tied = config.get("tie_word_embeddings", False)
    for name, tensor in tensors(checkpoint):
        if name == "lm_head.weight" and tied:
            continue  # some writers store it twice
        rotary = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        writer.add_tensor(gguf_name(name), tensor if rotary is None else interleaved(tensor, rotary))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where transformers 4 and 5 keep it."""
    found: Mapping[str, Any] = config.get("rope_parameters") or {**config, **(config.get("rope_scaling") or {})}
    return found


def _check(config: Mapping[str, Any]) -> None:
    """Only what the names above cover."""
    if config["model_type"] != "llama":
        raise ValueError(f"only the llama architecture is written as GGUF here, not {config['model_type']}")
    if _rope(config).get("rope_type", "default") != "default":
        raise ValueError(f"rotary scaling {_rope(config)['rope_type']} is not written as GGUF here")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError("biases are not written as GGUF here")


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`.

    Raises:
        ValueError: a tensor that a Llama does not have.
    """
    stem, _, kind = name.rpartition(".")
    if stem in ENDS:
        return f"{ENDS[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    if not layer.isdigit() or part not in NAMES:
        raise ValueError(f"{name} is no tensor of a plain Llama")
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def interleaved(weight: F32, heads: int) -> F32:
    """Rows of a query or key projection [heads x D, in]: transformers rotates (i, i + D/2), GGUF's llama (2i, 2i + 1)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def tensors(checkpoint: Path) -> Iterator[tuple[str, F32]]:
    """Name and float32 values of every tensor in the safetensors files, read without a package.

    Raises:
        ValueError: a type other than F32, F16 and BF16.
    """
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(size))
        header.pop("__metadata__", None)
        data = np.memmap(file, np.uint8, "r", offset=8 + size)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            yield name, _float32(data[start:end], entry["dtype"]).reshape(entry["shape"])


def _float32(raw: npt.NDArray[np.uint8], dtype: str) -> F32:
    if dtype == "BF16":  # the upper half of a float32
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype not in ("F32", "F16"):
        raise ValueError(f"weights are {dtype}; save the checkpoint in float32, float16 or bfloat16")
    return raw.view(np.float32 if dtype == "F32" else np.float16).astype(np.float32)
