"""manifest.json of a bundle: what ships, what it is, where it came from.

The reader owns the format, so the dataclasses live here and `export` fills them. `digest` is the sha256 of the canonical
JSON (sorted keys, no spaces, UTF-8) of the manifest without that field: change any byte of meaning and it no longer fits.
Layout revision: `SCHEMA_VERSION` grows when a reader of the old layout would misread the new one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
DEFAULT_ENGINE = "onnxruntime-cpu"
LOCAL = "local"
"""The only folder of a bundle that may change after it is written; nothing in it is declared."""


@dataclass(frozen=True)
class FileEntry:
    """One shipped file: lowercase hex sha256 and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class ModelFacts:
    """What the runtime must know of the model before it opens the graph."""

    model_type: str
    parameters: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    """Width of the logits."""
    max_tokens: int
    """Longest prompt + continuation, in tokens."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: numpy dtype name, and a shape of sizes or symbolic names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """The graph of this bundle and how its cache behaves.

    cache: `growing`: `present.*` = concatenation of `past_key_values.*` and the new tokens, shape
    [batch, n_kv_heads, past + new, head_size] (two buffers in turn); `shared`: past and present are one buffer; `fixed`: one
    buffer as well, of the length that stands in the shape, written where `write_indices` says (backends/fixed_cache.py).
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache: Literal["growing", "shared", "fixed"] = "growing"


@dataclass(frozen=True)
class Precision:
    """How the weights are stored. `accuracy_level` 4 quantizes activations to int8 too (MatMulNBits)."""

    weights: Literal["float32", "float16", "bfloat16", "int8", "int4", "nf4", "fp4", "fp8"]
    block_size: int | None = None
    accuracy_level: int | None = None
    weights_from: Literal["checkpoint", "trained", "nearest", "gptq", "hqq"] = "checkpoint"
    """trained: the very bytes that the student learnt with; nearest, gptq, hqq: quantized after training; checkpoint: float32."""
    bits_per_weight: float | None = None
    """Effective: bytes of all graph weights x 8 / parameters."""


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json but `digest`, which `to_json` computes and `from_json` checks."""

    name: str
    files: dict[str, FileEntry]
    """POSIX path relative to the bundle -> entry; every file but manifest.json and local/."""
    model: ModelFacts
    graph: Graph
    precision: Precision
    profile: dict[str, Any]
    """The resolved device profile: name, device, workload, precision, budget."""
    limits: dict[str, float]
    """Every limit by metric name (metrics.py): the recipe's quality limits, the profile's budget, the fixed ones."""
    teachers: list[dict[str, Any]] = field(default_factory=list)
    """Per teacher, measured on the build machine: name, parameters, weights sha256, perplexity, latency, memory."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Recipe, profile, corpus hashes, package versions, seed, training summary."""
    tool_version: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def engine(self) -> str:
        """What the profile runs the graph with."""
        return str(self.profile.get("device", {}).get("engine", DEFAULT_ENGINE))


def canonical_json(value: Any) -> bytes:
    """`value` as JSON with sorted keys and no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def manifest_to_json(manifest: Manifest) -> str:
    """The text of manifest.json, digest included, indented for people."""
    body = json.loads(canonical_json(dataclasses.asdict(manifest)))
    body["digest"] = hashlib.sha256(canonical_json(body)).hexdigest()
    return json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
