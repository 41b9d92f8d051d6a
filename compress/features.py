"""Multi-layer feature alignment with several teachers (arXiv 2412.19449, weighted as the outputs are: arXiv 2507.15198).

For a pair (student layer, teacher layer) of teacher k, with h the student's features, a = W h in the space of comparison and
y the teacher's features there (the teacher's own; after pca, the student's width), h and y brought to a root mean square of 1
per token:

    mse         mean_d (a - y)^2                                y has a mean square of 1: scale-free over layers and teachers
    cosine      1 - cos(a, y)
    l1_logcos   mean_d |a - y| - log sigmoid(cos(a, y))         Lillama (arXiv 2412.16719)

    L = sum_k sum_tokens w_k[sequence] (mean over pairs of the above + weight x prototype match) / tokens

w_k are the sequence means of the output weights. The first tokens of a window add nothing: they carry massive activations that
would dominate the error. Where y comes as several noisy views, the student's choice among them takes its place
(stochastic.py). Projections live here, outside the student, and are saved beside it, never in its checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgestill.compress.alignment import Alignment, PairFit
from edgestill.compress.layer_map import layer_pairs, require_origin
from edgestill.compress.moments import unit_rms
from edgestill.compress.prototypes import assignment_distance
from edgestill.compress.stochastic import guided_target
from edgestill.profiles.schema import FeatureLossSpec
from edgestill.runtime.errors import BadInput


def check_features(
    spec: FeatureLossSpec,
    student: tuple[int, int],
    teachers: Sequence[tuple[str, int, int]],
    *,
    cut_from: str | None,
    length: int,
) -> None:
    """Refuse, before any work, an alignment that cannot be.

    Args:
        student: (width, layers).
        teachers: (name, width, layers) of each.
        cut_from: the teacher that the student is cut from, if it is.
        length: tokens of a window.

    Raises:
        BadInput: widths that the projection cannot bridge, a rank above them, layers that are not there, `layers: origin`
            for a student that was not cut from a teacher, nothing left after `skip_first_tokens`, too many prototypes.
    """
    require_origin(spec, cut_from is not None)
    for name, width, layers in teachers:
        _check_widths(spec, student[0], name, width)
        layer_pairs(spec, student[1], layers, None)
    check_tokens(spec, spec.fit_tokens, length)


def _check_widths(spec: FeatureLossSpec, ours: int, name: str, theirs: int) -> None:
    if spec.projection == "none" and theirs != ours:
        raise BadInput(
            f"losses.features.projection: none, but the student is {ours} wide and teacher {name!r} {theirs}; "
            "use projection: linear"
        )
    if spec.projection == "pca" and ours > theirs:
        raise BadInput(
            f"losses.features.projection: pca, but the student is {ours} wide and teacher {name!r} has only {theirs} "
            "directions; use projection: linear"
        )
    if spec.projection == "low_rank" and spec.rank > min(ours, theirs):
        raise BadInput(
            f"losses.features.rank: {spec.rank}, but the student is {ours} wide and teacher {name!r} {theirs}; "
            f"lower it to at most {min(ours, theirs)}, or use projection: linear"
        )


def check_tokens(spec: FeatureLossSpec, tokens: int, length: int) -> None:
    """Refuse a fit on `tokens` tokens in windows of `length` that has too little to go by.

    Raises:
        BadInput: nothing is left after `skip_first_tokens`, or there are more prototypes than tokens.
    """
    if spec.skip_first_tokens >= length:
        raise BadInput(
            f"losses.features.skip_first_tokens: {spec.skip_first_tokens} leaves nothing of windows of {length} tokens; "
            f"lower it to at most {length - 1}"
        )
    counted = max(1, tokens // length) * (length - spec.skip_first_tokens)
    if spec.prototypes is not None and spec.prototypes.count > counted:
        raise BadInput(
            f"losses.features.prototypes.count: {spec.prototypes.count} prototypes cannot be found among {counted} tokens; "
            "lower it, or raise losses.features.fit_tokens"
        )


class FeatureLoss(nn.Module):
    """Projections and loss for all teachers. Call: hidden states of the mapped layers in, one scalar out."""

    def __init__(
        self,
        spec: FeatureLossSpec,
        alignment: Alignment,
        student_width: int,
        teacher_shapes: Sequence[tuple[str, int, int]],
        seed: int,
    ) -> None:
        """Projections start from `alignment`.

        Args:
            teacher_shapes: (name, width, layers) of each teacher.
            seed: of the projections that the alignment has no fit for.
        """
        super().__init__()
        self.spec = spec
        self.pairs = alignment.pairs
        generator = torch.Generator().manual_seed(seed)
        self.matches = nn.ModuleList(
            nn.ModuleList(_PairMatch(spec, fit, student_width, width, generator) for fit in fits)
            for (_, width, _), fits in zip(teacher_shapes, alignment.fits, strict=True)
        )

    def student_layers(self) -> list[int]:
        """Layers of the student whose outputs are needed."""
        return sorted({s for pairs in self.pairs for s, _ in pairs})

    def teacher_layers(self, teacher: int) -> list[int]:
        """Layers of this teacher whose outputs are needed."""
        return sorted({t for _, t in self.pairs[teacher]})

    def forward(
        self, student: Mapping[int, Tensor], teachers: Sequence[Mapping[int, Tensor]], weights: Tensor, mask: Tensor
    ) -> Tensor:
        """Scalar float32 loss, 0 where no token counts. It is a sum over `mask.sum()`, so that batches weighted by their numbers of
        tokens add up to the loss of all of them at once.

        Args:
            student: layer -> [B, T, d_S].
            teachers: per teacher, layer -> [B, T, d_k], or [N, B, T, d_k] of N noisy passes (`stochastic`).
            weights: float32 [K, B], weight of each teacher for each sequence (detached, sum 1 over K).
            mask: bool [B, T], tokens that count; of these the first `skip_first_tokens` of a window add nothing.
        """
        keep = (mask & (torch.arange(mask.shape[1], device=mask.device) >= self.spec.skip_first_tokens)).float()
        total = weights.new_zeros(())
        for k, (pairs, matches) in enumerate(zip(self.pairs, self.matches, strict=True)):
            share = weights[k].unsqueeze(1) * keep / len(pairs)  # [B, T]
            for (s, t), match in zip(pairs, matches.children(), strict=True):
                total = total + (match(student[s], teachers[k][t], keep) * share).sum()
        return total / mask.sum().clamp_min(1)


class _PairMatch(nn.Module):
    """Projection and prototypes of one pair; call for the distance of each token, float32 [B, T]."""

    def __init__(
        self, spec: FeatureLossSpec, fit: PairFit, student_width: int, teacher_width: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.spec = spec
        self.projection = _projection(spec, fit, student_width, teacher_width, generator)
        self.directions: Tensor | None
        self.mean: Tensor | None
        directions, mean = fit.weights if spec.projection == "pca" else (None, None)
        self.register_buffer("directions", directions)
        self.register_buffer("mean", mean)
        self.prototypes: Tensor | None
        self.register_buffer("prototypes", fit.prototypes)

    def forward(self, student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
        ours, theirs = self.projection(unit_rms(student)).float(), unit_rms(teacher.detach())
        if self.directions is not None and self.mean is not None:
            theirs = unit_rms(functional.linear(theirs - self.mean, self.directions))
        if self.spec.stochastic is not None:
            theirs = guided_target(ours, theirs, keep, self.spec.stochastic.temperature)
        distance = self._distance(ours, theirs)
        if self.spec.prototypes is None or self.prototypes is None:
            return distance
        match = assignment_distance(ours, theirs, self.prototypes, self.spec.prototypes.temperature)
        return distance + self.spec.prototypes.weight * match

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if self.spec.loss == "mse":
            return (ours - theirs).square().mean(-1)
        cosine = functional.cosine_similarity(ours, theirs, dim=-1)
        if self.spec.loss == "cosine":
            return 1 - cosine
        return (ours - theirs).abs().mean(-1) - functional.logsigmoid(cosine)


def _projection(spec: FeatureLossSpec, fit: PairFit, ours: int, theirs: int, generator: torch.Generator) -> nn.Module:
    """Student width -> width of comparison, from the fit, or at random where there is none."""
    if spec.projection in ("none", "pca"):
        return nn.Identity()
    widths = [ours, theirs] if spec.projection == "linear" else [ours, spec.rank, theirs]
    layers = [nn.Linear(i, o, bias=False) for i, o in itertools.pairwise(widths)]
    fitted = list(reversed(fit.weights))  # E R h: the right factor comes first
    with torch.no_grad():
        for n, layer in enumerate(layers):
            if fitted:
                layer.weight = nn.Parameter(fitted[n].clone())
            else:  # keeps the scale of the features whatever the widths are
                layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
    if any(layer.weight.shape != (layer.out_features, layer.in_features) for layer in layers):
        raise ValueError(f"the fit of layers {fit.student_layer} and {fit.teacher_layer} is not for widths {widths}")
    return nn.Sequential(*layers)
