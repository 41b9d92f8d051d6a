"""Make the answers on the held-out tokens that travel with the bundle (format: runtime/reference.py).

Teachers run one after the other, so only one needs to fit in memory; of each its hidden states on these tokens are kept (a
few KiB per token) and its head, never its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgestill.compress.corpus import Part
from edgestill.compress.fused_head import DEFAULT_CHUNK_BYTES, row_ranges
from edgestill.compress.fusion import WeightRule, entropy_of
from edgestill.compress.packing import spread
from edgestill.compress.rows import IGNORE, Rows
from edgestill.compress.targets import Dense, OnlineTarget, TeacherRows
from edgestill.compress.teachers import Teacher, hidden_states
from edgestill.profiles.schema import ReferenceSpec
from edgestill.runtime.progress import Task
from edgestill.runtime.reference import FusedAnswers, Reference


def choose_windows(part: Part, tokens: int) -> npt.NDArray[np.int64]:
    """Held-out windows for about `tokens` tokens: each domain the same number where it has them, evenly spaced."""
    return spread(part, tokens // part.token_ids.shape[1])


@torch.no_grad()
def make_reference(
    part: Part,
    domains: Sequence[str],
    spec: ReferenceSpec,
    teachers: Sequence[Callable[[], Teacher]],
    calibrations: Sequence[float],
    rule: WeightRule | None,
    student: PreTrainedModel,
    *,
    batch_size: int,
    task: Task,
) -> Reference:
    """The reference for `student` (float32, evaluation mode) and its fused teachers.

    Args:
        part: the held-out windows; at most `spec.tokens` tokens of them are used.
        domains: name of each index in `part.domain`.
        teachers: one function per teacher that loads it; none: the fused answers are absent.
        task: advanced by one per window and model.
    """
    windows = choose_windows(part, spec.tokens)
    token_ids = part.token_ids[windows].astype(np.int32)
    scored = np.ones((len(windows), token_ids.shape[1] - 1), np.uint8)
    if part.loss_mask is not None:
        scored = part.loss_mask[windows][:, 1:].astype(np.uint8)
    device = next(student.parameters()).device
    batches = [torch.from_numpy(b.astype(np.int64)).to(device) for b in _batches(token_ids, batch_size)]
    head = student.get_output_embeddings()
    ours = _remember(
        lambda ids: hidden_states(student, ids)[0], head.weight, getattr(head, "bias", None), 1.0, batches, task
    )
    theirs, names = [], []
    for load, calibration in zip(teachers, calibrations, strict=True):
        teacher = load()
        names.append(teacher.facts.name)
        theirs.append(
            _remember(_hidden_of(teacher), teacher.head_weight, teacher.head_bias, calibration, batches, task)
        )
    ids = torch.from_numpy(token_ids.astype(np.int64)).to(device)
    domain = torch.from_numpy(part.domain[windows].astype(np.int64)).to(device)
    asked = torch.nn.functional.pad(torch.from_numpy(scored).to(device).bool(), (1, 0))
    # weights pool over what counts, as in training; what does not count has answers too, so that rows and tokens correspond
    halves = [Rows.of(ids.masked_fill(~chosen, IGNORE), domain) for chosen in (asked, ~asked)]
    arrays = _joined([(rows, _answers(rows, ours, theirs, rule, spec.top_k)) for rows in halves if rows.labels.numel()])
    fused = None
    if theirs:
        names_of_fused = ("ids", "logp", "tail", "entropy", "label")
        fused = FusedAnswers(*(arrays[name] for name in names_of_fused))
    return Reference(
        token_ids=token_ids,
        scored=scored.reshape(-1),
        domain=part.domain[windows].astype(np.int16),
        block=part.block[windows].astype(np.int32),
        student_label_logp=arrays["student"],
        domains=tuple(domains),
        teacher_names=tuple(names),
        teacher_label_logp=arrays["teachers"] if theirs else np.zeros((0, 0), np.float32),
        fused=fused,
    )


def _hidden_of(teacher: Teacher) -> Callable[[Tensor], Tensor]:
    return lambda ids: teacher.hidden(ids)[0]


def _batches(token_ids: npt.NDArray[np.int32], size: int) -> list[npt.NDArray[np.int32]]:
    return [token_ids[start : start + size] for start in range(0, len(token_ids), size)]


def _remember(
    hidden: Callable[[Tensor], Tensor],
    head: Tensor,
    bias: Tensor | None,
    calibration: float,
    batches: Sequence[Tensor],
    task: Task,
) -> TeacherRows:
    """Hidden states of one model on all windows; its head in float32, so that only the model's own rounding is in them."""
    rows = []
    for ids in batches:
        rows.append(hidden(ids)[:, :-1].flatten(0, 1).float())
        task.advance(len(ids))
    return TeacherRows(
        torch.cat(rows), head.detach().float(), None if bias is None else bias.detach().float(), calibration
    )


def _at(model: TeacherRows, rows: Rows) -> TeacherRows:
    """The same at these positions only."""
    return replace(model, hidden=model.hidden[rows.positions])


def _joined(parts: Sequence[tuple[Rows, dict[str, npt.NDArray[Any]]]]) -> dict[str, npt.NDArray[Any]]:
    """The answers of several rows, each in its position."""
    order = np.argsort(np.concatenate([rows.positions.cpu().numpy() for rows, _ in parts]), kind="stable")
    names = parts[0][1]
    return {
        name: np.concatenate([found[name] for _, found in parts], axis=axis).take(order, axis=axis)
        for name, axis in ((name, -1 if name == "teachers" else 0) for name in names)
    }


def _answers(
    rows: Rows, ours: TeacherRows, theirs: Sequence[TeacherRows], rule: WeightRule | None, top_k: int
) -> dict[str, npt.NDArray[Any]]:
    """All answers on n rows of the windows; every array has n rows (`teachers` columns). Models are given with all positions."""
    ours, theirs = _at(ours, rows), [_at(teacher, rows) for teacher in theirs]
    target = OnlineTarget(theirs, rule, rows) if rule is not None and theirs else None
    out: dict[str, list[Tensor]] = {}
    for part in row_ranges(rows, target, ours.head.shape[0], DEFAULT_CHUNK_BYTES):
        want = rows.labels[part].unsqueeze(1)
        found = {"student": torch.log_softmax(ours.logits(part), -1).gather(1, want).squeeze(1)}
        if target is not None:
            alone = [torch.log_softmax(t.logits(part), -1).gather(1, want).squeeze(1) for t in theirs]
            found["teachers"] = torch.stack(alone)
            found |= _fused(target.chunk(part), want, top_k)
        for name, value in found.items():
            out.setdefault(name, []).append(value)
    return {name: torch.cat(v, dim=-1 if name == "teachers" else 0).cpu().numpy() for name, v in out.items()}


def _fused(target: Dense, want: Tensor, top_k: int) -> dict[str, Tensor]:
    log_p = torch.log_softmax(target.log_p.double(), -1)  # the tail of 4,000 buckets is small: no rounding of the sum
    values, ids = log_p.topk(min(top_k, log_p.shape[1]), dim=-1)
    outside = log_p.scatter(1, ids, float("-inf"))
    return {
        "ids": ids.int(),
        "logp": values.float(),
        "tail": torch.logsumexp(outside, -1).float(),
        "entropy": entropy_of(log_p).float(),
        "label": log_p.gather(1, want).squeeze(1).float(),
    }


@torch.no_grad()
def perplexity(model: PreTrainedModel, part: Part, windows: npt.NDArray[np.int64], *, batch_size: int) -> float:
    """Perplexity of a torch model on some windows of a part, masked tokens left out."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(windows), batch_size):
        chosen = windows[start : start + batch_size]
        ids = torch.from_numpy(part.token_ids[chosen].astype(np.int64)).to(device)
        labels = ids[:, 1:].clone()
        if part.loss_mask is not None:
            labels[torch.from_numpy(part.loss_mask[chosen][:, 1:] == 0).to(device)] = IGNORE
        logits = model(ids).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels != IGNORE).sum())
    return float(np.exp(total / max(count, 1)))
