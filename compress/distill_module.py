"""Student, projections and losses as one module: what the Trainer trains (and what DDP or FSDP would wrap).

Teachers stay outside: they are frozen, not saved, and not resident when their answers come from the cache. Nothing here reads
a tensor back to the host; sums for the log are kept on the device and read once per log interval (`Meter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgestill.compress.features import Balance, FeatureLoss
from edgestill.compress.fused_head import OutputLoss, output_loss
from edgestill.compress.fusion import WeightRule, pool
from edgestill.compress.targets import CachedAnswers, CachedTarget, OnlineTarget, Target, TeacherRows
from edgestill.compress.teacher_cache import TeacherCache
from edgestill.compress.teachers import Teacher, hidden_states

IGNORE = -100
"""Label of a token that does not count, as in transformers."""


@dataclass(frozen=True)
class Lesson:
    """What the teachers say of one batch: the target of the valid rows, and their features per teacher and layer."""

    target: Target
    features: Sequence[Mapping[int, Tensor]]


class TeacherSource(Protocol):
    """Where lessons come from."""

    names: tuple[str, ...]

    def lesson(self, input_ids: Tensor, windows: Tensor, valid: Tensor, layers: Sequence[Sequence[int]]) -> Lesson:
        """The lesson of a batch.

        Args:
            input_ids: int64 [B, T].
            windows: int64 [B], index of each window in the training part.
            valid: bool [B, T - 1], positions whose next token counts.
            layers: per teacher, the layers whose features are wanted.
        """


class TeachersAtWork:
    """All teachers resident; each runs once per batch."""

    def __init__(
        self, teachers: Sequence[Teacher], calibrations: Sequence[float], rule: WeightRule, temperature: float
    ) -> None:
        self.teachers, self.calibrations = list(teachers), list(calibrations)
        self.rule, self.temperature = rule, temperature
        self.names = tuple(t.facts.name for t in teachers)

    @torch.no_grad()
    def lesson(self, input_ids: Tensor, windows: Tensor, valid: Tensor, layers: Sequence[Sequence[int]]) -> Lesson:
        rows, features = [], []
        for i, (teacher, calibration) in enumerate(zip(self.teachers, self.calibrations, strict=True)):
            hidden, taken = teacher.hidden(input_ids, layers[i] if layers else ())
            rows.append(TeacherRows(hidden[:, :-1][valid], teacher.head_weight, teacher.head_bias, calibration))
            features.append(taken)
        return Lesson(OnlineTarget(rows, self.rule, temperature=self.temperature), features)


class TeachersRemembered:
    """The teachers' stored answers; no teacher is loaded and there are no features."""

    def __init__(self, names: Sequence[str], caches: Sequence[TeacherCache], rule: WeightRule, vocabulary: int) -> None:
        self.names, self.caches = tuple(names), list(caches)
        self.rule, self.vocabulary = rule, vocabulary

    def lesson(self, input_ids: Tensor, windows: Tensor, valid: Tensor, layers: Sequence[Sequence[int]]) -> Lesson:
        rows, ids = valid.reshape(-1), windows.cpu().numpy()  # windows are host data: the cache lies on disk
        answers = []
        for cache in self.caches:
            stored = cache.rows(ids)
            answers.append(
                CachedAnswers(
                    *(
                        tensor.to(input_ids.device, non_blocking=True)[rows]
                        for tensor in (stored.ids, stored.logp, stored.tail_logp, stored.entropy)
                    )
                )
            )
        return Lesson(CachedTarget(answers, self.rule, self.vocabulary), [])


class Meter:
    """Sums on the device since the last reading: losses, and weight and entropy per domain and teacher."""

    def __init__(self, teachers: int, domains: int) -> None:
        self.shape = (teachers, domains)
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add a tensor to the sum called `name`."""
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def add_target(self, target: Target, domain: Tensor) -> None:
        """Add a target's weights and entropies [K, n]; `domain` int64 [n]."""
        teachers, domains = self.shape
        for name, values in (("weights", target.weights), ("entropies", target.entropies)):
            self.add(name, values.new_zeros(teachers, domains).index_add_(1, domain, values))
        self.add("rows", target.weights.new_zeros(domains).index_add_(0, domain, torch.ones_like(target.weights[0])))

    def read(self) -> dict[str, Tensor]:
        """Everything on the host; starts anew."""
        sums, self.sums = {name: value.float().cpu() for name, value in self.sums.items()}, {}
        return sums


class DistillModule(nn.Module):
    """forward(batch) -> loss of the batch's share of an accumulation window."""

    def __init__(
        self,
        student: PreTrainedModel,
        source: TeacherSource | None,
        output: OutputLoss,
        features: FeatureLoss | None,
        domains: int,
    ) -> None:
        super().__init__()
        self.student = student
        self.features = features
        self.balance = Balance(features.spec.ratio) if features is not None else None
        self.output = output
        self.meter = Meter(len(source.names) if source else 0, domains)
        self._source = [source]  # in a list: not a submodule, whatever it holds is neither moved nor saved

    def forward(self, input_ids: Tensor, labels: Tensor, windows: Tensor, domain: Tensor, normaliser: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            input_ids: int64 [B, T].
            labels: int64 [B, T], IGNORE where a token does not count (always at position 0).
            windows: int64 [B], index of each window in the training part.
            domain: int64 [B].
            normaliser: valid labels of the whole accumulation window, over all processes.
        """
        source = self._source[0]
        valid = labels[:, 1:] != IGNORE
        wanted = self.features.student_layers() if self.features else []
        hidden, ours = hidden_states(self.student, input_ids, wanted)
        lesson = None
        if source is not None and (self.output.weight > 0 or self.features):
            teacher_layers = (
                [self.features.teacher_layers(k) for k in range(len(source.names))] if self.features else []
            )
            lesson = source.lesson(input_ids, windows, valid, teacher_layers)
        head = self.student.get_output_embeddings()
        loss, sums = output_loss(
            hidden[:, :-1][valid],
            head.weight,
            getattr(head, "bias", None),
            labels[:, 1:][valid],
            self._lengths(valid),
            lesson.target if lesson else None,
            normaliser,
            self.output,
        )
        share = valid.sum() / normaliser
        self.meter.add("labels", valid.sum())
        self.meter.add("output", sums.divergence)
        self.meter.add("cross_entropy", sums.cross_entropy)
        if lesson is not None:
            self.meter.add_target(lesson.target, domain.unsqueeze(1).expand_as(valid)[valid])
            if self.features is not None and self.balance is not None:
                weights = self._sequence_weights(lesson.target, valid)
                mask = torch.cat([valid, valid[:, -1:]], dim=1)
                feature = self.features(ours, lesson.features, weights, mask)
                main = sums.divergence if self.output.weight > 0 else sums.cross_entropy
                factor = self.balance(main / valid.sum().clamp_min(1), feature)
                loss = loss + factor * feature * share
                self.meter.add("features", feature * valid.sum())
        return loss

    @staticmethod
    def _lengths(valid: Tensor) -> list[int]:
        """Valid rows per sequence. On a GPU plain text must not wait for a read-back, so equal lengths are not counted."""
        if valid.device.type != "cpu":
            return [valid.shape[1]] * valid.shape[0]
        return [int(n) for n in valid.sum(1).tolist()]

    @staticmethod
    def _sequence_weights(target: Target, valid: Tensor) -> Tensor:
        """[K, B]: mean output weight per teacher and sequence."""
        batch = valid.shape[0]
        sequence = torch.arange(batch, device=valid.device).unsqueeze(1).expand_as(valid)[valid]
        out = target.weights.new_zeros(target.weights.shape[0], batch)
        return out.index_copy_(1, sequence, torch.stack([pool(row, sequence) for row in target.weights]))
