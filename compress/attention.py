"""Attention alignment with several teachers (arXiv 2412.19449, weighted as the outputs are: arXiv 2507.15198).

For every mapped pair (student layer s, teacher layer t) of teacher k:

    relation   MiniLMv2 (arXiv 2012.15828, eq. 4 and 5): queries, keys and values X [T, d] are split anew into A relation heads
               of d_r = d / A channels; R_X = softmax(X X^T / sqrt(d_r) + causal mask);
               L = mean over X in {Q, K, V}, relation heads and rows of KL(R_X of the teacher || R_X of the student)
    maps       L = mean over heads and rows of KL(A_t || A_s); where one side has more heads, the mean of each group of its
               neighbours stands for one head of the other side

Heads, head sizes and widths of relations may differ between the two sides, and keys and values may be narrower than queries.
The teachers' losses are summed with the sequence means of the output weights and averaged over the pairs.

A relation is a [T, T] matrix per head, so it is formed for ROWS queries at a time. The gradient with respect to the scores is
R_S - R_T per row, so it is computed along with the loss and no relation lives on until backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PretrainedConfig

from edgestill.compress.attention_taps import Relations, Taps, layout_of, projection_widths, watch
from edgestill.profiles.schema import AttentionLossSpec
from edgestill.runtime.errors import BadInput

ROWS = 128
"""Queries whose relations exist at a time: B x A x 128 x T numbers."""
MOST_HEADS = 16
"""Of the relation heads that are chosen here; more cost time and make each head thinner."""

Named = tuple[str, PretrainedConfig]


@dataclass(frozen=True)
class AttentionPlan:
    """pairs: per teacher, (student layer, teacher layer), ascending; heads: relation heads (0 for maps)."""

    pairs: list[list[tuple[int, int]]]
    heads: int


def mapped_attention(
    spec: AttentionLossSpec, student: PretrainedConfig, teachers: Sequence[Named], sequence_length: int
) -> AttentionPlan:
    """What would be aligned in windows of `sequence_length` tokens; needs configurations only.

    Args:
        teachers: (name, configuration) of each.

    Raises:
        BadInput: a layer that is not there, a family whose projections are not known, relation heads that do not divide a
            width, maps that are too large, have no common head count, or that dropout would falsify.
    """
    if spec.kind == "maps":
        if sequence_length > spec.max_map_tokens:
            raise BadInput(
                f"losses.attention.max_map_tokens: {spec.max_map_tokens}, but data.sequence_length is {sequence_length} and maps "
                "grow with its square; shorten the windows, raise the limit or use kind: relation"
            )
        _refuse_dropout(student)
    return _plan(spec, student, teachers)


def _plan(spec: AttentionLossSpec, student: PretrainedConfig, teachers: Sequence[Named]) -> AttentionPlan:
    sides = [("the student", student), *((f"teacher {name!r}", config) for name, config in teachers)]
    for who, config in sides:
        layout_of(config, who)
    pairs = [_pairs(spec, _layers(student), _layers(config), who) for who, config in sides[1:]]
    if spec.kind == "relation":
        return AttentionPlan(pairs, _relation_heads(spec.relation_heads, sides))
    ours = _heads(student)
    for who, config in sides[1:]:
        theirs = _heads(config)
        if max(ours, theirs) % min(ours, theirs):
            raise BadInput(
                f"losses.attention.kind: maps, but the student has {ours} heads and {who} {theirs}, of which neither divides the "
                "other; use kind: relation"
            )
    return AttentionPlan(pairs, 0)


def _layers(config: PretrainedConfig) -> int:
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def _heads(config: PretrainedConfig) -> int:
    return int(config.get_text_config(decoder=True).num_attention_heads)


def _refuse_dropout(student: PretrainedConfig) -> None:
    text = student.get_text_config(decoder=True)
    for field in ("attention_dropout", "attn_pdrop"):
        if rate := getattr(text, field, 0.0):
            raise BadInput(
                f"losses.attention.kind: maps, but the student's {field} is {rate}, which sets entries of its maps to 0 in "
                "training; make it 0 in config.json or use kind: relation"
            )


def _pairs(spec: AttentionLossSpec, ours: int, theirs: int, who: str) -> list[tuple[int, int]]:
    if spec.layers == "last":
        return [(ours - 1, theirs - 1)]
    for s, t in spec.layers:
        if not (0 <= s < ours and 0 <= t < theirs):
            raise BadInput(
                f"losses.attention.layers: pair [{s}, {t}] does not exist; the student has layers 0 to {ours - 1}, {who} 0 to "
                f"{theirs - 1}"
            )
    if not spec.layers:
        raise BadInput("losses.attention.layers: an empty list aligns nothing; name a pair or leave attention out")
    return sorted({(s, t) for s, t in spec.layers})


def _relation_heads(wanted: int | None, sides: Sequence[Named]) -> int:
    widths = [
        (width, f"{what} of {who}")
        for who, config in sides
        for width, what in zip(projection_widths(config), ("queries", "keys and values"), strict=True)
    ]
    common = gcd(*(width for width, _ in widths))
    fitting = [heads for heads in range(1, common + 1) if common % heads == 0]
    if wanted is None:
        return max(heads for heads in fitting if heads <= MOST_HEADS)
    for width, what in widths:
        if width % wanted:
            raise BadInput(
                f"losses.attention.relation_heads: {wanted} does not divide the {width} channels of the {what}; all widths "
                f"together allow {', '.join(map(str, fitting))}"
            )
    return wanted


class AttentionLoss(nn.Module):
    """What `watch_student` and `watch_teacher` caught in, one scalar out. No parameters and no state."""

    def __init__(
        self, spec: AttentionLossSpec, student_config: PretrainedConfig, teacher_configs: Sequence[Named]
    ) -> None:
        """Arguments and errors: as `mapped_attention`, without the length of the windows and dropout."""
        super().__init__()
        self.spec = spec
        self.plan = _plan(spec, student_config, teacher_configs)

    def student_layers(self) -> list[int]:
        """Layers of the student that are watched."""
        return sorted({s for pairs in self.plan.pairs for s, _ in pairs})

    def teacher_layers(self, teacher: int) -> list[int]:
        """Layers of this teacher that are watched."""
        return sorted({t for _, t in self.plan.pairs[teacher]})

    def prepare(self, model: Any) -> None:
        """Give a student or teacher the attention that its taps need: eager for maps, any for relations."""
        if self.spec.kind == "maps":
            model.set_attn_implementation("eager")

    def watch_student(self, model: nn.Module) -> AbstractContextManager[Taps]:
        """Filled by the student's forward pass that runs inside; see `attention_taps.watch`."""
        return watch(model, self.student_layers(), self.spec.kind)

    def watch_teacher(self, teacher: int, model: nn.Module) -> AbstractContextManager[Taps]:
        """Filled by this teacher's forward pass that runs inside."""
        return watch(model, self.teacher_layers(teacher), self.spec.kind)

    def forward(
        self,
        ours: Mapping[int, Relations | Tensor],
        theirs: Sequence[Mapping[int, Relations | Tensor]],
        weights: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Scalar float32 loss in nats; differentiable with respect to `ours`, constant in all else.

        Args:
            ours: student layer -> Relations or maps [B, H, T, T].
            theirs: per teacher, layer -> the same of that teacher.
            weights: float32 [K, B], weight of each teacher for each sequence (detached, sum 1 over K).
            mask: bool [B, T], rows (queries) that count. The loss is their mean, so that batches weighted by their numbers of
                rows add up to the loss of all of them at once.
        """
        share = mask.float() / mask.sum().clamp_min(1)  # [B, T]
        total = weights.new_zeros(())
        for k, pairs in enumerate(self.plan.pairs):
            rows = share * weights[k].unsqueeze(1) / len(pairs)
            for s, t in pairs:
                total = total + self._distance(ours[s], theirs[k][t], rows)
        return total

    def _distance(self, ours: Relations | Tensor, theirs: Relations | Tensor, rows: Tensor) -> Tensor:
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
            return map_kl(ours, theirs, rows)
        parts = [relation_kl(x, y, rows, self.plan.heads) for x, y in zip(ours, theirs, strict=True)]
        return torch.stack(parts).mean()


def map_kl(ours: Tensor, theirs: Tensor, rows: Tensor) -> Tensor:
    """Sum over `rows` [B, T] (a weight for each) of the mean over heads of KL(theirs || ours).

    ours [B, H, T, T] and theirs [B, G, T, T] are attention probabilities; one of H and G divides the other.
    """
    batch, n_ours, tokens, _ = ours.shape
    groups = (batch, min(n_ours, theirs.shape[1]), -1, tokens, tokens)
    q, p = (maps.float().reshape(groups).mean(2) for maps in (ours, theirs.detach()))
    tiny = torch.finfo(torch.float32).tiny  # keys after the query have probability 0 on both sides
    per_row = (p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum(-1).mean(1)
    return (per_row * rows).sum()


def relation_kl(ours: Tensor, theirs: Tensor, rows: Tensor, heads: int, chunk: int = ROWS) -> Tensor:
    """Sum over `rows` [B, T] (a weight for each) of the mean over relation heads of KL(R of theirs || R of ours).

    Args:
        ours: [B, T, d_S] queries, keys or values of any floating dtype; computed in float32 (float64 stays float64).
        theirs: [B, T, d_T], constant.
        rows: float [B, T], constant.
        heads: A, divides d_S and d_T.
        chunk: queries at a time; memory is a few times B x A x chunk x T numbers, the result does not depend on it.
    """
    value: Tensor = _RelationKl.apply(ours, theirs.detach(), rows, heads, chunk)  # type: ignore[no-untyped-call]
    return value


class _RelationKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor, rows: Tensor, heads: int, chunk: int) -> Tensor:
        dtype = torch.promote_types(ours.dtype, torch.float32)
        wanted = ctx.needs_input_grad[0]
        with torch.autocast(ours.device.type, enabled=False):
            x, y = _split(ours.to(dtype), heads), _split(theirs.to(dtype), heads)
            scale = x.shape[-1] ** -0.5
            weights = rows.to(dtype)[:, None, :, None] / heads
            gradient = torch.zeros_like(x) if wanted else None
            total = x.new_zeros(())
            for start in range(0, x.shape[2], chunk):
                stop = min(start + chunk, x.shape[2])
                weight = weights[:, :, start:stop]
                log_p, log_q = (_log_relation(side, start, stop) for side in (y, x))
                p = log_p.exp()
                total += (torch.einsum("bari,bari->bar", p, log_p.sub_(log_q)) * weight[..., 0]).sum()
                if gradient is not None:
                    slope = log_q.exp_().sub_(p).mul_(weight * scale)  # of the products x_i . x_j
                    gradient[:, :, start:stop] += slope @ x[:, :, :stop]
                    gradient[:, :, :stop] += slope.transpose(-1, -2) @ x[:, :, start:stop]
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.dtype = ours.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer).transpose(1, 2).flatten(-2).to(ctx.dtype), None, None, None, None


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, T, A d_r] -> [B, A, T, d_r]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2).contiguous()


def _log_relation(x: Tensor, start: int, stop: int) -> Tensor:
    """log R of queries `start` to `stop` and the keys before `stop`, [B, A, stop - start, stop], from x [B, A, T, d_r]."""
    scores = (x[:, :, start:stop] * x.shape[-1] ** -0.5) @ x[:, :, :stop].transpose(-1, -2)
    future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=x.device).triu(1)
    # finite: -inf on both sides would make KL's 0 x (log p - log q) not a number
    scores[..., start:].masked_fill_(future, torch.finfo(x.dtype).min / 2)
    return torch.log_softmax(scores, dim=-1)
