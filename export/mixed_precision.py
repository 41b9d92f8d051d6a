"""Which layers of an int4 student stay in 8 bits: those whose rounding is felt most, as far as a size budget reaches.

    sensitivity of a weight    KL(float || this weight alone in 4 bits), nats per token, on calibration text
    order                      sensitivity per byte that 8 bits cost more

Sensitivities add up only roughly; the budget is kept exactly, and the gate judges what comes out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgestill.export.blockwise import F32, BlockWeight, dequantize
from edgestill.export.graph_io import load_graph, save_graph
from edgestill.export.input_moments import Feeds, linear_layers
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import Task

MIB = 1 << 20


def sensitivities(
    graph_path: Path, blocks: Mapping[str, BlockWeight], feeds: Sequence[Feeds], task: Task | None = None
) -> dict[str, float]:
    """KL in nats per token of the float32 graph against itself with one weight as its blocks stand for, weight by weight.

    Args:
        blocks: initializer name -> int4 blocks.
        feeds: calibration windows (input_moments.window_feeds); each is run once per weight.
        task: advanced by one per weight.

    Raises:
        BadInput: no feeds.
    """
    import onnxruntime

    if not feeds:
        raise BadInput("no calibration text to measure sensitivities on; give at least one window")
    model = load_graph(graph_path)
    layers = linear_layers(model.graph)
    rows = {name: layers[name][0].transposed for name in blocks}
    for name in blocks:  # an initializer that is an input too may be given another value for one run
        model.graph.inputs.append(model.graph.initializers[name])
    with tempfile.TemporaryDirectory(prefix="edgestill-mixed-") as folder:
        path = Path(folder) / "model.onnx"
        save_graph(model, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    plain = [_log_softmax(session.run(["logits"], dict(feed))[0]) for feed in feeds]
    found = {}
    for name, block in blocks.items():
        matrix = dequantize(block)
        value = np.ascontiguousarray(matrix.T) if rows[name] else matrix
        total, count = 0.0, 0
        for feed, expected in zip(feeds, plain, strict=True):
            got = _log_softmax(session.run(["logits"], {**feed, name: value})[0])
            total += float((np.exp(expected) * (expected - got)).sum())
            count += expected.size // expected.shape[-1]
        found[name] = total / count
        if task is not None:
            task.advance(note=name)
    return found


def in_eight_bits(
    felt: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    block_size: int,
    budget_mib: float,
    beside: Sequence[tuple[int, int]] = (),
) -> list[str]:
    """The weights that get 8 bits, most felt per byte first, so that all weights together take at most `budget_mib`.

    Args:
        felt: name -> sensitivity.
        shapes: name -> (K, N).
        beside: (K, N) of weights that stay in 4 bits whatever is felt: an embedding that is not the head's.

    Raises:
        BadInput: the budget is below what all of them take in 4 bits.
    """
    small, large = ({n: stored_bytes(s, bits, block_size) for n, s in shapes.items()} for bits in (4, 8))
    least = sum(small.values()) + sum(stored_bytes(shape, 4, block_size) for shape in beside)
    left = budget_mib * MIB - least
    if left < 0:
        raise BadInput(
            f"precision.graph_mib {budget_mib:g}: int4 alone takes {least / MIB:.3f} MiB; raise it to that at least"
        )
    chosen = []
    for name in sorted(felt, key=lambda n: felt[n] / (large[n] - small[n]), reverse=True):
        more = large[name] - small[name]
        if more <= left and felt[name] > 0:
            chosen.append(name)
            left -= more
    return chosen


def stored_bytes(shape: tuple[int, int], bits: int, block_size: int) -> int:
    """Codes and scales of a symmetric [K, N] weight, K padded to whole blocks."""
    blocks = -(-shape[0] // block_size)
    return shape[1] * blocks * (block_size * bits // 8 + 4)


def _log_softmax(logits: F32) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide
