"""What each generation of NVIDIA GPUs can do in an engine, per flavour of TensorRT: known before any work, refused with the reason.

The table says which precisions of weights an engine may have. Float types compute in themselves; int8, int4 and fp8 are weights
that are dequantized before a 16-bit product (weight-only), as our graphs write them: activations are never quantized.

What the documentation promises of those, and no card has shown yet: TensorRT-RTX lists weight-only products of int8 and int4, and
its engines keep int8 and fp8 weights at 8 bits (benchmarks/results/engine_sizes.json). The full TensorRT names weight-only
products for int4 alone, and int8 and fp8 where activations are quantized too: it may widen such weights to 16 bits when it builds.
The file that ships is half the size all the same; the engine and its speed may be those of float16. `edgestill engine` prints the
engine's size.

Sources: TensorRT-RTX support matrix, table "Hardware and Precision"
(https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html; 8.0 and 12.1 as the builder of
TensorRT-RTX 1.7 offers them; float32 on 7.5 has a footnote there); TensorRT support matrix
(https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/support-matrix.html): bfloat16 from 8.0, fp8 from 8.9,
weight-only int4 from 8.0; quantized types
(https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html); 10.1
(https://developer.nvidia.com/docs/drive/drive-os/7.0.3/public/drive-os-tensorrt-release-notes/release-properties.html). 8.7 is
Jetson Orin, which TensorRT-RTX does not run on; nor does it on Thor (10.1 before CUDA 13, 11.0 from it on) and the data-centre
cards 9.0 and 10.x.
"""

from __future__ import annotations

from dataclasses import dataclass

TURING = ("float32", "float16")
AMPERE = ("float32", "float16", "bfloat16", "int8", "int4")
ADA = (*AMPERE, "fp8")

PRECISIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "tensorrt": {
        "7.5": (*TURING, "int8"),
        "8.0": AMPERE,
        "8.6": AMPERE,
        "8.7": AMPERE,
        "8.9": ADA,
        "9.0": ADA,
        "10.0": ADA,
        "10.1": ADA,
        "10.3": ADA,
        "11.0": ADA,
        "12.0": ADA,
        "12.1": ADA,
    },
    "tensorrt-rtx": {
        "7.5": TURING,
        "8.0": AMPERE,
        "8.6": AMPERE,
        "8.9": ADA,
        "12.0": ADA,
        "12.1": ADA,
    },
}
"""Flavour -> compute capability -> precisions of `precision.weights`."""
EXAMPLES = {
    "7.5": "GeForce RTX 2080, T4",
    "8.0": "A100",
    "8.6": "GeForce RTX 3090, A10",
    "8.7": "Jetson Orin",
    "8.9": "GeForce RTX 4090, L4",
    "9.0": "H100, H200",
    "10.0": "B200",
    "10.1": "Thor, before CUDA 13",
    "10.3": "B300",
    "11.0": "Jetson Thor",
    "12.0": "GeForce RTX 5090",
    "12.1": "GB10",
}
KV_CACHE_FROM = {"tensorrt": (10, 15), "tensorrt-rtx": (1, 3)}
"""The first version whose cache is updated in place (IKVCacheUpdateLayer)."""


@dataclass(frozen=True)
class Problem:
    """Why an engine cannot be: the word that is wrong, and a line that names it, the limit and the repair."""

    field: str
    line: str


def engine_problem(
    flavour: str, compute_capability: str, weights: str, gpu: str | None = None, *, name: str | None = None
) -> Problem | None:
    """Why `flavour` makes no engine with such weights for that card; None when it does. `name`: of an engine that goes by its
    table."""
    known = PRECISIONS[flavour]
    card = f"{gpu or 'a card'} of compute capability {compute_capability}"
    if compute_capability not in known:
        others = [other for other, cards in PRECISIONS.items() if other != flavour and compute_capability in cards]
        repair = f"use engine {others[0]}" if others else f"it knows {', '.join(known)}"
        return Problem("device.compute_capability", f"{name or flavour} builds nothing for {card}; {repair}")
    if weights in ("nf4", "fp4"):
        return Problem(
            "precision.weights",
            f"'{weights}' of bitsandbytes has no kernel in {name or flavour}; use int4 or int8, and train the student on that grid",
        )
    if weights not in known[compute_capability]:
        fitting = ", ".join(reversed(known[compute_capability]))
        return Problem("precision.weights", f"'{weights}' is beyond {card} in {name or flavour}; use {fitting}")
    return None
