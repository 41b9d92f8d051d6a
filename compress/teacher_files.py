"""What can be known of a teacher without loading its weights: its folder, size, hash and the precision it will run in.

Safetensors only. A safetensors file begins with the number of bytes of its header (8 bytes, little-endian) and the header:
JSON of tensor name -> dtype, shape and place, so parameters are counted by reading a few kilobytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgestill.profiles.schema import TeacherSpec
from edgestill.runtime.errors import BadInput

BLOCK = 64
"""Weights that share one float32 scale in 4-bit teachers (bitsandbytes' default)."""
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class TeacherFacts:
    """One resolved teacher; nothing of it is loaded yet."""

    name: str
    path: Path
    revision: str | None
    weights_sha256: str
    """Of the names and bytes of its safetensors files and config.json."""
    model_type: str
    parameters: int
    hidden_size: int
    n_layers: int
    vocab_size: int
    """Real: what its tokenizer can produce."""
    head_width: int
    """Rows of its head, padding included."""
    precision: str
    """float32, bfloat16, 8bit or 4bit."""
    memory_bytes: int
    """Estimate of its resident weights."""
    max_tokens: int | None = None
    """Longest window it was made for; None where its positions have no end."""
    trust_remote_code: bool = False


def find_folder(spec: TeacherSpec, resolve: Callable[[str], Path]) -> tuple[Path, str | None]:
    """The teacher's folder and revision: a local folder, or a snapshot of the Hub at `spec.revision`.

    Raises:
        BadInput: neither is there.
    """
    folder = resolve(spec.model)
    if folder.is_dir():
        return folder, spec.revision
    if spec.revision is None or not HUB_ID.fullmatch(spec.model):
        raise BadInput(
            f"teacher {spec.name!r}: no folder {folder}, and {spec.model!r} is not a Hub id with a revision; "
            "correct `model` or add `revision`"
        )
    from huggingface_hub import snapshot_download

    patterns = [*HUB_FILES, *(["*.py"] if spec.trust_remote_code else [])]
    try:
        snapshot = snapshot_download(
            spec.model, revision=spec.revision, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"teacher {spec.name!r}: {spec.model} at {spec.revision} cannot be fetched ({reason}); "
            "check the name and the network, or give a local folder"
        ) from error
    return Path(snapshot), Path(snapshot).name


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files that `transformers` would load from `folder`.

    Raises:
        BadInput: there are none (a pickle is code that runs when it is read), or one named by the index is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = sorted({folder / shard for shard in shards})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"teacher {name!r}: {index} is no index of safetensors files; fetch it again") from error
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if not missing:
        return files
    pickles = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    if pickles and not index.is_file():
        raise BadInput(
            f"teacher {name!r}: {folder} holds {pickles[0]} but no safetensors, the only weights read (a pickle runs code); "
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise BadInput(f"teacher {name!r}: {missing[0]} is missing in {folder}; complete the folder")


def hash_weights(folder: Path, files: list[Path]) -> str:
    """sha256 over the names and bytes of `files` and config.json."""
    digest = hashlib.sha256()
    for file in (*files, folder / "config.json"):
        with file.open("rb") as handle:
            digest.update(f"{file.name}:{hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def count_parameters(files: list[Path]) -> int:
    """Stored parameters (tied ones are stored once), from the headers alone.

    Raises:
        BadInput: a file that is not safetensors, or whose length is not the one its header declares (cut short).
    """
    total = 0
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as handle:
            try:
                length = min(int.from_bytes(handle.read(8), "little"), size)
                header = json.loads(handle.read(length))
                tensors = [entry for key, entry in header.items() if key != "__metadata__"]
                declared = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
                total += sum(torch.Size(entry["shape"]).numel() for entry in tensors)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, MemoryError) as error:
                raise BadInput(f"{file}: is no safetensors file; fetch it again") from error
        if size != declared:
            raise BadInput(f"{file}: has {size} bytes where its header declares {declared}; fetch it again")
    return total


def read_config(folder: Path, name: str, *, trust_remote_code: bool) -> Any:
    """The teacher's Hugging Face configuration.

    Raises:
        BadInput: none, an unknown architecture, no causal decoder, capped logits, or weights that are quantized already.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise BadInput(
            f"teacher {name!r}: {folder}/config.json cannot be used ({reason}); give a Hugging Face folder"
        ) from error
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput(f"teacher {name!r}: {config.model_type} is an encoder-decoder; use a causal language model")
    if getattr(text, "final_logit_softcapping", None):
        raise BadInput(
            f"teacher {name!r}: final_logit_softcapping {text.final_logit_softcapping} bends its logits, which the chunked "
            "losses do not do; use a teacher without it"
        )
    if getattr(config, "quantization_config", None):
        raise BadInput(f"teacher {name!r}: its weights are quantized already; give the original and `precision: 4bit`")
    return config


def resident_bytes(
    config: Any, parameters: int, precision: str, spec: TeacherSpec, *, on_cpu: bool, native: bool
) -> int:
    """Estimated bytes of the loaded weights; for 4bit on a CPU also checks the shapes.

    bitsandbytes' AVX-512 kernel reads the wrong scales when a row is not a whole number of blocks (LOG.md).

    Raises:
        BadInput: 4bit on a CPU and a layer with in_features that BLOCK does not divide.
    """
    if precision in ("float32", "bfloat16"):
        return parameters * (4 if precision == "float32" else 2)
    quantized = 0
    for layer, rows, columns in _linear_layers(config, spec.trust_remote_code):
        if precision == "4bit" and on_cpu and columns % BLOCK:
            raise BadInput(
                f"teacher {spec.name!r}: {layer} has {columns} inputs, not a multiple of {BLOCK}, which 4-bit kernels on a CPU get "
                "wrong; use precision 8bit or bfloat16"
            )
        quantized += rows * columns
    rest = (parameters - quantized) * (2 if native else 4)
    return round(quantized * (1.0 if precision == "8bit" else 0.5 + 4 / BLOCK)) + rest


def _linear_layers(config: Any, trust_remote_code: bool) -> list[tuple[str, int, int]]:
    """(name, out_features, in_features) of what bitsandbytes replaces: every linear layer but the head."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head, found = model.get_output_embeddings(), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found.append((name, module.out_features, module.in_features))
        elif isinstance(module, Conv1D):  # gpt2 stores [in, out]; bitsandbytes transposes it
            found.append((name, module.weight.shape[1], module.weight.shape[0]))
    return found
