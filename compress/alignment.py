"""The result of the fit: what each pair of layers starts from, kept as one safetensors file and one JSON file.

alignment.safetensors   float32: `<teacher>.<pair>.weight.<i>` and `<teacher>.<pair>.prototypes`
alignment.json          pairs, number of weights, sha256 of the other file; written last, so it vouches for both
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from edgestill.runtime.errors import BadInput
from edgestill.runtime.files import write_atomically

TENSORS, WORDS = "alignment.safetensors", "alignment.json"
FORMAT = 2


@dataclass(frozen=True)
class PairFit:
    """One student layer and the teacher layer it learns from."""

    student_layer: int
    teacher_layer: int
    weights: tuple[Tensor, ...] = ()
    """float32. linear: W [d_T, d_S]; low_rank: E [d_T, r], R [r, d_S]; pca: P [d_S, d_T], the mean [d_T]; none: empty.
    Empty for linear or low_rank: no fit, the projection starts at random."""
    prototypes: Tensor | None = None
    """float32 [M, d], rows of length 1, in the space of comparison: the teacher's, or the student's width after pca."""

    def with_prototypes(self, prototypes: Tensor) -> PairFit:
        return replace(self, prototypes=prototypes)


@dataclass(frozen=True)
class Alignment:
    """Per teacher, the fits of its pairs."""

    fits: Sequence[Sequence[PairFit]]

    @property
    def pairs(self) -> list[list[tuple[int, int]]]:
        """Per teacher, [(student layer, teacher layer)]."""
        return [[(fit.student_layer, fit.teacher_layer) for fit in fits] for fits in self.fits]

    def save(self, folder: Path) -> None:
        """Write both files into `folder`, which exists."""
        content = safetensors.torch.save(self._tensors())
        write_atomically(folder / TENSORS, content)
        words = {
            "format": FORMAT,
            "tensors_sha256": hashlib.sha256(content).hexdigest(),
            "teachers": [[_words(fit) for fit in fits] for fits in self.fits],
        }
        write_atomically(folder / WORDS, (json.dumps(words, indent=1) + "\n").encode())

    def _tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for k, fits in enumerate(self.fits):
            for i, fit in enumerate(fits):
                named |= {f"{k}.{i}.weight.{n}": weight.contiguous() for n, weight in enumerate(fit.weights)}
                if fit.prototypes is not None:  # two pairs may share them; a file holds a tensor once per name
                    named[f"{k}.{i}.prototypes"] = fit.prototypes.clone()
        return named

    @classmethod
    def load(cls, folder: Path) -> Alignment:
        """What `save` wrote.

        Raises:
            BadInput: a file is missing, from another version, or not the one that was written with the other.
        """
        try:
            words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
            content = (folder / TENSORS).read_bytes()
        except (FileNotFoundError, json.JSONDecodeError) as error:
            raise BadInput(
                f"{folder}: holds no whole feature fit ({error}); remove the folder and build again"
            ) from error
        if words["format"] != FORMAT or hashlib.sha256(content).hexdigest() != words["tensors_sha256"]:
            raise BadInput(
                f"{folder}: {TENSORS} and {WORDS} (format {words['format']}, this version reads {FORMAT}) do not belong "
                "together; remove the folder and build again"
            )
        named = safetensors.torch.load(content)
        return cls(
            [[_fit(fit, named, f"{k}.{i}") for i, fit in enumerate(fits)] for k, fits in enumerate(words["teachers"])]
        )


def _words(fit: PairFit) -> dict[str, Any]:
    return {
        "student_layer": fit.student_layer,
        "teacher_layer": fit.teacher_layer,
        "weights": len(fit.weights),
    }


def _fit(words: dict[str, Any], named: dict[str, Tensor], prefix: str) -> PairFit:
    return PairFit(
        words["student_layer"],
        words["teacher_layer"],
        tuple(named[f"{prefix}.weight.{n}"] for n in range(words["weights"])),
        named.get(f"{prefix}.prototypes"),
    )
