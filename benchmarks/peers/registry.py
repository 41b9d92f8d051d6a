"""The peers by name: what each needs, and which file converts and drives it. Standard library only: it is read everywhere.

A file `peer_<family>.py` has

    convert(checkpoint, folder, variant)                make `folder` from a Hugging Face checkpoint
    load(folder, threads, batch, tokens, variant)       an `Engine` for up to `batch` rows of `tokens` tokens, prompt included
    model_files(folder)                                 what it reads to run the model, without the tokenizer
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Peer:
    """One engine with one kind of weights."""

    name: str
    family: str
    """Names the file: peer_<family>.py."""
    variant: str
    packages: tuple[str, ...]
    """Distributions it needs; the first is the engine."""
    about: str
    """Weights, and what is particular about how it is driven."""

    @property
    def ours(self) -> bool:
        """Runs in the interpreter that has edgestill."""
        return self.family == "ours"


OURS = ("edgestill", "onnxruntime", "tokenizers")
EXPORT = ("torch", "transformers")
PEERS = tuple(
    Peer(*fields)
    for fields in (
        ("ours-block32", "ours", "32", OURS, "int4 in blocks of 32, activations in int8"),
        ("ours-block128", "ours", "128", OURS, "int4 in blocks of 128, activations in int8"),
        (
            "llama.cpp-q4_0",
            "llama_cpp",
            "Q4_0",
            ("llama-cpp-python", "gguf"),
            "Q4_0 (tied embedding as llama.cpp picks)",
        ),
        ("llama.cpp-q8_0", "llama_cpp", "Q8_0", ("llama-cpp-python", "gguf"), "Q8_0"),
        (
            "onnxruntime-genai",
            "onnxruntime_genai",
            "int4",
            ("onnxruntime-genai", "onnxruntime", "onnx-ir", *EXPORT),
            "int4 by its own model builder; its own loop",
        ),
        (
            "openvino",
            "openvino",
            "int4",
            ("openvino-genai", "openvino", "openvino-tokenizers", "optimum-intel", "nncf", *EXPORT),
            "int4 by optimum-intel; continuous batching, one step a token, prefix caching off",
        ),
        (
            "ctranslate2",
            "ctranslate2",
            "int8",
            ("ctranslate2", *EXPORT),
            "int8; one call, parted by its token callback",
        ),
        ("torch-float32", "torch", "float32", EXPORT, "transformers, float32, DynamicCache"),
        ("torch-bfloat16", "torch", "bfloat16", EXPORT, "transformers, bfloat16, DynamicCache"),
    )
)


def chosen(words: Sequence[str]) -> list[Peer]:
    """The peers that `words` name: a name, or what stands before its dash (`llama.cpp`, `torch`).

    Raises:
        ValueError: a word names none.
    """
    for word in words:
        if not any(_named(peer, word) for peer in PEERS):
            raise ValueError(f"no peer is called {word!r}; there are {', '.join(peer.name for peer in PEERS)}")
    return [peer for peer in PEERS if any(_named(peer, word) for word in words)]


def _named(peer: Peer, word: str) -> bool:
    return word in (peer.name, peer.name.rpartition("-")[0])


def by_name(name: str) -> Peer:
    """The peer called `name`."""
    return next(peer for peer in PEERS if peer.name == name)


def driver(peer: Peer) -> Any:
    """The module that converts for and drives `peer`."""
    return importlib.import_module(f"peer_{peer.family}")


def installed(peer: Peer) -> dict[str, str | None]:
    """Version of each package that `peer` needs, in this interpreter; None where it is missing."""
    return {name: _version(name) for name in peer.packages}


def _version(name: str) -> str | None:
    from importlib import metadata  # megabytes that would count as every peer's

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        # a checkout on the path has no metadata
        return "source" if name == "edgestill" and importlib.util.find_spec("edgestill") is not None else None
