"""Which student layer learns from which teacher layer. Layers are counted from 0; a layer's feature is its block's output.

uniform      student l <- teacher round((l + 1) L_T / L_S) - 1, on at most four pairs, the last among them
last         the last two
first_last   the first pair and the last pair
a list       explicit [student, teacher] pairs
"""

from __future__ import annotations

from collections.abc import Sequence

from edgestill.runtime.errors import BadInput

MAX_PAIRS = 4
"""Features of a few layers carry nearly all of the signal; every further pair costs memory and time."""


def layer_pairs(
    spec: str | Sequence[tuple[int, int]], student_layers: int, teacher_layers: int
) -> list[tuple[int, int]]:
    """[(student layer, teacher layer)], ascending.

    Raises:
        BadInput: an explicit pair names a layer that is not there.
    """
    last = (student_layers - 1, teacher_layers - 1)
    if spec == "last":
        return [last]
    if spec == "first_last":
        return sorted({(0, 0), last})
    if spec == "uniform":
        count = min(MAX_PAIRS, student_layers)
        students = sorted({round((i + 1) * student_layers / count) - 1 for i in range(count)})
        return [(s, max(0, round((s + 1) * teacher_layers / student_layers) - 1)) for s in students]
    pairs = [(int(student), int(teacher)) for student, teacher in spec]  # type: ignore[str-unpack]  # no name is left
    for student, teacher in pairs:
        if not (0 <= student < student_layers and 0 <= teacher < teacher_layers):
            raise BadInput(
                f"losses.features.layers: pair [{student}, {teacher}] does not exist; the student has layers 0 to "
                f"{student_layers - 1}, the teacher 0 to {teacher_layers - 1}"
            )
    return sorted(pairs)


def kept_layers(layers: int, keep: int) -> list[int]:
    """`keep` of `layers` layers, evenly spaced, the first and the last among them.

    Raises:
        BadInput: more are asked for than there are.
    """
    if keep > layers:
        raise BadInput(f"student.layers: {keep} is more than the teacher's {layers}; keep at most {layers}")
    if keep == 1:
        return [0]
    return sorted({round(i * (layers - 1) / (keep - 1)) for i in range(keep)})
