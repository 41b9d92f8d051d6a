"""Which student layer learns from which teacher layer. Layers are counted from 0; a layer's feature is its block's output.

origin       the teacher layer that the student layer was copied from, on at most four student layers, the last among them
uniform      student l <- teacher round((l + 1) L_T / L_S) - 1, on at most four student layers, the last among them
last         the last two
first_last   the first pair and the last pair
every        each n-th student layer and the last one, teachers' layers as in uniform
cka          the student layers of uniform, each with its most similar teacher layer, in order (`most_similar_in_order`)
a list       explicit [student, teacher] pairs
"""

from __future__ import annotations

from collections.abc import Sequence

from edgestill.profiles.schema import FeatureLossSpec
from edgestill.runtime.errors import BadInput

MAX_PAIRS = 4
"""Features of a few layers carry nearly all of the signal; every further pair costs memory and time."""


def layer_pairs(
    spec: FeatureLossSpec, student_layers: int, teacher_layers: int, origin: Sequence[int] | None
) -> list[tuple[int, int]]:
    """[(student layer, teacher layer)] for one teacher, ascending.

    Args:
        origin: for each student layer the layer of this teacher it was copied from; None: it was cut from another one, and
            `origin` falls back to `uniform`. `cka` is `uniform` until the fit has measured what is similar.

    Raises:
        BadInput: an explicit pair names a layer that is not there, or there is none.
    """
    if isinstance(spec.layers, list):
        return _explicit(spec.layers, student_layers, teacher_layers)
    last = student_layers - 1
    if spec.layers == "last":
        return [(last, teacher_layers - 1)]
    if spec.layers == "first_last":
        return sorted({(0, 0), (last, teacher_layers - 1)})
    if spec.layers == "every":
        students = sorted({*range(spec.every - 1, student_layers, spec.every), last})
    else:
        count = min(MAX_PAIRS, student_layers)
        students = sorted({round((i + 1) * student_layers / count) - 1 for i in range(count)})
    if spec.layers == "origin" and origin is not None:
        if len(origin) != student_layers:
            raise ValueError(f"origin names {len(origin)} layers, the student has {student_layers}")
        return [(s, origin[s]) for s in students]
    return [(s, max(0, round((s + 1) * teacher_layers / student_layers) - 1)) for s in students]


def _explicit(pairs: list[tuple[int, int]], student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    if not pairs:
        raise BadInput("losses.features.layers: [] names no pair; give [student, teacher] pairs, or uniform")
    for student, teacher in pairs:
        if not (0 <= student < student_layers and 0 <= teacher < teacher_layers):
            raise BadInput(
                f"losses.features.layers: pair [{student}, {teacher}] does not exist; the student has layers 0 to "
                f"{student_layers - 1}, the teacher 0 to {teacher_layers - 1}"
            )
    return sorted(set(pairs))


def require_origin(spec: FeatureLossSpec, known: bool) -> None:
    """Refuse `layers: origin` for a student that was cut from no teacher.

    Raises:
        BadInput: as said.
    """
    if spec.layers == "origin" and not known:
        raise BadInput(
            "losses.features.layers: origin needs a student that was cut from a teacher; "
            "use student.init: teacher:NAME, or layers: uniform"
        )


def most_similar_in_order(similarity: Sequence[Sequence[float]]) -> list[int]:
    """For each row of `similarity` [S][T] a column, ascending, with the largest sum; by dynamic programming.

    Columns are distinct where T >= S, so that no two student layers learn the same; else neighbours may share one.
    """
    rows, columns = len(similarity), len(similarity[0])
    step = 1 if columns >= rows else 0
    best = list(similarity[0])
    came_from: list[list[int]] = []
    for row in similarity[1:]:
        scores, sources = [], []
        leader = -1  # the best column before this one, so far
        for t, own in enumerate(row):
            before = t - step
            if before >= 0 and (leader < 0 or best[before] > best[leader]):
                leader = before
            sources.append(leader)
            scores.append(own + best[leader] if leader >= 0 else float("-inf"))
        came_from.append(sources)
        best = scores
    chosen = [max(range(columns), key=best.__getitem__)]
    for sources in reversed(came_from):
        chosen.append(sources[chosen[-1]])
    return chosen[::-1]


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
