"""What feature alignment starts from: layer pairs, projections and prototypes, fitted on training tokens.

With x the student's and y the teacher's features of a pair, d_S and d_T wide, each token brought to a root mean square of 1, the
first tokens of each window left out:

    pca        z = P (y - E y), P [d_S, d_T] the top eigenvectors of cov(y): fixed          (arXiv 2204.08415 for the idea)
    linear     W = E[y x'] (E[x x'] + ridge I)^-1, the least-squares fit of y from x
    low_rank   E R nearest to that W on the student's features: the best fit of its rank, in two balanced factors
    cka        ||cov(x, y)||^2 / (||cov(x)|| ||cov(y)||) in Frobenius norms, for each student layer and each teacher layer

Teachers are loaded one after the other, and moments are summed batch by batch in float64: no feature outlives its batch but a
sample (`PASS_BYTES`) on which prototypes are found. pca turns the teacher's axes, so a student that was cut from
a teacher of its own width is better served by `none`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgestill.compress.alignment import Alignment, PairFit
from edgestill.compress.features import check_tokens
from edgestill.compress.layer_map import layer_pairs, most_similar_in_order, require_origin
from edgestill.compress.moments import (
    Product,
    least_squares,
    linear_cka,
    low_rank_factors,
    principal_directions,
    unit_rms,
)
from edgestill.compress.prototypes import cluster_directions
from edgestill.compress.teachers import Teacher, decoder_blocks, hidden_states
from edgestill.profiles.schema import FeatureLossSpec
from edgestill.runtime.progress import Task

__all__ = ["Alignment", "fit_alignment"]

CKA_TOKENS = 10_000
PASS_BYTES = 1 << 30
"""What may be held of a teacher's layers, moments for cka or samples for prototypes; the next layers get another pass."""
PROTOTYPE_TOKENS = 8192
TOKENS_PER_PROTOTYPE = 16
"""The sample for k-means has the larger of the two numbers of tokens."""

Ids = npt.NDArray[np.generic]


def fit_alignment(
    spec: FeatureLossSpec,
    student: PreTrainedModel,
    teachers: Sequence[Callable[[], Teacher]],
    token_ids: Ids,
    origin_of: Sequence[Sequence[int] | None],
    *,
    batch_size: int,
    task: Task,
) -> Alignment:
    """Fit everything that `FeatureLoss` needs. The student is the one that will be trained, with its initial weights.

    Args:
        teachers: one function per teacher that loads it; a teacher is let go before the next one is loaded.
        token_ids: integer [W, T], windows of the training part; of these, evenly, enough for `spec.fit_tokens` (`evenly`).
        origin_of: per teacher, the layer of it that each student layer was copied from; None: cut from another, or from none.
        task: advanced by the tokens of these windows for each teacher.

    Raises:
        BadInput: `layers: origin` without any origin, windows of which nothing is left after `skip_first_tokens`, more
            prototypes than tokens, or layers that are not there.
    """
    require_origin(spec, any(origin is not None for origin in origin_of))
    ids = evenly(token_ids, spec.fit_tokens)
    check_tokens(spec, ids.size, ids.shape[1])
    fits: list[list[PairFit]] = []
    with _frozen(student):
        for make, origin in zip(teachers, origin_of, strict=True):
            fits.append(_Fit(spec, student, make(), ids, batch_size, task).run(origin))
    return Alignment(fits)


def evenly(token_ids: Ids, tokens: int) -> Ids:
    """Windows for about `tokens` tokens (at least one), evenly spaced, so that every source has its share."""
    windows, length = token_ids.shape
    wanted = min(windows, max(1, math.ceil(tokens / length)))
    return token_ids[np.linspace(0, windows - 1, wanted).round().astype(np.int64)]


@contextmanager
def _frozen(student: PreTrainedModel) -> Iterator[None]:
    """The student as it answers, without gradient; its mode of training comes back."""
    training = student.training
    student.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        student.train(training)


class _Fit:
    """One teacher's part. Lives as long as the teacher does."""

    def __init__(
        self, spec: FeatureLossSpec, student: PreTrainedModel, teacher: Teacher, ids: Ids, batch_size: int, task: Task
    ) -> None:
        self.spec, self.student, self.teacher = spec, student, teacher
        self.ids, self.batch_size, self.task = ids, batch_size, task
        self.ours_on = next(student.parameters()).device
        self.device = teacher.head_weight.device
        self.width: int = student.config.get_text_config(decoder=True).hidden_size

    def run(self, origin: Sequence[int] | None) -> list[PairFit]:
        depth = len(decoder_blocks(self.student))
        pairs = layer_pairs(self.spec, depth, self.teacher.facts.n_layers, origin)
        if self.spec.layers == "cka":
            pairs = self._similar([s for s, _ in pairs])
        solvers = self._moments(pairs)
        fits = []
        for (s, t), solver in zip(pairs, solvers, strict=True):
            fits.append(PairFit(s, t, tuple(w.float().cpu() for w in solver.solve(self.width))))
        return fits if self.spec.prototypes is None else self._with_prototypes(fits, self.spec.prototypes.count)

    def _batches(
        self, ids: Ids, ours: Sequence[int], theirs: Sequence[int]
    ) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor], int]]:
        """Counted features [n, d] of the student's and of the teacher's layers, and tokens gone through, batch by batch."""
        for start in range(0, len(ids), self.batch_size):
            batch = torch.from_numpy(ids[start : start + self.batch_size].astype(np.int64))
            x = hidden_states(self.student, batch.to(self.ours_on), ours)[1] if ours else {}
            y = self.teacher.hidden(batch.to(self.device), theirs)[1]
            yield self._counted(x), self._counted(y), batch.numel()

    def _counted(self, taken: dict[int, Tensor]) -> dict[int, Tensor]:
        skip = self.spec.skip_first_tokens
        return {layer: unit_rms(f[:, skip:].flatten(0, 1).to(self.device)) for layer, f in taken.items()}

    def _moments(self, pairs: list[tuple[int, int]]) -> list[_PairMoments]:
        fitted = self.spec.projection in ("linear", "low_rank")
        solvers = [_PairMoments(self.spec) for _ in pairs]
        ours = [s for s, _ in pairs] if fitted else []
        for x, y, tokens in self._batches(self.ids, ours, [t for _, t in pairs]):
            for (s, t), solver in zip(pairs, solvers, strict=True):
                solver.add(x[s] if fitted else None, y[t])
            self.task.advance(tokens, note=self.teacher.facts.name)
        return solvers

    def _similar(self, students: list[int]) -> list[tuple[int, int]]:
        """`cka`: each of these student layers with its teacher layer."""
        ids, depth = evenly(self.ids, CKA_TOKENS), self.teacher.facts.n_layers
        ours, theirs = self.width, self.teacher.facts.hidden_size
        room = PASS_BYTES - 8 * len(students) * ours**2
        group = max(1, room // (8 * (theirs**2 + len(students) * ours * theirs)))
        similarity: list[list[float]] = [[] for _ in students]
        for first in range(0, depth, group):
            layers = range(first, min(first + group, depth))
            xx, yy = {s: Product() for s in students}, {t: Product() for t in layers}
            xy = {(s, t): Product() for s in students for t in layers}
            for x, y, _ in self._batches(ids, students, layers):
                for s in students:
                    xx[s].add(x[s], x[s])
                for t in layers:
                    yy[t].add(y[t], y[t])
                for s, t in xy:
                    xy[s, t].add(x[s], y[t])
            for row, s in zip(similarity, students, strict=True):
                row.extend(linear_cka(xx[s], yy[t], xy[s, t]) for t in layers)
        return list(zip(students, most_similar_in_order(similarity), strict=True))

    def _with_prototypes(self, fits: list[PairFit], count: int) -> list[PairFit]:
        ids = evenly(self.ids, max(PROTOTYPE_TOKENS, TOKENS_PER_PROTOTYPE * count))
        layers = sorted({fit.teacher_layer for fit in fits})
        group = max(1, PASS_BYTES // (4 * ids.size * self.teacher.facts.hidden_size))
        found: dict[int, Tensor] = {}
        for first in range(0, len(layers), group):
            wanted = layers[first : first + group]
            sample: dict[int, list[Tensor]] = {t: [] for t in wanted}
            for _, y, _ in self._batches(ids, (), wanted):
                for t in wanted:
                    sample[t].append(y[t].float())
            for t in wanted:
                points = torch.cat(sample.pop(t))
                if self.spec.projection == "pca":
                    fitted = next(fit for fit in fits if fit.teacher_layer == t)
                    directions, mean = (w.to(self.device) for w in fitted.weights)
                    points = (points - mean) @ directions.T
                found[t] = cluster_directions(points, count).cpu()
        return [fit.with_prototypes(found[fit.teacher_layer]) for fit in fits]


class _PairMoments:
    """What the projection of one pair is solved from."""

    def __init__(self, spec: FeatureLossSpec) -> None:
        self.spec = spec
        self.xx, self.yx, self.yy = Product(), Product(), Product()

    def add(self, x: Tensor | None, y: Tensor) -> None:
        if x is not None:
            self.xx.add(x, x)
            self.yx.add(y, x)
        if self.spec.projection == "pca":
            self.yy.add(y, y)

    def solve(self, width: int) -> tuple[Tensor, ...]:
        """The projection's weights as `PairFit` keeps them."""
        match self.spec.projection:
            case "none":
                return ()
            case "pca":
                directions, _ = principal_directions(self.yy.covariance(), width)
                return directions, self.yy.mean_left()
            case "linear":
                return (least_squares(self.xx.raw(), self.yx.raw()),)
            case "low_rank":
                fit = least_squares(self.xx.raw(), self.yx.raw())
                return low_rank_factors(fit, self.xx.raw(), self.spec.rank)
