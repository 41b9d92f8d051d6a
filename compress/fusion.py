"""How the teachers' distributions become one target: weights per teacher, and the mix (arXiv 2507.15198).

With p_k the distribution of teacher k (K of them), H_k its entropy in nats at its calibration temperature, V the vocabulary:

    uniform       w_k = 1 / K
    static        w_k given, sum 1
    entropy       w_k = softmax_k(-(H_k / log V) / tau)       normalised entropy, so tau does not depend on the vocabulary
    floor         w <- (1 - floor) w + floor / K              every teacher stays alive
    granularity   token: H of the token; sequence: mean H over the valid tokens of the sequence

    arithmetic    p = sum_k w_k p_k                           any sure teacher contributes
    geometric     log p = sum_k w_k log p_k - log Z           a token vetoed by one teacher dies

Both mixes are linear in w before normalisation (probabilities or log-probabilities), so `FusionAccumulator` takes the
teachers one after the other and holds one [rows, V] sum (two when floor > 0) whatever K is. The floor is linear too: it mixes
in the plain mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgestill.compress.divergence import LOG_TINY, row_dot
from edgestill.profiles.schema import FusionSpec


@dataclass(frozen=True)
class WeightRule:
    """What decides the weights: the words of the recipe, resolved for K teachers and a vocabulary."""

    log_prior: tuple[float, ...]
    """log of the static weights (uniform: log 1/K)."""
    by_entropy: bool
    pooled: bool
    """Entropies are averaged over the sequence."""
    tau: float
    floor: float
    geometric: bool
    log_vocabulary: float

    @classmethod
    def of(cls, spec: FusionSpec, static_weights: Sequence[float], vocabulary: int) -> WeightRule:
        """The rule of a recipe for teachers with these static weights (read only under `weights: static`)."""
        weights = list(static_weights) if spec.weights == "static" else [1.0] * len(static_weights)
        total = sum(weights)
        return cls(
            log_prior=tuple(math.log(w / total) for w in weights),
            by_entropy=spec.weights == "entropy",
            pooled=spec.granularity == "sequence",
            tau=spec.entropy_temperature,
            floor=spec.floor if spec.weights == "entropy" else 0.0,
            geometric=spec.mix == "geometric",
            log_vocabulary=math.log(vocabulary),
        )

    def score(self, teacher: int, entropy: Tensor, sequence: Tensor) -> Tensor:
        """Unnormalised log-weight of one teacher for each row.

        Args:
            teacher: its index.
            entropy: float32 [rows], nats; not read unless `by_entropy`.
            sequence: int64 [rows], which sequence a row belongs to; every row of a sequence must be here when `pooled`.
        """
        if not self.by_entropy:
            return torch.full_like(entropy, self.log_prior[teacher])
        if self.pooled:
            entropy = pool(entropy, sequence)
        return entropy / (-self.tau * self.log_vocabulary)

    def weights(self, entropies: Tensor, sequence: Tensor) -> Tensor:
        """Normalised weights float32 [K, rows] from entropies [K, rows], floor included."""
        scores = torch.stack([self.score(k, row, sequence) for k, row in enumerate(entropies)])
        return self.with_floor(scores.softmax(0))

    def with_floor(self, weights: Tensor) -> Tensor:
        """(1 - floor) w + floor / K for weights [K, ...]."""
        return weights if self.floor == 0 else weights * (1 - self.floor) + self.floor / weights.shape[0]


def pool(values: Tensor, sequence: Tensor) -> Tensor:
    """Mean of `values` [rows] over the rows of the same sequence, handed back to each row."""
    first = sequence - sequence[:1] if sequence.numel() else sequence
    sums = torch.zeros_like(values).index_add_(0, first, values)
    counts = torch.zeros_like(values).index_add_(0, first, torch.ones_like(values))
    return (sums / counts.clamp_min(1))[first]


def entropy_of(log_p: Tensor) -> Tensor:
    """Entropy in nats [rows] of finite log-probabilities [rows, C]."""
    return -row_dot(log_p.exp(), log_p)


class FusionAccumulator:
    """Adds teachers one at a time into one target; `finish` normalises. All tensors float32."""

    def __init__(self, rule: WeightRule, teachers: int) -> None:
        self.rule = rule
        self.teachers = teachers
        self.scores: list[Tensor] = []
        self._weighted: Tensor | None = None
        self._plain: Tensor | None = None
        self._total: Tensor | None = None
        self._shift: Tensor | None = None

    def term(self, logits: Tensor) -> Tensor:
        """What `add` takes of a teacher's logits [rows, C]: probabilities, or log-probabilities for the geometric mix."""
        return torch.log_softmax(logits, -1) if self.rule.geometric else torch.softmax(logits, -1)

    def add(self, term: Tensor, score: Tensor) -> None:
        """Add one teacher's `term` [rows, C] (kept and overwritten) with its unnormalised log-weight [rows]."""
        self.scores.append(score)
        if self.rule.floor > 0:
            self._plain = term.clone() if self._plain is None else self._plain.add_(term)
        if self._weighted is None or self._shift is None or self._total is None:
            self._shift, self._total, self._weighted = score, torch.ones_like(score), term
            return
        shift = torch.maximum(self._shift, score)
        old, new = (self._shift - shift).exp(), (score - shift).exp()
        self._weighted.mul_(old.unsqueeze(-1)).addcmul_(term, new.unsqueeze(-1))
        self._total = self._total * old + new
        self._shift = shift

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The target: p [rows, C], log p [rows, C], and the weights [K, rows]."""
        if self._weighted is None or self._total is None:
            raise ValueError("no teacher was added")
        floor = self.rule.floor
        fused = self._weighted.mul_(((1 - floor) / self._total).unsqueeze(-1))
        if self._plain is not None:
            fused.add_(self._plain, alpha=floor / self.teachers)
        weights = self.rule.with_floor(torch.stack(self.scores).softmax(0))
        if self.rule.geometric:
            log_p = torch.log_softmax(fused, -1).clamp_min_(LOG_TINY)
            return log_p.exp(), log_p, weights
        return fused, fused.log().clamp_min_(LOG_TINY), weights
