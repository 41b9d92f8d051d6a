"""Every way in which the weights of one student may be stored: rounded, by GPTQ, by HQQ, or as training left them.

Each becomes a graph of the form that ships (fused, joined), so that what is compared is what a bundle would hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgestill.compress.quantize.shipped import ShippedWeights
from edgestill.export.graph_io import copy_graph
from edgestill.export.input_moments import looked_up_moment, window_feeds
from edgestill.export.onnx_export import ExportedGraph, Exports
from edgestill.export.post_training import by_values, quantize_weights
from edgestill.export.quantize import Given, quantize_graph
from edgestill.export.rewrite.rules import join_weights
from edgestill.export.trained import trained_weights, why_not
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.errors import BadInput

Method = Literal["float", "nearest", "hqq", "gptq", "trained"]
METHODS: tuple[Method, ...] = ("nearest", "hqq", "gptq")
WORDS = {"nearest": "rounded", "hqq": "HQQ", "gptq": "GPTQ", "trained": "trained"}
FLOAT = "float32"


@dataclass(frozen=True)
class Alternative:
    """A precision, and how the weights get there."""

    precision: PrecisionSpec
    method: Method

    @property
    def name(self) -> str:
        """`float32`, `int4, GPTQ`."""
        return FLOAT if self.method == "float" else f"{self.precision.weights}, {WORDS[self.method]}"


def unchanged() -> Alternative:
    """The float weights."""
    return Alternative(PrecisionSpec(weights="float32"), "float")


def alternatives(schemes: Sequence[str], like: PrecisionSpec, checkpoint: Path) -> list[Alternative]:
    """The float weights first, then each of `schemes` in every way there is; `like` has block size and accuracy_level.

    `trained` is there where the student learnt on the very grid.
    """
    found = [unchanged()]
    shipped = ShippedWeights.load(checkpoint)
    for scheme in schemes:
        words: dict[str, Any] = {"weights": scheme, "graph_mib": None}
        for method in METHODS if scheme == "int4" else METHODS[:1]:
            found.append(Alternative(like.model_copy(update={**words, "method": method}), method))
        rounded = like.model_copy(update={**words, "method": "nearest"})
        if shipped is not None and why_not(shipped, rounded) is None:
            found.append(Alternative(rounded, "trained"))
    return found


def write_alternative(
    wanted: Alternative, checkpoint: Path, exports: Exports, calibration: npt.NDArray[np.int64] | None, path: Path
) -> ExportedGraph:
    """Write the student of `checkpoint` with its weights stored as `wanted`.

    Args:
        exports: its float32 graphs.
        calibration: int64 [W, T] windows of training text, for GPTQ.

    Raises:
        BadInput: trained weights that the checkpoint does not have, or GPTQ without text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if wanted.method == "float":
        copy_graph(exports.fused.path, path)
    else:
        given = _given(wanted, checkpoint, exports, calibration)
        quantize_graph(exports.fused.path, path, wanted.precision, given=given)
    join_weights(path)
    return ExportedGraph(path, exports.fused.graph, exports.fused.facts)


def _given(
    wanted: Alternative, checkpoint: Path, exports: Exports, calibration: npt.NDArray[np.int64] | None
) -> Given | None:
    """What `quantize_graph` is given; None: it rounds."""
    if wanted.method == "trained":
        trained = trained_weights(checkpoint, wanted.precision)
        if trained is None:
            raise BadInput(f"{checkpoint}: was not trained on {wanted.precision.weights}; train it with `quantize:`")
        return trained
    if wanted.method not in ("gptq", "hqq"):
        return None
    windows = calibration if calibration is not None else np.zeros((0, 1), np.int64)
    feeds = list(window_feeds(exports.plain.graph, windows))
    looked_up = looked_up_moment(checkpoint, windows) if wanted.method == "gptq" and len(windows) else None
    blocks = quantize_weights(exports.plain.path, wanted.precision, wanted.method, feeds, looked_up=looked_up)
    return by_values(exports.plain.path, blocks)
