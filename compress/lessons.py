"""Where a batch's lesson comes from: teachers at work, or their stored answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from edgestill.compress.attention import AttentionLoss
from edgestill.compress.features import FeatureLoss
from edgestill.compress.fusion import WeightRule
from edgestill.compress.rows import Rows
from edgestill.compress.stochastic import noisy_features
from edgestill.compress.targets import CachedAnswers, CachedTarget, Lookup, OnlineTarget, Target, TeacherRows
from edgestill.compress.teacher_cache import TeacherCache
from edgestill.compress.teachers import Teacher


@dataclass(frozen=True)
class Lesson:
    """What the teachers say of one batch: the target of its rows, and what alignment takes, per teacher and layer."""

    target: Target
    features: Sequence[Mapping[int, Tensor]] = field(default_factory=tuple)
    attention: Sequence[Mapping[int, Any]] = field(default_factory=tuple)


@dataclass(frozen=True)
class Batch:
    """What the teachers are asked about."""

    input_ids: Tensor
    """int64 [B, T]."""
    rows: Rows
    """The positions that count."""
    windows: Sequence[int]
    """Index of each window in the training part, on the host."""
    features: FeatureLoss | None = None
    attention: AttentionLoss | None = None
    """Both say which layers are wanted."""


class TeacherSource(Protocol):
    """Where lessons come from."""

    names: tuple[str, ...]

    def lesson(self, batch: Batch) -> Lesson:
        """What the teachers say of this batch."""


class TeachersAtWork:
    """All teachers resident; each runs once per batch (and some noisy times more, when the features ask for it)."""

    def __init__(
        self, teachers: Sequence[Teacher], calibrations: Sequence[float], rule: WeightRule, temperature: float
    ) -> None:
        self.teachers, self.calibrations = list(teachers), list(calibrations)
        self.rule, self.temperature = rule, temperature
        self.names = tuple(t.facts.name for t in teachers)

    @torch.no_grad()
    def lesson(self, batch: Batch) -> Lesson:
        features, attention = batch.features, batch.attention
        answers, seen, attended = [], [], []
        for k, (teacher, calibration) in enumerate(zip(self.teachers, self.calibrations, strict=True)):
            layers = features.teacher_layers(k) if features is not None else ()
            noise = features.spec.stochastic if features is not None else None
            with ExitStack() as watching:
                if attention is not None:
                    attended.append(watching.enter_context(attention.watch_teacher(k, teacher.model)))
                hidden, taken = teacher.hidden(batch.input_ids, () if noise else layers)
            answers.append(TeacherRows(batch.rows.take(hidden), teacher.head_weight, teacher.head_bias, calibration))
            seen.append(noisy_features(teacher, batch.input_ids, layers, noise) if noise else taken)
        return Lesson(OnlineTarget(answers, self.rule, batch.rows, temperature=self.temperature), seen, attended)


class TeachersRemembered:
    """The teachers' stored answers; no teacher is loaded and there is nothing to align with."""

    def __init__(
        self,
        names: Sequence[str],
        caches: Sequence[TeacherCache],
        rule: WeightRule,
        vocabulary: int,
        *,
        calibrated: bool,
    ) -> None:
        self.names, self.caches = tuple(names), list(caches)
        self.rule, self.vocabulary, self.calibrated = rule, vocabulary, calibrated
        self._lookup = Lookup(vocabulary)

    def lesson(self, batch: Batch) -> Lesson:
        rows = batch.rows
        every = rows.positions.numel() == rows.valid.numel()
        answers = []
        for cache in self.caches:
            stored = cache.rows(np.asarray(batch.windows, np.int64), batch.input_ids.device)
            entropy = stored.entropy_calibrated if self.calibrated else stored.entropy
            parts = [stored.ids, stored.logp, stored.tail_logp, entropy, stored.label_logp]
            if not every:
                parts = [part.index_select(0, rows.positions) for part in parts]
            ids, log_p, tail, entropy, label = parts
            answers.append(CachedAnswers(ids, log_p, tail, entropy, label, distinct=cache.mode == "top_k"))
        return Lesson(CachedTarget(answers, self.rule, rows, self.vocabulary, self._lookup))
