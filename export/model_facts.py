"""What a checkpoint or a bare config says of its model: heads, lengths, stop tokens, sizes.

Parameters are counted on an instance whose tensors lie on the meta device: no weight is read or allocated, a tied matrix is
one parameter, and the mask buffers that old GPT-2 checkpoints store beside their weights are not parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgestill.profiles.arithmetic import ModelSize
from edgestill.runtime.errors import BadInput
from edgestill.runtime.manifest import ModelFacts


def facts_of_checkpoint(checkpoint: Path) -> ModelFacts:
    """The facts of the Hugging Face folder `checkpoint` (config.json, and generation_config.json where there is one).

    `eos_token_ids` and `bos_token_id` are the generation config's where it names them, else the config's.

    Raises:
        BadInput: no readable config.json, a model type that transformers does not know, no stated length.
    """
    config = load_config(checkpoint)
    text = config.get_text_config(decoder=True)
    size = size_of_config(config)
    generation = _read_object(checkpoint / "generation_config.json")
    bos = generation.get("bos_token_id", text.bos_token_id)
    eos = generation.get("eos_token_id", text.eos_token_id)
    return ModelFacts(
        model_type=config.model_type,
        parameters=size.parameters,
        n_layers=size.n_layers,
        n_heads=text.num_attention_heads,
        n_kv_heads=size.n_kv_heads,
        head_size=size.head_size,
        hidden_size=size.hidden_size,
        vocab_size=size.vocab_size,
        max_tokens=size.max_tokens,
        bos_token_id=bos[0] if isinstance(bos, list) else bos,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def load_config(checkpoint: Path) -> Any:
    """The transformers config of the folder `checkpoint`; nothing is fetched, no code of the checkpoint runs.

    Raises:
        BadInput: no config.json, or a model type that transformers does not know.
    """
    from transformers import AutoConfig

    fields = _read_object(checkpoint / "config.json")
    if "model_type" not in fields:
        raise BadInput(f"{checkpoint} has no config.json with a model_type; give a Hugging Face checkpoint folder")
    try:
        return AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as unknown:
        raise BadInput(
            f"{checkpoint}/config.json: model_type {fields['model_type']!r} cannot be loaded by transformers "
            f"({_brief(unknown)}); use a causal language model that transformers ships"
        ) from unknown


def size_of_config(config: Mapping[str, Any] | Any) -> ModelSize:
    """The size of the causal LM that `config` describes: a transformers config, or its fields with `model_type`.

    Raises:
        BadInput: an unknown model type, fields that do not fit together, or no stated length.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgestill.compress.low_rank import factor_layers

    try:
        if isinstance(config, Mapping):
            config = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            factor_layers(model)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as wrong:
        fields = config if isinstance(config, Mapping) else config.to_dict()
        raise BadInput(
            f"model_type {fields.get('model_type')!r} with this config is no causal language model of transformers "
            f"({_brief(wrong)}); correct the config"
        ) from wrong
    text = config.get_text_config(decoder=True)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding_parameters=embedding.numel(),
        head_tied=head is not None and head.weight is embedding,
        n_layers=text.num_hidden_layers,
        n_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        max_tokens=_max_tokens(text),
    )


def _max_tokens(text: Any) -> int:
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        raise BadInput(
            f"the config of {text.model_type!r} states max_position_embeddings {longest}; write the longest "
            "sequence it was trained on, in tokens"
        )
    return longest


def _brief(error: Exception) -> str:
    """The first sentence of the message: transformers goes on to list every model it knows."""
    return str(error).split("\n")[0].split(". ")[0][:160]


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or {} where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as broken:
        raise BadInput(f"{path} is not JSON ({broken}); restore it") from broken
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds a {type(value).__name__}, not an object; restore it")
    return value
