"""Multi-layer feature alignment with several teachers (arXiv 2412.19449, weighted as the outputs are: arXiv 2507.15198).

For every mapped pair (student layer s, teacher layer t) of teacher k, with W a projection from student width to teacher width:

    mse      L = mean over tokens of |W h_s - h_t|^2 / E|h_t|^2       scale-free over layers and teachers
    cosine   L = mean over tokens of 1 - cos(W h_s, h_t)

The teachers' losses are summed with the sequence means of the output weights, averaged over the pairs. Projections live here,
outside the student, and are saved beside it, never in its checkpoint. The first tokens of a window are left out: they carry
massive activations that would dominate the error.

`Balance` scales the feature loss to a share of the output loss: lambda = ratio * EMA(output) / EMA(features), detached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from edgestill.compress.layer_map import layer_pairs
from edgestill.profiles.schema import FeatureLossSpec
from edgestill.runtime.errors import BadInput


def mapped_layers(
    spec: FeatureLossSpec, student: tuple[int, int], teachers: Sequence[tuple[str, int, int]]
) -> list[list[tuple[int, int]]]:
    """Per teacher, the (student layer, teacher layer) pairs to align.

    Args:
        student: (width, layers).
        teachers: (name, width, layers) of each.

    Raises:
        BadInput: `projection: none` with different widths, or an explicit layer that is not there.
    """
    for name, width, _ in teachers:
        if spec.projection == "none" and width != student[0]:
            raise BadInput(
                f"losses.features.projection: none, but the student is {student[0]} wide and teacher {name!r} {width}; "
                "use projection: linear"
            )
    return [layer_pairs(spec.layers, student[1], layers) for _, _, layers in teachers]


class FeatureLoss(nn.Module):
    """Projections and loss for all teachers. Call: hidden states of the mapped layers in, one scalar out."""

    def __init__(
        self, spec: FeatureLossSpec, student: tuple[int, int], teachers: Sequence[tuple[str, int, int]], seed: int
    ) -> None:
        """Arguments and errors: as `mapped_layers`; seed: of the projections."""
        super().__init__()
        self.spec = spec
        self.pairs = mapped_layers(spec, student, teachers)
        self.projections = nn.ModuleList()
        generator = torch.Generator().manual_seed(seed)
        for (_, width, _), pairs in zip(teachers, self.pairs, strict=True):
            maps = nn.ModuleList()
            for _ in pairs:
                linear = nn.Linear(student[0], width, bias=False)
                with torch.no_grad():  # keeps the scale of the features whatever the two widths are
                    linear.weight.normal_(0.0, student[0] ** -0.5, generator=generator)
                maps.append(linear if spec.projection == "linear" else nn.Identity())
            self.projections.append(maps)

    def student_layers(self) -> list[int]:
        """Layers of the student whose outputs are needed."""
        return sorted({s for pairs in self.pairs for s, _ in pairs})

    def teacher_layers(self, teacher: int) -> list[int]:
        """Layers of this teacher whose outputs are needed."""
        return sorted({t for _, t in self.pairs[teacher]})

    def forward(
        self, student: Mapping[int, Tensor], teachers: Sequence[Mapping[int, Tensor]], weights: Tensor, mask: Tensor
    ) -> Tensor:
        """Scalar float32 loss.

        Args:
            student: layer -> [B, T, d_S].
            teachers: per teacher, layer -> [B, T, d_k].
            weights: float32 [K, B], weight of each teacher for each sequence (detached, sum 1 over K).
            mask: bool [B, T], tokens that count; the first `skip_first_tokens` are dropped here.
        """
        keep = mask.clone()
        keep[:, : self.spec.skip_first_tokens] = False
        share = keep.float() / keep.sum(1, keepdim=True).clamp_min(1)  # [B, T], sums to 1 per sequence
        total = weights.new_zeros(())
        for k, (pairs, maps) in enumerate(zip(self.pairs, self.projections, strict=True)):
            for (s, t), projection in zip(pairs, maps.children(), strict=True):
                ours, theirs = projection(student[s]).float(), teachers[k][t].float()
                per_sequence = (self._distance(ours, theirs) * share).sum(1)
                total = total + (weights[k] * per_sequence).mean() / len(pairs)
        return total

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """[B, T]."""
        if self.spec.loss == "cosine":
            return 1 - torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
        return (ours - theirs).square().mean(-1) / theirs.square().mean().clamp_min(1e-12)


class Balance(nn.Module):
    """Scales an auxiliary loss to `ratio` times the main loss by running means; its state is saved with the training."""

    def __init__(self, ratio: float, decay: float = 0.98) -> None:
        super().__init__()
        self.ratio, self.decay = ratio, decay
        self.main: Tensor
        self.auxiliary: Tensor
        self.register_buffer("main", torch.zeros(()))
        self.register_buffer("auxiliary", torch.zeros(()))

    @torch.no_grad()
    def forward(self, main: Tensor, auxiliary: Tensor) -> Tensor:
        """The factor for `auxiliary` (detached scalar); a mean over both losses so far, so that no batch blows it up."""
        if self.training:
            # both means start at 0 with the same bias, which cancels in the ratio
            self.main.mul_(self.decay).add_(main.detach().float(), alpha=1 - self.decay)
            self.auxiliary.mul_(self.decay).add_(auxiliary.detach().float(), alpha=1 - self.decay)
        return self.ratio * self.main / self.auxiliary.clamp_min(1e-12)
