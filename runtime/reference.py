"""The answers on the held-out tokens, so that quality is checked on a device that has no teacher.

`reference/held_out.safetensors` holds, for W windows of T tokens (position t >= 1 is scored, so n = W * (T - 1) answers in
window-major order) and k stored buckets:

    token_ids          int32   [W, T]
    scored             uint8   [n]     1 where the answer counts (prompt tokens of prompt/response data do not)
    domain             int16   [W]     index into `domains`
    block              int32   [W]     windows of one block come from one stretch of one document (standard errors)
    fused_ids          int32   [n, k]  most likely tokens of the fused target at T = 1, descending
    fused_logp         float32 [n, k]
    fused_tail_logp    float32 [n]     log of the mass outside the k buckets (-inf allowed)
    fused_entropy      float32 [n]     exact, over the whole vocabulary, nats
    fused_label_logp   float32 [n]
    teacher_label_logp float32 [K, n]
    student_label_logp float32 [n]     the float student, computed by torch

`reference/parity.safetensors` (one per bundle, written by export) holds full logit rows of the shipped weights computed in
float32 on the build machine: positions int32 [r, 2] (window, position), logits float32 [r, V].

Without teachers (`edgestill export` of a plain checkpoint) K = 0 and the fused_* arrays are absent (None).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgestill.runtime.errors import BundleError

FOLDER = "reference"
HELD_OUT = "held_out.safetensors"
PARITY = "parity.safetensors"

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FusedAnswers:
    """The fused target at T = 1, one row per answer. Shapes: see the module's docstring."""

    ids: I32
    logp: F32
    tail_logp: F32
    entropy: F32
    label_logp: F32


@dataclass(frozen=True)
class Reference:
    """Everything `check` compares with. Shapes: see the module's docstring."""

    token_ids: I32
    scored: npt.NDArray[np.uint8]
    domain: npt.NDArray[np.int16]
    block: I32
    student_label_logp: F32
    domains: tuple[str, ...]
    teacher_names: tuple[str, ...] = ()
    teacher_label_logp: F32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    fused: FusedAnswers | None = None

    @property
    def labels(self) -> I32:
        """int32 [n]: the true token of every answer."""
        return self.token_ids[:, 1:].reshape(-1)

    def per_answer(self, per_window: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """Repeat a [W] array to [n] answers (domain or block of each)."""
        return np.repeat(per_window, self.token_ids.shape[1] - 1)


def save_reference(reference: Reference, folder: Path) -> None:
    """Write `held_out.safetensors` into `folder` (which is the bundle's `reference/`)."""
    from safetensors.numpy import save_file

    tensors: dict[str, npt.NDArray[np.generic]] = {
        "token_ids": reference.token_ids,
        "scored": reference.scored,
        "domain": reference.domain,
        "block": reference.block,
        "student_label_logp": reference.student_label_logp,
    }
    if reference.teacher_names:
        tensors["teacher_label_logp"] = reference.teacher_label_logp
    if reference.fused is not None:
        tensors |= {
            "fused_ids": reference.fused.ids,
            "fused_logp": reference.fused.logp,
            "fused_tail_logp": reference.fused.tail_logp,
            "fused_entropy": reference.fused.entropy,
            "fused_label_logp": reference.fused.label_logp,
        }
    metadata = {"domains": json.dumps(reference.domains), "teachers": json.dumps(reference.teacher_names)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / HELD_OUT, metadata=metadata)


def load_reference(folder: Path) -> Reference:
    """Read `held_out.safetensors` from `folder`.

    Raises:
        BundleError: a tensor is missing or its shape disagrees with the others.
    """
    from safetensors import safe_open

    path = folder / HELD_OUT
    with safe_open(path, framework="numpy") as handle:
        metadata = handle.metadata() or {}
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    try:
        fused = None
        if "fused_ids" in tensors:
            fused = FusedAnswers(
                tensors["fused_ids"],
                tensors["fused_logp"],
                tensors["fused_tail_logp"],
                tensors["fused_entropy"],
                tensors["fused_label_logp"],
            )
        reference = Reference(
            token_ids=tensors["token_ids"],
            scored=tensors["scored"],
            domain=tensors["domain"],
            block=tensors["block"],
            student_label_logp=tensors["student_label_logp"],
            domains=tuple(json.loads(metadata["domains"])),
            teacher_names=tuple(json.loads(metadata["teachers"])),
            teacher_label_logp=tensors.get("teacher_label_logp", np.zeros((0, 0), np.float32)),
            fused=fused,
        )
    except KeyError as missing:
        raise BundleError(f"{path}: {missing} is missing; rebuild the bundle") from missing
    windows, length = reference.token_ids.shape
    answers = windows * (length - 1)
    shapes = {"scored": reference.scored.shape[0], "student_label_logp": reference.student_label_logp.shape[0]}
    if fused is not None:
        shapes |= {"fused_ids": fused.ids.shape[0], "fused_label_logp": fused.label_logp.shape[0]}
    wrong = [f"{name} has {rows} rows" for name, rows in shapes.items() if rows != answers]
    if wrong or reference.domain.shape != (windows,) or reference.block.shape != (windows,):
        raise BundleError(f"{path}: {', '.join(wrong) or 'domain/block'} for {answers} answers; rebuild the bundle")
    return reference


def save_parity(positions: I32, logits: F32, folder: Path) -> None:
    """Write `parity.safetensors`: positions [r, 2] (window, position), logits [r, V]."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({"positions": positions, "logits": np.ascontiguousarray(logits)}, folder / PARITY)


def load_parity(folder: Path) -> tuple[I32, F32]:
    """Read `parity.safetensors`: positions [r, 2], logits [r, V]."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / PARITY)
    return tensors["positions"], tensors["logits"]
