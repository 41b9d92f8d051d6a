"""How the teachers' distributions become one target: weights per teacher, and the mix (arXiv 2507.15198).

With p_k the distribution of teacher k (K of them), H_k its entropy in nats at its calibration temperature, V the vocabulary, y
the true token:

    uniform       w_k = 1 / K
    static        w_k given, sum 1
    entropy       w_k = softmax_k(-(H_k / log V - o_k) / tau)      normalised entropy, so tau does not depend on the
                  vocabulary; o_k is fitted (calibrate.py) or 0
    label         w_k = softmax_k(log p_k(y) / tau)           FuseLLM's AvgCE (arXiv 2401.10491); tau -> 0 is MinCE
    routed        w_k = 1 for the teachers of the row's domain, shared evenly; all of them where none claims it
    reinforced    w_k = 1 / n for the n teachers that a policy selects (reinforced.py)
    floor         w <- (1 - floor) w + floor / K              every teacher stays alive
    granularity   H or log p(y) of the token; its mean over the sequence; or its moving average over the tokens so far

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
from edgestill.compress.reinforced import NOT_SELECTED, SelectionPolicy
from edgestill.compress.rows import consecutive
from edgestill.compress.scratch import Scratch
from edgestill.profiles.schema import FusionSpec


@dataclass(frozen=True)
class Evidence:
    """What one teacher's weight on each row may depend on.

    entropy, label_log_p: float32 [rows], nats; a quantity that the rule does not use may be 0.
    sequence: int64 [rows], ascending; every row of a sequence must be here when the rule pools.
    domain: int64 [rows].
    """

    entropy: Tensor
    label_log_p: Tensor
    sequence: Tensor
    domain: Tensor


@dataclass(frozen=True)
class WeightRule:
    """What decides the weights: the words of the recipe, resolved for K teachers and a vocabulary."""

    log_prior: tuple[float, ...]
    """log of the static weights (uniform: log 1/K)."""
    by: str
    """prior, entropy, label, domain or policy."""
    granularity: str
    ema_decay: float
    tau: float
    floor: float
    geometric: bool
    log_vocabulary: float
    domains: tuple[frozenset[int], ...] = ()
    """by domain: those that each teacher answers for."""
    policy: SelectionPolicy | None = None
    offsets: tuple[float, ...] = ()
    """Taken off each teacher's normalised entropy; empty: 0."""

    @classmethod
    def of(
        cls,
        spec: FusionSpec,
        static_weights: Sequence[float],
        vocabulary: int,
        *,
        domains: Sequence[frozenset[int]] = (),
        policy: SelectionPolicy | None = None,
        offsets: Sequence[float] = (),
    ) -> WeightRule:
        """The rule of a recipe for teachers with these static weights (read only under `weights: static`)."""
        weights = list(static_weights) if spec.weights == "static" else [1.0] * len(static_weights)
        total = sum(weights)
        by = {"label": "label", "entropy": "entropy", "routed": "domain", "reinforced": "policy"}.get(
            spec.weights, "prior"
        )
        return cls(
            log_prior=tuple(math.log(w / total) for w in weights),
            by=by,
            granularity=spec.granularity,
            ema_decay=spec.ema_decay,
            tau=spec.label_temperature if by == "label" else spec.entropy_temperature,
            floor=spec.floor if by in ("entropy", "label", "policy") else 0.0,
            geometric=spec.mix == "geometric",
            log_vocabulary=math.log(vocabulary),
            domains=tuple(domains),
            policy=policy,
            offsets=tuple(offsets),
        )

    @property
    def pools(self) -> bool:
        """Whether a row's weight depends on other rows of its sequence."""
        return self.by == "policy" or (self.by in ("entropy", "label") and self.granularity != "token")

    @property
    def needs_entropy(self) -> bool:
        """Whether `Evidence.entropy` is read."""
        return self.by in ("entropy", "policy")

    @property
    def needs_labels(self) -> bool:
        """Whether `Evidence.label_log_p` is read."""
        return self.by in ("label", "policy")

    def score(self, teacher: int, evidence: Evidence) -> Tensor:
        """Unnormalised log-weight of one teacher (its index) for each row."""
        if self.by == "entropy":
            pooled = self.pooled(evidence.entropy, evidence.sequence) / self.log_vocabulary
            return (pooled - (self.offsets[teacher] if self.offsets else 0.0)) / -self.tau
        if self.by == "label":
            return self.pooled(evidence.label_log_p, evidence.sequence) / self.tau
        if self.by == "domain":
            return self._routed(teacher, evidence.domain)
        if self.policy is not None:
            return self.policy.choose(teacher, evidence.entropy, evidence.label_log_p, evidence.sequence)
        return torch.full_like(evidence.entropy, self.log_prior[teacher])

    def weights(self, entropies: Tensor, label_log_ps: Tensor, sequence: Tensor, domain: Tensor) -> Tensor:
        """Normalised weights float32 [K, rows] from entropies and label log-probabilities [K, rows], floor included."""
        scores = [
            self.score(k, Evidence(h, y, sequence, domain))
            for k, (h, y) in enumerate(zip(entropies, label_log_ps, strict=True))
        ]
        return self.with_floor(torch.stack(scores).softmax(0))

    def with_floor(self, weights: Tensor) -> Tensor:
        """(1 - floor) w + floor / K for weights [K, ...]."""
        return weights if self.floor == 0 else weights * (1 - self.floor) + self.floor / weights.shape[0]

    def pooled(self, values: Tensor, sequence: Tensor) -> Tensor:
        """`values` [rows] averaged as the granularity says."""
        if self.granularity == "sequence":
            return pool(values, sequence)
        return moving_average(values, sequence, self.ema_decay) if self.granularity == "ema" else values

    def _routed(self, teacher: int, domain: Tensor) -> Tensor:
        asked = torch.zeros_like(domain, dtype=torch.bool)
        for own in sorted(self.domains[teacher]):
            asked |= domain == own
        return torch.where(asked, 0.0, NOT_SELECTED)


def pool(values: Tensor, sequence: Tensor) -> Tensor:
    """Mean of `values` [rows] over the rows of the same sequence, handed back to each row."""
    place = consecutive(sequence)
    sums = torch.zeros_like(values).index_add_(0, place, values)
    counts = torch.zeros_like(values).index_add_(0, place, torch.ones_like(values))
    return (sums / counts.clamp_min(1))[place]


def moving_average(values: Tensor, sequence: Tensor, decay: float) -> Tensor:
    """Exponential moving average of `values` [rows] along each sequence, the first rows weighted so that there is no start-up bias.

    a_t = sum_{j <= t} d^(t-j) v_j / sum_{j <= t} d^(t-j), summed by doubling: log2(rows) steps over [rows], stable for any
    decay and length.
    """
    sums = torch.stack([values, torch.ones_like(values)])
    shift = 1
    while shift < values.numel():
        same = (sequence[shift:] == sequence[:-shift]).to(values.dtype) * decay**shift
        sums = torch.cat([sums[:, :shift], sums[:, shift:] + sums[:, :-shift] * same], dim=1)
        shift *= 2
    return sums[0] / sums[1]


def entropy_of(log_p: Tensor) -> Tensor:
    """Entropy in nats [rows] of finite log-probabilities [rows, C]."""
    return -row_dot(log_p.exp(), log_p)


class FusionAccumulator:
    """Adds teachers one at a time into one target; `finish` normalises. All tensors float32.

    The sums lie in `scratch` ("fused", and "plain" when there is a floor), so a term may be overwritten once it was added.
    """

    def __init__(self, rule: WeightRule, teachers: int, scratch: Scratch) -> None:
        self.rule = rule
        self.teachers = teachers
        self.scratch = scratch
        self.scores: list[Tensor] = []
        self._fused: Tensor | None = None
        self._plain: Tensor | None = None

    def add(self, term: Tensor, score: Tensor) -> None:
        """Add one teacher: `term` [rows, C], its probabilities, or log-probabilities for the geometric mix; `score` its
        unnormalised log-weight [rows]."""
        self.scores.append(score)
        if self._fused is None:
            self._fused = self.scratch.take("fused", term.shape).copy_(term)
            if self.rule.floor > 0 and self.teachers > 1:
                self._plain = self.scratch.take("plain", term.shape).copy_(term)
            self._shift, self._total = score, torch.ones_like(score)
            return
        if self._plain is not None:
            self._plain.add_(term)
        shift = torch.maximum(self._shift, score)
        old, new = (self._shift - shift).exp(), (score - shift).exp()
        self._fused.mul_(old.unsqueeze(-1)).addcmul_(term, new.unsqueeze(-1))
        self._total = self._total * old + new
        self._shift = shift

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The target: p [rows, C], log p [rows, C], and the weights [K, rows]."""
        if self._fused is None:
            raise ValueError("no teacher was added")
        fused, weights = self._fused, self.rule.with_floor(torch.stack(self.scores).softmax(0))
        if self.teachers > 1:
            floor = self.rule.floor
            fused.mul_(((1 - floor) / self._total).unsqueeze(-1))
            if self._plain is not None:
                fused.add_(self._plain, alpha=floor / self.teachers)
        other = self.scratch.take("plain", fused.shape)
        if self.rule.geometric:
            log_p = torch.log_softmax(fused, -1, out=other).clamp_min_(LOG_TINY)
            return torch.exp(log_p, out=fused), log_p, weights
        return fused, torch.log(fused, out=other).clamp_min_(LOG_TINY), weights
