"""The output loss, chunk by chunk, from hidden states: value and gradients in one pass, memory independent of the teachers.

For every chunk of rows with z = h W' + b the student's logits, q = softmax(z / T), p the fused target, y the true token, N the
number of valid labels of the whole accumulation window:

    loss += [ w_out T^2 D(p, q) + w_rank R(z, p) + w_ce (-log softmax(z)_y) ] / N
    G     = [ w_out T dD/d(z/T) + w_rank dR/dz + w_ce (softmax(z) - onehot(y)) ] / N
    dh    = G W,   dW += G' h,   db += sum G

The gradients are made in the forward pass and only scaled in backward, so no logits live on. Softmax, divergence and sums are
float32; the products run in `matmul_dtype` (bfloat16 under autocast), dW accumulates in float32.

On k + 1 buckets (cached teachers) the tail's share of a token v outside the k is s_v = exp(z_v - lse_tail): with g the gradient
per bucket, dz_v = g_v inside and g_tail s_v outside. s is a softmax over the complement, never q_v / (1 - sum), so it is exact
where the tail's mass underflows. At T != 1 both sides are tempered over the k + 1 buckets, the tail as one of them.

Chunks hold as many rows as a byte budget allows. A target that pools over sequences is cut between sequences, and where one
sequence alone exceeds the budget it is asked for its weights in advance (targets.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgestill.compress.divergence import DIVERGENCES, LOG_TINY, Settings, row_dot
from edgestill.compress.ranking import ranking_loss
from edgestill.compress.rows import Rows, chunks
from edgestill.compress.scratch import Scratch, product
from edgestill.compress.targets import Buckets, Dense, Target, softmax_facts
from edgestill.profiles.schema import OutputLossSpec, RankingLossSpec

BUFFERS = 3
"""[rows, V] float32 tensors alive at the peak of one chunk, without a target over the whole vocabulary."""
BUFFERS_DENSE = {"forward_kl": 7, "adaptive_kl": 12}
"""With one, by divergence; the others need OTHER_DENSE, and all of them two more at another temperature than 1."""
OTHER_DENSE = 8
DEFAULT_CHUNK_BYTES = OutputLossSpec().chunk_mib << 20
CPU_CHUNK_BYTES = 32 << 20
"""On a CPU the passes over a chunk are faster while it lies in the last-level cache."""
HEAD_ROWS = 4096
"""Of dW at a time, where it has to be widened."""
FEWEST_ROWS = 128
"""Fewer rows leave the products waiting for the head's weights."""


@dataclass(frozen=True)
class OutputLoss:
    """What is minimised at the output; field meanings in profiles/loss_words.py."""

    divergence: str = "forward_kl"
    temperature: float = 1.0
    settings: Settings = field(default_factory=Settings)
    weight: float = 1.0
    cross_entropy: float = 0.0
    ranking: RankingLossSpec | None = None
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    matmul_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class OutputValues:
    """Per row [n], float32, on the device, without gradient: divergence in nats (without T^2), cross-entropy in nats, ranking
    loss, and the cross-entropy to TAID's interpolated target (0 for other divergences)."""

    divergence: Tensor
    cross_entropy: Tensor
    ranking: Tensor
    to_interpolated: Tensor


def buffers_of(spec: OutputLoss) -> int:
    """[rows, V] float32 tensors alive at the peak of one chunk under a target over the whole vocabulary."""
    return BUFFERS_DENSE.get(spec.divergence, OTHER_DENSE) + (2 if spec.temperature != 1 else 0)


def row_ranges(
    rows: Rows, target: Target | None, vocabulary: int, chunk_bytes: int, buffers: int = BUFFERS_DENSE["forward_kl"]
) -> list[slice]:
    """How the rows are cut: within `chunk_bytes` (`buffers` of them under a dense target), and on a CPU within its cache."""
    a_row = 4 * vocabulary * (buffers if target is not None and target.dense else BUFFERS)
    most = max(1, chunk_bytes // a_row)
    near = most
    if rows.labels.device.type == "cpu":
        near = min(most, max(FEWEST_ROWS, CPU_CHUNK_BYTES // a_row))
    if target is not None and not target.cut_anywhere(most):
        return chunks(rows.lengths, near)
    total = sum(rows.lengths)
    return [slice(start, min(start + near, total)) for start in range(0, total, near)]


def output_loss(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    rows: Rows,
    target: Target | None,
    normaliser: Tensor,
    spec: OutputLoss,
) -> tuple[Tensor, OutputValues]:
    """The weighted output loss of n rows.

    Args:
        hidden: student hidden states [n, d], in the order of `rows`.
        head, bias: the student's output layer [V, d] and [V]; may be tied to its embedding.
        rows: their labels and sequences. n = 0 is allowed and gives a zero loss with zero gradients.
        target: the teachers' target, or None when `spec.weight` is 0.
        normaliser: N, a scalar tensor, at least 1.

    Returns:
        The loss (scalar, differentiable in hidden, head and bias) and the values per row for the log.
    """
    loss, values = _FusedHead.apply(  # type: ignore[no-untyped-call]  # untyped in torch
        hidden, head, bias, rows, target if spec.weight > 0 else None, normaliser, spec
    )
    return loss, OutputValues(*values.unbind(0))


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        rows: Rows,
        target: Target | None,
        normaliser: Tensor,
        spec: OutputLoss,
    ) -> tuple[Tensor, Tensor]:
        dtype = spec.matmul_dtype
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        weight = head.detach().to(dtype)
        offset = None if bias is None else bias.detach()
        grad_hidden = torch.zeros_like(hidden)
        grad_head = torch.zeros_like(head, dtype=precise) if head.requires_grad else None
        grad_bias = torch.zeros_like(bias, dtype=precise) if bias is not None and bias.requires_grad else None
        values = torch.zeros(4, hidden.shape[0], dtype=precise, device=hidden.device)
        parts = row_ranges(rows, target, head.shape[0], spec.chunk_bytes, buffers_of(spec))
        scratch = Scratch(max((part.stop - part.start for part in parts), default=0), hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in parts:
                answer = None if target is None else target.chunk(part, scratch)
                h = hidden[part].detach().to(dtype)
                logits = product(h, weight, offset, scratch)
                gradient = _chunk_gradient(logits, rows.labels[part], answer, spec, values[:, part], scratch)
                g = gradient
                if dtype != gradient.dtype:
                    g = scratch.take("narrow", gradient.shape, dtype).copy_(gradient)
                grad_hidden[part] = (g @ weight).to(grad_hidden.dtype)
                if grad_head is not None:
                    _add_product(grad_head, g, h, scratch)
                if grad_bias is not None:
                    grad_bias += gradient.sum(0)
        for found in (grad_hidden, grad_head, grad_bias):  # [n, d] and [V, d] are small beside [n, V]
            if found is not None:
                found.div_(normaliser)
        ctx.gradients = (grad_hidden, grad_head, grad_bias)
        ctx.dtypes = (head.dtype, None if bias is None else bias.dtype)
        divergence, cross_entropy, ranking, _ = values.sum(1)
        loss = spec.weight * spec.temperature**2 * divergence + spec.cross_entropy * cross_entropy
        if spec.ranking is not None:
            loss = loss + spec.ranking.weight * ranking
        ctx.mark_non_differentiable(values)
        return loss / normaliser, values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the output loss was differentiated twice; its gradients are scaled in place, once")
        (grad_hidden, grad_head, grad_bias), ctx.gradients = ctx.gradients, None
        for found in (grad_hidden, grad_head, grad_bias):
            if found is not None:
                found.mul_(grads[0])
        return (
            grad_hidden,
            None if grad_head is None else grad_head.to(ctx.dtypes[0]),
            None if grad_bias is None else grad_bias.to(ctx.dtypes[1]),
            *(None,) * 4,
        )


def _add_product(total: Tensor, g: Tensor, h: Tensor, scratch: Scratch) -> None:
    """total [V, d] += g' h, summed in the precision of `total`; in pieces of the vocabulary, so that no [V, d] is made."""
    if g.dtype == total.dtype:
        total.addmm_(g.T, h)
        return
    for start in range(0, len(total), HEAD_ROWS):
        piece = total[start : start + HEAD_ROWS]
        narrow = torch.mm(g[:, start : start + HEAD_ROWS].T, h, out=scratch.take("head", piece.shape, g.dtype))
        piece += scratch.take("head", piece.shape, total.dtype).copy_(narrow)


def _chunk_gradient(
    logits: Tensor,
    labels: Tensor,
    target: Dense | Buckets | None,
    spec: OutputLoss,
    values: Tensor,
    scratch: Scratch,
) -> Tensor:
    """Gradient of the weighted loss of one chunk with respect to its logits [rows, V], which are overwritten; fills `values`."""
    answers = labels.unsqueeze(1)
    label_logits = logits.gather(1, answers).squeeze(1)
    ranked = None
    if target is not None and spec.ranking is not None:
        values[2], *ranked = ranking_loss(logits, target, spec.ranking)
    if target is None:
        q, lse = softmax_facts(logits, scratch.take("term", logits.shape, logits.dtype))
        gradient = q.mul_(spec.cross_entropy)
    elif isinstance(target, Dense):
        gradient, lse = _dense_gradient(logits, target, spec, values, scratch)
    else:
        gradient, lse = _bucket_gradient(logits, target, spec, values, scratch)
    values[1] = lse - label_logits
    if spec.cross_entropy > 0:
        gradient.scatter_add_(1, answers, torch.full_like(answers, -spec.cross_entropy, dtype=gradient.dtype))
    if ranked is not None and spec.ranking is not None:
        ids, slope = ranked
        gradient.scatter_add_(1, ids, slope * spec.ranking.weight)
    return gradient


def _dense_gradient(
    logits: Tensor, target: Dense, spec: OutputLoss, values: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """w_out T dD/d(z/T) + w_ce q [rows, V] over the whole vocabulary, and log sum exp z [rows]."""
    q, lse = softmax_facts(logits, scratch.take("term", logits.shape, logits.dtype))
    if spec.temperature == 1:
        log_q, tempered = logits.sub_(lse.unsqueeze(1)), q
    else:
        log_q = torch.log_softmax(logits / spec.temperature, -1)
        tempered = log_q.exp()
    p, log_p = target.p.to(logits.dtype), target.log_p.to(logits.dtype)
    values[0], gradient = DIVERGENCES[spec.divergence](p, log_p, tempered, log_q, spec.settings)
    _note_interpolated(gradient, tempered, log_q, spec, values)
    return gradient.mul_(spec.weight * spec.temperature).add_(q, alpha=spec.cross_entropy), lse


def _bucket_gradient(
    logits: Tensor, target: Buckets, spec: OutputLoss, values: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """The same over the stored tokens and the tail (module docstring): one exponential a token, as plain cross-entropy."""
    stored = logits.gather(1, target.ids).masked_fill_(~target.used, -torch.inf)
    outside = logits.scatter_(1, target.ids, -torch.inf)
    share, lse_tail = softmax_facts(outside, scratch.take("term", outside.shape, outside.dtype))
    if target.ids.shape[1] >= logits.shape[1]:  # perhaps nothing is outside: 0 / 0
        share, lse_tail = share.nan_to_num_(0.0), lse_tail.nan_to_num_(-torch.inf)
    z = torch.cat([stored, lse_tail.unsqueeze(1)], dim=1)
    lse = torch.logsumexp(z, -1)
    log_q = (z - lse.unsqueeze(1)).clamp_min(LOG_TINY)
    log_b, log_p = log_q, target.log_p.to(z.dtype)
    if spec.temperature != 1:
        log_b = torch.log_softmax(log_b / spec.temperature, -1)
        log_p = torch.log_softmax(log_p / spec.temperature, -1)
    b, p = log_b.exp(), log_p.exp().masked_fill(log_p <= LOG_TINY, 0.0)
    values[0], per_bucket = DIVERGENCES[spec.divergence](p, log_p, b, log_b, spec.settings)
    _note_interpolated(per_bucket, b, log_b, spec, values)
    per_bucket.mul_(spec.weight * spec.temperature).add_(log_q.exp(), alpha=spec.cross_entropy)
    gradient = share.mul_(per_bucket[:, -1:])
    return gradient.scatter_add_(1, target.ids, per_bucket[:, :-1].masked_fill(~target.used, 0.0)), lse


def _note_interpolated(gradient: Tensor, q: Tensor, log_q: Tensor, spec: OutputLoss, values: Tensor) -> None:
    """TAID steers by its loss in cross-entropy form, -sum p_t log q, with p_t = q - gradient."""
    if spec.divergence == "taid":
        values[3] = row_dot(gradient - q, log_q)
