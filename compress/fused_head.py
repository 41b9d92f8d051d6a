"""The output loss, chunk by chunk, from hidden states: value and gradients in one pass, memory independent of the teachers.

For every chunk of rows (whole sequences, as many as a byte budget allows) with z = h W' + b the student's logits, q =
softmax(z / T), p the fused target, y the true token, N the number of valid labels of the whole accumulation window:

    loss += [ w_out T^2 D(p, q) + w_ce (-log softmax(z)_y) ] / N
    G     = [ w_out T dD/d(z/T) + w_ce (softmax(z) - onehot(y)) ] / N
    dh    = G W,   dW += G' h,   db += sum G

The gradients are made in the forward pass and only scaled in backward, so no logits live on. Softmax, divergence and sums are
float32; the products run in `matmul_dtype` (bfloat16 under autocast), dW accumulates in float32.

On k + 1 buckets (cached teachers) the tail's share of a token v outside the k is exp(z_v - lse_tail): with g the gradient
per bucket, dz_v = g_v inside and g_tail exp(z_v - lse_tail) outside; lse_tail is taken over the complement, never 1 - sum,
so an empty tail gives 0 and not NaN. At T != 1 both sides are tempered over the k + 1 buckets, the tail as one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgestill.compress.divergence import DIVERGENCES, LOG_TINY
from edgestill.compress.targets import Buckets, Dense, Target

BUFFERS_PER_CHUNK = 7
"""[rows, V] float32 tensors alive at the peak of one chunk."""
DEFAULT_CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class OutputLoss:
    """What is minimised at the output; field meanings in profiles/schema.py."""

    divergence: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    weight: float = 1.0
    cross_entropy: float = 0.0
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    matmul_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class OutputSums:
    """Sums over the rows, float32 scalars on the device: divergence in nats (without T^2) and cross-entropy in nats."""

    divergence: Tensor
    cross_entropy: Tensor


def chunks(lengths: Sequence[int], vocabulary: int, chunk_bytes: int) -> Iterator[slice]:
    """Row ranges of whole sequences with these lengths; a sequence that exceeds the budget alone is a chunk of its own."""
    limit = max(1, chunk_bytes // (4 * vocabulary * BUFFERS_PER_CHUNK))
    start = stop = 0
    for length in lengths:
        if stop > start and stop + length - start > limit:
            yield slice(start, stop)
            start = stop
        stop += length
    if stop > start:
        yield slice(start, stop)


def output_loss(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lengths: Sequence[int],
    target: Target | None,
    normaliser: Tensor,
    spec: OutputLoss,
) -> tuple[Tensor, OutputSums]:
    """The weighted output loss of n rows.

    Args:
        hidden: student hidden states [n, d], rows of one sequence together.
        head, bias: the student's output layer [V, d] and [V]; may be tied to its embedding.
        labels: int64 [n], all valid (rows without a label are left out before).
        lengths: rows of each sequence; their sum is n. n = 0 is allowed and gives a zero loss with zero gradients.
        target: the teachers' target, or None when `spec.weight` is 0.
        normaliser: N, a scalar tensor, at least 1.

    Returns:
        The loss (scalar, differentiable in hidden, head and bias) and the sums for the log.
    """
    loss, divergence, cross_entropy = _FusedHead.apply(  # type: ignore[no-untyped-call]  # untyped in torch
        hidden, head, bias, labels, lengths, target, normaliser, spec
    )
    return loss, OutputSums(divergence, cross_entropy)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        lengths: Sequence[int],
        target: Target | None,
        normaliser: Tensor,
        spec: OutputLoss,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = spec.matmul_dtype
        weight = head.detach().to(dtype)
        grad_hidden = torch.zeros_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32) if head.requires_grad else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and bias.requires_grad else None
        sums = torch.zeros(
            2, dtype=torch.float32 if hidden.dtype != torch.float64 else torch.float64, device=hidden.device
        )
        sequence = torch.repeat_interleave(
            torch.arange(len(lengths), device=hidden.device), torch.tensor(lengths, device=hidden.device)
        )
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks(lengths, head.shape[0], spec.chunk_bytes):
                h = hidden[rows].detach().to(dtype)
                logits = torch.nn.functional.linear(h, weight, None if bias is None else bias.detach().to(dtype))
                logits = logits.to(sums.dtype)
                answer = target.chunk(rows, sequence[rows]) if target is not None and spec.weight > 0 else None
                gradient = _chunk_gradient(logits, labels[rows], answer, spec, sums)
                g = gradient.to(dtype)
                grad_hidden[rows] = (g @ weight).to(grad_hidden.dtype)
                if grad_head is not None:
                    grad_head += g.T @ h
                if grad_bias is not None:
                    grad_bias += gradient.sum(0)
        for found in (grad_hidden, grad_head, grad_bias):  # [n, d] and [V, d] are small beside [n, V]
            if found is not None:
                found.div_(normaliser)
        ctx.save_for_backward(grad_hidden, grad_head, grad_bias)
        ctx.dtypes = (head.dtype, None if bias is None else bias.dtype)
        loss = (spec.weight * spec.temperature**2 * sums[0] + spec.cross_entropy * sums[1]) / normaliser
        return loss, sums[0].clone(), sums[1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head, grad_bias = ctx.saved_tensors
        scale = grads[0]
        return (
            grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_head is None else (grad_head * scale).to(ctx.dtypes[0]),
            None if grad_bias is None else (grad_bias * scale).to(ctx.dtypes[1]),
            *(None,) * 5,
        )


def _chunk_gradient(
    logits: Tensor, labels: Tensor, target: Dense | Buckets | None, spec: OutputLoss, sums: Tensor
) -> Tensor:
    """Gradient of the weighted loss of one chunk with respect to its logits [rows, V]; adds the values to `sums`."""
    log_q = torch.log_softmax(logits, -1)
    q = log_q.exp()
    label_log_q = log_q.gather(1, labels.unsqueeze(1))
    sums[1] -= label_log_q.sum()
    if target is None:
        gradient = q.mul_(spec.cross_entropy)
    else:
        if isinstance(target, Dense):
            tempered = log_q if spec.temperature == 1 else torch.log_softmax(logits / spec.temperature, -1)
            q_tempered = q if spec.temperature == 1 else tempered.exp()
            p, log_p = target.p.to(logits.dtype), target.log_p.to(logits.dtype)
            value, gradient = DIVERGENCES[spec.divergence](p, log_p, q_tempered, tempered, spec.beta)
        else:
            value, gradient = _bucket_gradient(logits, log_q, target, spec)
        sums[0] += value.sum()
        gradient.mul_(spec.weight * spec.temperature).add_(q, alpha=spec.cross_entropy)
    if spec.cross_entropy > 0:
        gradient.scatter_add_(1, labels.unsqueeze(1), torch.full_like(label_log_q, -spec.cross_entropy))
    return gradient


def _bucket_gradient(logits: Tensor, log_q: Tensor, target: Buckets, spec: OutputLoss) -> tuple[Tensor, Tensor]:
    """Value [rows] and gradient [rows, V] of the divergence over the stored tokens and the tail (module docstring)."""
    inside = log_q.gather(1, target.ids).masked_fill(~target.used, LOG_TINY)
    outside = logits.scatter(1, target.ids, float("-inf"))
    tail = torch.logsumexp(outside, -1, keepdim=True)
    log_tail = (tail - torch.logsumexp(logits, -1, keepdim=True)).clamp_min(LOG_TINY)
    log_b = torch.cat([inside, log_tail], dim=1)
    log_p = target.log_p.to(logits.dtype)
    if spec.temperature != 1:
        log_b = torch.log_softmax(log_b / spec.temperature, -1)
        log_p = torch.log_softmax(log_p / spec.temperature, -1)
    p = log_p.exp().masked_fill(log_p <= LOG_TINY, 0.0)
    value, per_bucket = DIVERGENCES[spec.divergence](p, log_p, log_b.exp(), log_b, spec.beta)
    share = torch.where(torch.isfinite(tail), (outside - tail).exp(), torch.zeros_like(outside))
    gradient = share.mul_(per_bucket[:, -1:])
    gradient.scatter_add_(1, target.ids, per_bucket[:, :-1].masked_fill(~target.used, 0.0))
    return value, gradient
