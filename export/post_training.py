"""Choosing 4-bit codes after training, better than round-to-nearest, on the same grid (blockwise.py): GPTQ and HQQ.

    gptq   least error of the layer's output on calibration text, E |x W - x W'|^2     Frantar et al., arXiv 2210.17323;
           an embedding by what its errors cost the model (compress/quantize/lookup_moment.py), a tied one by both
    hqq    least sum of |w - w'|^0.7, no text needed     Badri and Shaji, mobiusml.github.io/hqq_blog

Why these are written here. onnxruntime 1.31 ships a GPTQ that reads its upper Cholesky factor by columns, below the diagonal
where it is zero: no error is ever passed on, and its codes are those of an identity moment. torchao's (a prototype)
wants GPU kernels for int4; llm-compressor's and GPTQModel's hide their integers in torch modules and want another transformers.

HQQ's published form moves float zero points and keeps the scales. MatMulNBits takes float zero points, but on the CPU it then
unpacks the whole weight for each product whatever the accuracy_level: 20 times slower at level 0 and 55 times at 4 (one
token, 512 x 1024). Rounded to integers they fall back on round-to-nearest's and nothing is gained. So the zero points stay
and the scales, which are floats on this grid, are solved for in the same half-quadratic scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from edgestill.compress.quantize.compensate import DAMPING, compensated
from edgestill.compress.quantize.grids import Int4
from edgestill.export.blockwise import F32, U8, BlockWeight, codes_of, quantize_int4
from edgestill.export.graph_io import load_graph
from edgestill.export.input_moments import F64, MOMENT_BYTES, Feeds, input_moments, linear_layers, moment_groups
from edgestill.export.linear_layers import Linear, Table, find_weights
from edgestill.export.nodes import constant_array
from edgestill.export.quantize import ByValues, digest_of
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import Task

CHUNK_VALUES = 1 << 20
"""Weights worked on at a time (outputs are independent): 8 MiB in float64, also for a head of a large vocabulary."""
LP_NORM, BETA, KAPPA, ITERATIONS = 0.7, 1.0, 1.01, 10
"""HQQ's norm and growth of beta. Its beta, 10, is for residuals in the weight's own unit: on weights of usual size it shrinks
every residual to 0. Here beta is in steps of the block, so that a weight's unit changes nothing: below one step a residual
vanishes, and only what the grid cuts off keeps a part. 10 rounds are enough: 10 more lower the norm by 1 % at most."""


def quantize_weights(
    graph_path: Path,
    precision: PrecisionSpec,
    method: Literal["gptq", "hqq"],
    feeds: Iterable[Feeds],
    task: Task | None = None,
    *,
    looked_up: F64 | None = None,
    moment_bytes: int = MOMENT_BYTES,
) -> dict[str, BlockWeight]:
    """Initializer name -> blocks, for every linear layer of the float32 graph (a tied embedding has its head's).

    `feeds` (read by gptq only) are kept, and run once per group of layers whose moments fit in `moment_bytes` (see
    `moment_groups`). `task` advances by 1 per linear layer: `matrix_names` counts them. With `looked_up`, the embedding's
    `lookup_moment` float64 [H, H], gptq minds what the embedding is looked up for; a table that no layer multiplies by is absent
    without it.

    Raises:
        BadInput: a precision other than int4, no feeds, or a graph that cannot be calibrated.
    """
    if precision.weights != "int4":
        raise BadInput(f"{method} makes int4, not precision.weights {precision.weights}; use round-to-nearest for that")
    graph = load_graph(graph_path).graph
    layers = linear_layers(graph)
    tables = _embeddings(graph, len(looked_up)) if method == "gptq" and looked_up is not None else {}
    kept = list(feeds) if method == "gptq" else []
    blocks: dict[str, BlockWeight] = {}
    for names in moment_groups(layers, moment_bytes):
        moments = input_moments(graph_path, kept, names) if method == "gptq" else {}
        for name in names:
            matrix = _matrix(layers[name][0])
            if method == "gptq":
                moment = moments[name] if name not in tables or looked_up is None else moments[name] + looked_up
                blocks[name] = gptq(matrix, moment, precision.block_size, precision.symmetric)
            else:
                blocks[name] = hqq(matrix, precision.block_size, precision.symmetric)
            if task is not None:
                task.advance(note=name)
    for name, table in tables.items():
        if name not in layers and looked_up is not None:
            blocks[name] = gptq(table, looked_up, precision.block_size, precision.symmetric)
    return blocks


def by_values(graph_path: Path, blocks: dict[str, BlockWeight]) -> ByValues:
    """`blocks` of `quantize_weights` as what `quantize_graph` is given, also for another graph of the same weights."""
    graph = load_graph(graph_path).graph
    found = _embeddings(graph) | matrices(graph_path)
    return ByValues({digest_of(found[name]): block for name, block in blocks.items()})


def matrices(graph_path: Path) -> dict[str, F32]:
    """Initializer name -> float32 [K, N] of every linear layer's weight, in graph order."""
    return {name: _matrix(readers[0]) for name, readers in linear_layers(load_graph(graph_path).graph).items()}


def matrix_names(graph_path: Path) -> tuple[str, ...]:
    """The keys of `quantize_weights`, in graph order."""
    return tuple(linear_layers(load_graph(graph_path).graph))


def _embeddings(graph: ir.Graph, hidden: int | None = None) -> dict[str, F32]:
    """Initializer name -> float32 [H, rows] of every table, or those of this H: positions are added to tokens, and felt alike."""
    tables = {str(w.weight.name): constant_array(w.weight).T for w in find_weights(graph) if isinstance(w, Table)}
    return {name: table for name, table in tables.items() if hidden in (None, len(table))}


def untied_tables(graph_path: Path) -> list[tuple[int, int]]:
    """(hidden, rows) of every embedding that is no linear layer's weight too."""
    graph = load_graph(graph_path).graph
    products = linear_layers(graph)
    tables = {str(w.weight.name): w for w in find_weights(graph) if isinstance(w, Table)}
    shapes = [constant_array(w.weight).shape for name, w in tables.items() if name not in products]
    return [(hidden, rows) for rows, hidden in shapes]


def gptq(weight: F32, moment: F64, block_size: int, symmetric: bool, damping: float = DAMPING) -> BlockWeight:
    """Quantize float32 [K, N] to 4 bits so that E |x W - x W'|^2 is small; `moment` is E[x x'], float64 [K, K].

    The weight is moved as `compress.quantize.compensate` says (it has the method, and the same errors), and rounded to nearest.
    """
    moved = compensated(
        torch.from_numpy(np.array(weight.T, np.float32, order="C")),
        torch.from_numpy(np.array(moment)),
        Int4(block_size, symmetric),
        damping,
    )
    return quantize_int4(moved.numpy().T, block_size, symmetric)


def hqq(weight: F32, block_size: int, symmetric: bool = False) -> BlockWeight:
    """Quantize float32 [K, N] to 4 bits so that sum |w - w'|^0.7 is small, which forgives outliers their error.

    Half-quadratic splitting per block: residuals are shrunk towards zero by the norm's proximal step, and the scale is
    the least-squares fit of the codes to the weight without the shrunk residual. Starts at `quantize_int4` and keeps, per
    block, the best scale seen, so no block is worse in that norm. Zero points are `quantize_int4`'s.
    """
    return _by_columns(weight, lambda part: _hqq(part, block_size, symmetric))


def _hqq(weight: F32, block_size: int, symmetric: bool) -> BlockWeight:
    start = quantize_int4(weight, block_size, symmetric)
    outputs, n_blocks = start.scales.shape
    padded = np.zeros((outputs, n_blocks * block_size), np.float32)
    padded[:, : len(weight)] = weight.T
    values = padded.reshape(outputs, n_blocks, block_size)
    scale, zero = start.scales[:, :, None], _zero_points(start)[:, :, None]
    best, least = scale, np.full(scale.shape, np.inf)
    beta = BETA
    for _ in range(ITERATIONS):
        steps = _codes(values, scale, zero) - zero
        residual = values - steps * scale
        error = (np.abs(residual) ** LP_NORM).sum(axis=2, keepdims=True, dtype=np.float64)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
        target = values - _shrink(residual * _inverse(scale), beta) * scale
        power = np.square(steps).sum(axis=2, keepdims=True)
        fitted = (steps * target).sum(axis=2, keepdims=True) / np.maximum(power, 1)  # steps are whole numbers
        scale = np.where(power > 0, fitted, scale)
        beta *= KAPPA
    codes = _codes(values, best, zero).reshape(outputs, -1)[:, : len(weight)]
    return _block_weight(codes, best[:, :, 0], zero[:, :, 0], block_size, symmetric)


def _shrink(residual: F32, beta: float) -> F32:
    """The proximal step of |r|^p as HQQ approximates it: sign(r) max(0, |r| - |r|^(p-1) / beta)."""
    size = np.abs(residual)
    shrunk: F32 = np.sign(residual) * np.maximum(size - (size + np.float32(1e-8)) ** (LP_NORM - 1) / beta, 0)
    return shrunk.astype(np.float32)


def _codes(values: F32, scale: F32, zero: F32) -> U8:
    """Codes 0 to 15 as onnxruntime rounds: float32 throughout, half away from zero."""
    exact = (values * _inverse(scale) + zero).astype(np.float64)
    codes: U8 = np.clip(np.floor(exact + 0.5), 0, 15).astype(np.uint8)
    return codes


def _inverse(scale: F32) -> F32:
    """1 / scale, and 0 for a block of zeros."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse: F32 = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _zero_points(block: BlockWeight) -> F32:
    """float32 [N, n_blocks], 8 where the block is symmetric."""
    return codes_of(block)[1].astype(np.float32)


def _block_weight(codes: U8, scales: F32, zeros: F32, block_size: int, symmetric: bool) -> BlockWeight:
    """Pack codes [N, K], scales and zero points [N, n_blocks]."""
    outputs, inputs = codes.shape
    n_blocks = scales.shape[1]
    packed = _pack(codes, n_blocks * block_size, 0).reshape(outputs, n_blocks, block_size // 2)
    zero_points = None if symmetric else _pack(zeros.astype(np.uint8), n_blocks + n_blocks % 2, 8)
    return BlockWeight(packed, np.ascontiguousarray(scales), zero_points, 4, block_size, inputs)


def _pack(codes: U8, width: int, fill: int) -> U8:
    """uint8 [rows, n] -> two to a byte, the first in the low nibble, [rows, width / 2]; `fill` behind n."""
    padded: U8 = np.full((len(codes), width), fill, np.uint8)
    padded[:, : codes.shape[1]] = codes
    packed: U8 = padded[:, ::2] | padded[:, 1::2] << np.uint8(4)
    return packed


def _by_columns(weight: F32, quantize: Callable[[F32], BlockWeight]) -> BlockWeight:
    """`quantize` for a few outputs at a time."""
    width = max(1, CHUNK_VALUES // len(weight))
    parts = [quantize(weight[:, n : n + width]) for n in range(0, weight.shape[1], width)]
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return BlockWeight(
        np.concatenate([part.packed for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zeros) if zeros else None,
        parts[0].bits,
        parts[0].block_size,
        parts[0].inputs,
    )


def _matrix(layer: Linear) -> npt.NDArray[Any]:
    """[K, N] of y = x W."""
    array = constant_array(layer.weight)
    return array.T if layer.transposed else array
