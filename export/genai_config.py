"""genai_config.json, by which onnxruntime-genai loads the folder of a bundle.

Fields: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

from typing import Any

from edgestill.runtime.manifest import Graph, ModelFacts

OWN_TYPES = frozenset(
    {"gemma", "gemma2", "granite", "llama", "mistral", "olmo", "phi", "phi3", "qwen2", "qwen3", "smollm3"}
)
"""Model types whose genai name is the transformers name. The others load as `decoder`, the plain decoder-only kind; genai's
own `gpt2` would look for one combined tensor of keys and values per layer."""
OPTIONAL_INPUTS = ("attention_mask", "position_ids")


def genai_config(facts: ModelFacts, graph: Graph, *, threads: int | None = None) -> dict[str, Any]:
    """The content of genai_config.json for `graph`; greedy search by default, `threads` intra-op threads if given."""
    eos = list(facts.eos_token_ids)
    bos = facts.bos_token_id if facts.bos_token_id is not None else (eos[0] if eos else 0)
    names = {spec.name for spec in graph.inputs}
    inputs = {"input_ids": "input_ids"} | {name: name for name in OPTIONAL_INPUTS if name in names}
    session: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if threads is not None:
        session["intra_op_num_threads"] = threads
    decoder = {
        "filename": graph.file,
        "session_options": session,
        "hidden_size": facts.hidden_size,
        "head_size": facts.head_size,
        "num_attention_heads": facts.n_heads,
        "num_key_value_heads": facts.n_kv_heads,
        "num_hidden_layers": facts.n_layers,
        "inputs": inputs | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": facts.model_type if facts.model_type in OWN_TYPES else "decoder",
        "vocab_size": facts.vocab_size,
        "context_length": facts.max_tokens,
        "bos_token_id": bos,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or bos,
        "pad_token_id": eos[0] if eos else bos,
        "decoder": decoder,
    }
    search = {
        "do_sample": False,
        "max_length": facts.max_tokens,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": graph.cache == "shared",
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
    return {"model": model, "search": search}
