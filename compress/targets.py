"""Where the target of a chunk comes from: teachers at work now, or their answers from the cache.

`OnlineTarget` multiplies the teachers' hidden states with their heads, chunk by chunk, so no [batch, time, vocabulary] tensor
exists per teacher. `CachedTarget` reads k log-probabilities and the tail mass per teacher and fuses them on the union of the
stored tokens. Both fill `weights` and `entropies` [K, n] for the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edgestill.compress.divergence import LOG_TINY
from edgestill.compress.fusion import FusionAccumulator, WeightRule, entropy_of


@dataclass(frozen=True)
class Dense:
    """A target over the whole vocabulary at the temperature of the loss: p and log p, float32 [rows, V]."""

    p: Tensor
    log_p: Tensor


@dataclass(frozen=True)
class Buckets:
    """A target over u stored tokens and one bucket for the rest, at T = 1.

    ids: int64 [rows, u]; unused slots (a token stored by two teachers) repeat an id and carry `used` False.
    log_p: float32 [rows, u + 1]; the last column is the tail; unused slots hold LOG_TINY.
    """

    ids: Tensor
    used: Tensor
    log_p: Tensor


class Target(Protocol):
    """One target for n rows, handed out in chunks of whole sequences."""

    weights: Tensor
    entropies: Tensor

    def chunk(self, rows: slice, sequence: Tensor) -> Dense | Buckets:
        """The target of `rows`; `sequence` int64 [rows] tells which rows belong together."""


@dataclass(frozen=True)
class TeacherRows:
    """One teacher's hidden states [n, d] (what its head multiplies) and its head [V, d] (+ bias [V])."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    calibration: float = 1.0
    """Temperature at which its entropy is taken."""

    def logits(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """float32 [rows, V]; the product itself runs in `dtype` (default: the head's own)."""
        dtype = dtype or self.head.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch.nn.functional.linear(self.hidden[rows].to(dtype), self.head.to(dtype), bias).float()


class OnlineTarget:
    """Teachers at work now."""

    def __init__(
        self,
        teachers: Sequence[TeacherRows],
        rule: WeightRule,
        *,
        temperature: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        rows = teachers[0].hidden.shape[0]
        device = teachers[0].hidden.device
        self.teachers = list(teachers)
        self.rule = rule
        self.temperature = temperature
        self.dtype = dtype
        self.weights = torch.zeros(len(self.teachers), rows, device=device)
        self.entropies = torch.zeros(len(self.teachers), rows, device=device)

    def chunk(self, rows: slice, sequence: Tensor) -> Dense:
        """Every teacher's logits once, one [rows, V] accumulator for the mix."""
        fused = FusionAccumulator(self.rule, len(self.teachers))
        for k, teacher in enumerate(self.teachers):
            logits = teacher.logits(rows, self.dtype)
            entropy = torch.zeros(logits.shape[0], device=logits.device)
            if self.rule.by_entropy:
                entropy = entropy_of(torch.log_softmax(logits / teacher.calibration, -1))
                self.entropies[k, rows] = entropy
            tempered = logits if self.temperature == 1 else logits / self.temperature
            fused.add(fused.term(tempered), self.rule.score(k, entropy, sequence))
        p, log_p, self.weights[:, rows] = fused.finish()
        return Dense(p, log_p)


@dataclass(frozen=True)
class CachedAnswers:
    """One teacher's stored answers for n rows: ids int64 [n, k], the rest float32 ([n, k] or [n])."""

    ids: Tensor
    log_p: Tensor
    tail_log_p: Tensor
    entropy: Tensor


class CachedTarget:
    """Teachers' stored answers, fused on the union of their tokens (methods: a token that teacher k did not store gets an
    equal share of its tail, but never more than its smallest stored probability)."""

    def __init__(self, teachers: Sequence[CachedAnswers], rule: WeightRule, vocabulary: int) -> None:
        self.teachers = list(teachers)
        self.rule = rule
        self.vocabulary = vocabulary
        self.entropies = torch.stack([t.entropy for t in self.teachers])
        self.weights = torch.zeros_like(self.entropies)

    def chunk(self, rows: slice, sequence: Tensor) -> Buckets:
        """One lookup table [rows, V], used for each teacher in turn."""
        ids = torch.cat([t.ids[rows] for t in self.teachers], dim=1)
        ids, used = _without_repeats(ids)
        fused = FusionAccumulator(self.rule, len(self.teachers))
        table = torch.empty(ids.shape[0], self.vocabulary, device=ids.device)
        for k, teacher in enumerate(self.teachers):
            stored, tail = teacher.log_p[rows], teacher.tail_log_p[rows]
            unstored = self.vocabulary - stored.shape[1]
            share = (tail - torch.log(torch.tensor(float(max(unstored, 1)), device=tail.device))).clamp_min(LOG_TINY)
            share = torch.minimum(share, stored.amin(1))
            table.copy_(share.unsqueeze(1).expand_as(table)).scatter_(1, teacher.ids[rows], stored)
            log_p = table.gather(1, ids)
            taken = (used.sum(1) - stored.shape[1]).clamp_min(0) / max(
                unstored, 1
            )  # of the tail, by the others' tokens
            rest = tail.clamp_min(LOG_TINY) + torch.log1p(-taken.clamp_max(1 - 1e-6))
            log_p = torch.cat([log_p.masked_fill(~used, LOG_TINY), rest.unsqueeze(1)], dim=1)
            fused.add(fused.term(log_p.clamp_min(LOG_TINY)), self.rule.score(k, teacher.entropy[rows], sequence))
        _, log_p, self.weights[:, rows] = fused.finish()
        return Buckets(ids, used, log_p)


def _without_repeats(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row of ids [n, u]; `used` is False where a token repeats its left neighbour."""
    ids = ids.sort(dim=1).values
    used = torch.ones_like(ids, dtype=torch.bool)
    used[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return ids, used
