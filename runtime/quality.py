"""How close the artifact stays to its teachers, on the held-out tokens of the bundle's reference.

The artifact is run on the same token ids and windows as the teachers were, through the cached one-token path that users
decode with. Per answer it keeps a few numbers, never a row of logits: log p of the true token, log p of the k stored tokens,
the log of the mass outside them, and the most likely token. Differences are paired per token; their standard errors come
from the reference's blocks of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgestill.runtime.errors import BundleError
from edgestill.runtime.reference import F32, I32, Reference
from edgestill.runtime.statistics import F64, Estimate, block_mean, exp_mean, perplexity_ratio

ScorePath = Literal["cached", "prefill"]
Advance = Callable[[int], None]
"""Called with the number of tokens just scored."""

WINDOWS_PER_BATCH = 16
PREFILL_LOGITS_BYTES = 256 << 20
"""The prefill path returns the logits of whole windows: the batch shrinks so that they stay under this."""
NO_TEACHER = "no teacher"
"""Reason of a row that compares with teachers in a bundle that was exported without them."""


class Scorer(Protocol):
    """What is scored: `forward_windows` of a `Model`."""

    def forward_windows(
        self, token_ids: npt.NDArray[np.integer], path: ScorePath = "prefill"
    ) -> Iterator[tuple[int, F32]]:
        """Yield (first position, logits float32 [B, t, V]) over windows `token_ids` [B, T], each from an empty cache."""
        ...


@dataclass(frozen=True)
class Answers:
    """What the artifact says at every answer of the reference (n of them, window-major), nats."""

    label_logp: F64
    """[n]: log-probability of the true token."""
    top1: I32
    """[n]: the most likely token."""
    bucket_logp: F64 | None
    """[n, k]: log-probabilities at the reference's `fused.ids`."""
    tail_logp: F64 | None
    """[n]: log of the mass outside those k tokens, from their complement (1 - sum would cancel)."""
    parity: F32
    """[r, V]: the logits at the asked-for (window, position) pairs."""


def score_windows(
    model: Scorer,
    reference: Reference,
    path: ScorePath,
    positions: I32,
    vocab_size: int,
    advance: Advance | None = None,
) -> Answers:
    """Run `model` over every window of `reference` through `path`.

    Args:
        positions: int32 [r, 2] (window, position) whose full logit rows are kept.
        vocab_size: width of the logits.

    Raises:
        BundleError: the reference names tokens that the model does not have.
    """
    W, T = reference.token_ids.shape
    ids = None if reference.fused is None else reference.fused.ids.reshape(W, T - 1, -1)
    highest = max(int(reference.token_ids.max()), -1 if ids is None else int(ids.max()))
    if highest >= vocab_size:
        raise BundleError(f"reference/ names token {highest}, the model has {vocab_size}; rebuild the bundle")
    label, top1, tail = np.empty((W, T - 1)), np.empty((W, T - 1), np.int32), np.empty((W, T - 1))
    bucket = None if ids is None else np.empty(ids.shape)
    parity = np.full((len(positions), vocab_size), np.nan, np.float32)
    batch = WINDOWS_PER_BATCH
    if path == "prefill":
        batch = max(1, min(batch, PREFILL_LOGITS_BYTES // (4 * T * vocab_size)))
    for first in range(0, W, batch):
        rows = slice(first, min(first + batch, W))
        tokens = reference.token_ids[rows]
        for start, logits in model.forward_windows(tokens.astype(np.int64), path=path):
            for t in range(start, start + logits.shape[1]):
                step = logits[:, t - start]
                for r in np.flatnonzero(
                    (positions[:, 1] == t) & (positions[:, 0] >= first) & (positions[:, 0] < rows.stop)
                ):
                    parity[r] = step[positions[r, 0] - first]
                if t < T - 1:
                    here = None if ids is None else ids[rows, t]
                    label[rows, t], top1[rows, t], buckets, tail[rows, t] = score_step(step, tokens[:, t + 1], here)
                    if bucket is not None:
                        bucket[rows, t] = buckets
            if advance is not None:
                advance(logits.shape[0] * logits.shape[1])
    n = W * (T - 1)
    if bucket is None:
        return Answers(label.reshape(n), top1.reshape(n), None, None, parity)
    return Answers(label.reshape(n), top1.reshape(n), bucket.reshape(n, -1), tail.reshape(n), parity)


def score_step(logits: F32, labels: I32, ids: I32 | None) -> tuple[F64, I32, F64, F64]:
    """One position of B windows.

    log p_v = x_v - logsumexp(x); the tail is logsumexp over v outside `ids` - logsumexp(x).

    Args:
        logits: float32 [B, V].
        labels: int32 [B], the true next tokens.
        ids: int32 [B, k], the stored tokens, or None.

    Returns:
        label log-probabilities [B], most likely tokens [B], bucket log-probabilities [B, k] (k = 0 without `ids`), tail [B].
    """
    rows = np.arange(len(logits))
    log_z = _logsumexp(logits)
    label = logits[rows, labels] - log_z
    top1 = logits.argmax(1).astype(np.int32)
    if ids is None:
        return label, top1, np.zeros((len(logits), 0)), np.zeros(len(logits))
    buckets = np.take_along_axis(logits, ids, axis=1) - log_z[:, None]
    rest = logits.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    return label, top1, buckets, _logsumexp(rest) - log_z


def _logsumexp(x: F32) -> F64:
    """log sum exp over the last axis [B, V] -> float64 [B]; -inf where every entry is; NaN where one is."""
    top = x.max(axis=1)
    shift = np.where(np.isneginf(top), np.float32(0), top)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return np.asarray(shift + np.log(np.exp(x - shift[:, None]).sum(axis=1, dtype=np.float64)), np.float64)


def bucket_kl(fused_logp: F32, fused_tail_logp: F32, logp: F64, tail_logp: F64) -> F64:
    """KL(fused || artifact) over the k stored tokens and one bucket for all others, nats [n].

    sum_j p_j (log p_j - log q_j) + p_tail (log p_tail - log q_tail). Merging outcomes never raises a KL, so this is a lower
    bound of the KL over the whole vocabulary.
    """
    p_log = np.concatenate([fused_logp, fused_tail_logp[:, None]], axis=1).astype(np.float64)
    q_log = np.concatenate([logp, tail_logp[:, None]], axis=1)
    with np.errstate(invalid="ignore"):
        terms = np.exp(p_log) * (p_log - q_log)
    return np.asarray(np.where(np.isneginf(p_log), 0.0, terms).sum(axis=1), np.float64)  # 0 log 0 = 0


def quality_estimates(answers: Answers, reference: Reference) -> dict[str, Estimate]:
    """Every quality metric but parity, on the answers that count (`scored`)."""
    keep = reference.scored.astype(bool)
    blocks = np.asarray(reference.per_answer(reference.block))[keep].astype(np.int64)
    domain = np.asarray(reference.per_answer(reference.domain))[keep]
    logp = answers.label_logp[keep]
    rows = {"perplexity": exp_mean(-logp, blocks)}
    for index, name in enumerate(reference.domains):
        inside = domain == index
        rows[f"perplexity/{name}"] = exp_mean(-logp[inside], blocks[inside])
    fused = reference.fused
    if fused is None or answers.bucket_logp is None or answers.tail_logp is None:
        for name in ("perplexity_ratio_to_teacher", "kl_nats_per_token", "top1_agreement"):
            rows[name] = Estimate.missing(NO_TEACHER)
    else:
        rows["perplexity_ratio_to_teacher"] = perplexity_ratio(logp, fused.label_logp[keep].astype(np.float64), blocks)
        kl = bucket_kl(fused.logp[keep], fused.tail_logp[keep], answers.bucket_logp[keep], answers.tail_logp[keep])
        rows["kl_nats_per_token"] = block_mean(kl, blocks)
        agree = (answers.top1[keep] == fused.ids[keep, 0]).astype(np.float64)
        rows["top1_agreement"] = block_mean(np.where(np.isfinite(logp), agree, np.nan), blocks)
    rows["quantization_perplexity_ratio"] = perplexity_ratio(
        logp, reference.student_label_logp[keep].astype(np.float64), blocks
    )
    return rows


def parity_estimate(rows: list[F32], expected: F32) -> Estimate:
    """Largest |difference| between logit rows [r, V] (one array per path) and those stored by the build."""
    if not len(expected):
        return Estimate.missing("the bundle stores no parity rows")
    worst = max(float(np.abs(got - expected).max()) for got in rows)
    if not np.isfinite(worst):
        return Estimate.not_finite(
            int(sum((~np.isfinite(got)).any(axis=1).sum() for got in rows)), len(expected) * len(rows)
        )
    return Estimate(worst, None, len(expected) * len(rows), worst, worst)


def path_differences(cached: Answers, prefill: Answers, reference: Reference) -> dict[str, Any]:
    """How far the one-token path and the whole-window path are apart on the same answers (nats)."""
    keep = reference.scored.astype(bool)
    gap = np.abs(cached.label_logp[keep] - prefill.label_logp[keep])
    finite = bool(np.isfinite(gap).all()) and len(gap) > 0
    return {
        "max_abs_logp_nats": float(gap.max()) if finite else None,
        "mean_abs_logp_nats": float(gap.mean()) if finite else None,
        "different_top1": int((cached.top1[keep] != prefill.top1[keep]).sum()),
        "n": len(gap),
    }


def quality_beside(answers: Answers, reference: Reference) -> dict[str, Any]:
    """Perplexities of the teachers, the fused target, the float student and the artifact on the same tokens.

    Returns:
        {"columns": ["all", domain...], "tokens": [int...], "blocks": int, "rows": [{"name", "kind", "values"}]} with a null for
        a domain without answers.
    """
    keep = reference.scored.astype(bool)
    domain = np.asarray(reference.per_answer(reference.domain))[keep]
    masks = [np.ones(len(domain), bool), *(domain == i for i in range(len(reference.domains)))]
    sources: list[tuple[str, str, npt.NDArray[np.floating]]] = [
        (name, "teacher", reference.teacher_label_logp[i]) for i, name in enumerate(reference.teacher_names)
    ]
    if reference.fused is not None:
        sources.append(("fused teachers", "fused", reference.fused.label_logp))
    sources.append(("float student", "student", reference.student_label_logp))
    sources.append(("artifact", "artifact", answers.label_logp))
    rows = []
    for name, kind, logp in sources:
        values = [_perplexity(np.asarray(logp, np.float64)[keep][mask]) for mask in masks]
        rows.append({"name": name, "kind": kind, "values": values})
    blocks = np.asarray(reference.per_answer(reference.block))[keep]
    return {
        "columns": ["all", *reference.domains],
        "tokens": [int(mask.sum()) for mask in masks],
        "blocks": len(np.unique(blocks)),
        "rows": rows,
    }


def _perplexity(logp: F64) -> float | None:
    """exp(-mean), None where there is nothing or no finite number."""
    mean = -logp.mean() if len(logp) else np.nan
    return float(np.exp(mean)) if np.isfinite(mean) and mean < 700 else None


def measure_quality(
    model: Scorer, reference: Reference, parity: tuple[I32, F32], vocab_size: int, advance: Advance | None = None
) -> tuple[dict[str, Estimate], dict[str, Any], dict[str, Any]]:
    """Score both paths and compare: (estimates by metric name, the table beside the teachers, the paths' differences)."""
    positions, expected = parity
    if len(expected) and expected.shape[1] != vocab_size:
        raise BundleError(
            f"parity rows have {expected.shape[1]} logits, the model has {vocab_size}; rebuild the bundle"
        )
    cached = score_windows(model, reference, "cached", positions, vocab_size, advance)
    prefill = score_windows(model, reference, "prefill", positions, vocab_size, advance)
    estimates = quality_estimates(cached, reference)
    estimates["parity_max_abs_logit"] = parity_estimate([cached.parity, prefill.parity], expected)
    return estimates, quality_beside(cached, reference), path_differences(cached, prefill, reference)
