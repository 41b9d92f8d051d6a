"""Where the target of a chunk comes from: teachers at work now, or their answers from the cache.

`OnlineTarget` multiplies the teachers' hidden states with their heads, chunk by chunk, so no [batch, time, vocabulary] tensor
exists per teacher. `CachedTarget` reads k log-probabilities and the tail mass per teacher and fuses them on the union of the
stored tokens. Both fill `weights` and `entropies` [K, n] for the log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edgestill.compress.divergence import LOG_TINY, row_dot
from edgestill.compress.fusion import Evidence, FusionAccumulator, WeightRule
from edgestill.compress.rows import Rows
from edgestill.compress.scratch import Scratch, product

LOOKUP_BYTES = 8 << 20


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
    dense: bool
    """Whether chunks are targets over the whole vocabulary."""

    def cut_anywhere(self, most: int) -> bool:
        """Whether `chunk` may be asked for any rows; False: for whole sequences only, of which none has more than `most`."""

    def chunk(self, part: slice, scratch: Scratch | None = None) -> Dense | Buckets:
        """The target of these rows; its tensors may lie in `scratch`, and are the caller's to overwrite."""


@dataclass(frozen=True)
class TeacherRows:
    """One teacher's hidden states [n, d] (what its head multiplies) and its head [V, d] (+ bias [V])."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    calibration: float = 1.0
    """Temperature at which its entropy is taken."""

    def logits(self, rows: slice, scratch: Scratch | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """float32 [rows, V], in the buffer "logits"; the product itself runs in `dtype` (default: the head's own)."""
        hidden = self.hidden[rows].to(dtype or self.head.dtype)
        scratch = scratch or Scratch(len(hidden), hidden.device)
        return product(hidden, self.head.to(hidden.dtype), self.bias, scratch)


def softmax_facts(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """(p, log of the normaliser): softmax [rows, V] of logits, in `out`, and its log-sum-exp [rows]; one exponential an element.

    The most likely token tells the normaliser: lse = max z - log max p, and max p >= 1 / V is far from underflow.
    """
    p = torch.softmax(logits, -1, out=out)
    return p, logits.amax(-1) - p.amax(-1).log()


class OnlineTarget:
    """Teachers at work now."""

    dense = True

    def __init__(
        self,
        teachers: Sequence[TeacherRows],
        rule: WeightRule,
        rows: Rows,
        *,
        temperature: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.teachers = list(teachers)
        self.rule = rule
        self.rows = rows
        self.temperature = temperature
        self.dtype = dtype
        self.weights = torch.zeros(
            len(self.teachers), rows.labels.numel(), device=rows.labels.device, dtype=torch.float32
        )
        self.entropies = torch.zeros_like(self.weights)
        self._scores: list[Tensor] | None = None

    def cut_anywhere(self, most: int) -> bool:
        """Weights that pool over a sequence longer than a chunk are worked out in advance: its logits are made twice, the
        price of a memory bound."""
        if not self.rule.pools:
            return True
        if max(self.rows.lengths, default=0) <= most:
            return False
        self._scores = [self._scored(k, most) for k in range(len(self.teachers))]
        return True

    def chunk(self, part: slice, scratch: Scratch | None = None) -> Dense:
        """Every teacher's logits once, one [rows, V] accumulator for the mix."""
        scratch = scratch or Scratch(part.stop - part.start, self.weights.device)
        fused = FusionAccumulator(self.rule, len(self.teachers), scratch)
        for k, teacher in enumerate(self.teachers):
            logits = teacher.logits(part, scratch, self.dtype)
            if self._scores is not None:
                score, ready = self._scores[k][part], False
            else:
                self.entropies[k, part], label, ready = self._facts(teacher, part, logits, scratch)
                score = self.rule.score(k, self._evidence(k, part, label))
            fused.add(self._term(logits, scratch, ready=ready), score)
        p, log_p, self.weights[:, part] = fused.finish()
        return Dense(p, log_p)

    def _scored(self, k: int, most: int) -> Tensor:
        """Log-weights [n] of one teacher from a pass of its own over its logits."""
        total = self.rows.labels.numel()
        labels = torch.zeros_like(self.entropies[k])
        scratch = Scratch(min(most, total), self.weights.device)
        for start in range(0, total, most):
            part = slice(start, min(start + most, total))
            logits = self.teachers[k].logits(part, scratch, self.dtype)
            self.entropies[k, part], labels[part], _ = self._facts(self.teachers[k], part, logits, scratch)
        return self.rule.score(k, self._evidence(k, slice(0, total), labels))

    def _facts(
        self, teacher: TeacherRows, part: slice, logits: Tensor, scratch: Scratch
    ) -> tuple[Tensor, Tensor, bool]:
        """Entropy at the calibration temperature and log p of the true tokens, nats [rows]; 0 where the rule asks for neither.

        Also whether the buffer "term" was left with the probabilities at temperature 1.
        """
        shape = tuple(logits.shape)
        entropy, label = torch.zeros(shape[0], device=logits.device), torch.zeros(shape[0], device=logits.device)
        if self.rule.needs_labels:
            at = self.rows.labels[part].unsqueeze(1)
            label = (logits.gather(1, at) - torch.logsumexp(logits, -1, keepdim=True)).squeeze(1)
        if self.rule.needs_entropy:
            scaled = logits
            if teacher.calibration != 1:
                scaled = torch.div(logits, teacher.calibration, out=scratch.take("scaled", shape))
            p, lse = softmax_facts(scaled, scratch.take("term", shape))
            entropy = lse - row_dot(p, scaled)
        return entropy, label, self.rule.needs_entropy and teacher.calibration == 1

    def _evidence(self, k: int, part: slice, label: Tensor) -> Evidence:
        return Evidence(self.entropies[k, part], label, self.rows.sequence[part], self.rows.domain[part])

    def _term(self, logits: Tensor, scratch: Scratch, *, ready: bool) -> Tensor:
        """Probabilities at the temperature of the loss, or log-probabilities for the geometric mix; overwrites `logits`.

        ready: those at temperature 1 lie in their buffer already.
        """
        tempered = logits if self.temperature == 1 else logits.div_(self.temperature)
        term = scratch.take("term", logits.shape)
        if ready and self.temperature == 1 and not self.rule.geometric:
            return term
        if self.rule.geometric:
            return torch.log_softmax(tempered, -1, out=term)
        return torch.softmax(tempered, -1, out=term)


@dataclass(frozen=True)
class CachedAnswers:
    """One teacher's stored answers for n rows: ids int64 [n, k], the rest float32 ([n, k] or [n])."""

    ids: Tensor
    log_p: Tensor
    tail_log_p: Tensor
    entropy: Tensor
    label_log_p: Tensor
    distinct: bool = True
    """False: a token may stand in several slots of a row, with the same value (draws)."""


class CachedTarget:
    """Teachers' stored answers, fused on the union of their tokens (methods: a token that teacher k did not store gets an
    equal share of its tail, but never more than its smallest stored probability)."""

    dense = False

    def __init__(
        self,
        teachers: Sequence[CachedAnswers],
        rule: WeightRule,
        rows: Rows,
        vocabulary: int,
        lookup: Lookup | None = None,
    ) -> None:
        """`lookup`: kept from batch to batch, it is not made anew."""
        self.teachers = list(teachers)
        self.vocabulary = vocabulary
        self.entropies = torch.stack([t.entropy for t in self.teachers])
        self._ids = torch.cat([t.ids for t in self.teachers], dim=1)
        self._used, log_ps = self._looked_up(lookup or Lookup(vocabulary))
        fused = FusionAccumulator(rule, len(self.teachers), Scratch(len(self._ids), self._ids.device))
        for k, (teacher, log_p) in enumerate(zip(self.teachers, log_ps, strict=True)):
            term = torch.log_softmax(log_p, -1) if rule.geometric else torch.softmax(log_p, -1)
            evidence = Evidence(teacher.entropy, teacher.label_log_p, rows.sequence, rows.domain)
            fused.add(term, rule.score(k, evidence))
        _, self._log_p, self.weights = fused.finish()

    def cut_anywhere(self, most: int) -> bool:
        """All that the weights depend on is stored, so they are known."""
        return True

    def chunk(self, part: slice, scratch: Scratch | None = None) -> Buckets:
        """Every stored token of every teacher once, and the tail."""
        return Buckets(self._ids[part], self._used[part], self._log_p[part].clone())

    def _looked_up(self, lookup: Lookup) -> tuple[Tensor, list[Tensor]]:
        """Which slots [n, u] are used, and what each teacher says of them and of the tail, log-probabilities [n, u + 1]."""
        ids = self._ids
        used = torch.ones_like(ids, dtype=torch.bool)
        found = [torch.empty(len(ids), ids.shape[1], device=ids.device) for _ in self.teachers]
        shares = [self._share(t) for t in self.teachers]
        for part in (slice(start, start + lookup.rows) for start in range(0, len(ids), lookup.rows)):
            if len(self.teachers) > 1 or not self.teachers[0].distinct:
                used[part] = lookup.first(ids[part])
            for said, teacher, share in zip(found, self.teachers, shares, strict=True):
                said[part] = lookup.values(teacher.ids[part], teacher.log_p[part], ids[part], share[part])
        tokens = used.sum(1)
        return used, [
            torch.cat([said.masked_fill_(~used, LOG_TINY), self._rest(teacher, tokens).unsqueeze(1)], dim=1)
            for said, teacher in zip(found, self.teachers, strict=True)
        ]

    def _share(self, teacher: CachedAnswers) -> Tensor:
        """log-probability [n] of a token that this teacher did not store."""
        unstored = max(self.vocabulary - teacher.log_p.shape[1], 1)
        tail = teacher.tail_log_p.clamp_min(LOG_TINY) - math.log(unstored)
        return torch.minimum(tail, teacher.log_p.amin(1)).clamp_min_(LOG_TINY)

    def _rest(self, teacher: CachedAnswers, tokens: Tensor) -> Tensor:
        """log of the tail's mass [n] without the others' tokens, of which there are `tokens` with its own."""
        unstored = max(self.vocabulary - teacher.log_p.shape[1], 1)
        taken = (tokens - teacher.log_p.shape[1]).clamp_min(0) / unstored
        rest = teacher.tail_log_p.clamp_min(LOG_TINY) + torch.log1p(-taken.clamp_max(1 - 1e-6))
        return rest.clamp_min_(LOG_TINY)


class Lookup:
    """Values by token within each row, through one scratch table [rows, V] that is cleaned only where it was written."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.rows = max(1, LOOKUP_BYTES // (4 * vocabulary))
        """At most so many rows at a time."""
        self._table: Tensor | None = None

    def values(self, keys: Tensor, values: Tensor, asked: Tensor, default: Tensor) -> Tensor:
        """For each row of `asked` int64 [rows, u] the value [rows, k] that stands beside it in `keys` [rows, k], or `default`
        [rows]. A key that stands twice must carry one value."""
        table = self._ready(keys)
        table.scatter_(1, keys, values.float())
        found = table.gather(1, asked)
        table.scatter_(1, keys, float("inf"))
        return torch.where(found == float("inf"), default.unsqueeze(1), found)

    def first(self, ids: Tensor) -> Tensor:
        """bool [rows, u]: True at one place of every distinct token of a row."""
        table = self._ready(ids)
        places = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32).expand(ids.shape)
        table.scatter_(1, ids, places)
        found = table.gather(1, ids)
        table.scatter_(1, ids, float("inf"))
        return found == places

    def _ready(self, like: Tensor) -> Tensor:
        if self._table is None or self._table.device != like.device:
            self._table = torch.full((self.rows, self.vocabulary), float("inf"), device=like.device)
        return self._table[: like.shape[0]]
