"""What a student, and what its teachers' fused target, say of every window of a part: sums of negative log-likelihoods.

Everything is in float32 with its sums in float64: differences between rows are small, and rounding must not be among them.
Targets with the same teachers are judged together, so each teacher runs once per batch whatever the number of rules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgestill.compress.corpus import Part
from edgestill.compress.fusion import WeightRule
from edgestill.compress.quantize.shipped import load_as_shipped
from edgestill.compress.rows import IGNORE, Rows, chunks
from edgestill.compress.targets import OnlineTarget, TeacherRows
from edgestill.compress.teachers import Teacher, hidden_states
from edgestill.runtime.progress import Task

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
BATCH_TOKENS = 2048
"""Of the windows that a model reads at a time."""
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}
"""Of float32 logits at a time: on a processor they must stay in its cache (measured: half as fast again as 64 MiB)."""


@dataclass(frozen=True)
class FusedRule:
    """How one row fuses its teachers: the rule and each teacher's calibration temperature."""

    rule: WeightRule
    calibrations: tuple[float, ...]


def identity(part: Part) -> str:
    """sha256 of what is judged: tokens, which of them count, domains and blocks."""
    digest = hashlib.sha256()
    for array in (part.token_ids, part.loss_mask, part.domain, part.block):
        digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def scored_tokens(part: Part) -> I64:
    """int64 [W]: labels that count in each window."""
    if part.loss_mask is None:
        return np.full(part.n_windows, part.token_ids.shape[1] - 1, np.int64)
    return np.asarray(part.loss_mask[:, 1:].sum(1), np.int64)


@torch.no_grad()
def judge_student(checkpoint: Path, part: Part, device: torch.device, task: Task) -> F64:
    """float64 [W]: negative log-likelihood of every window's counting labels, nats, of the student with the weights that ship.

    Args:
        task: advanced by one per window.
    """
    student = load_as_shipped(checkpoint).to(device).eval()
    head = student.get_output_embeddings()
    bias = getattr(head, "bias", None)
    found = np.zeros(part.n_windows)
    for windows in _batches(part):
        ids, labels = _read(part, windows, device)
        rows = Rows.of(labels, torch.zeros(len(ids), dtype=torch.int64, device=device))
        hidden = rows.take(hidden_states(student, ids)[0])
        sums = torch.zeros(len(ids), dtype=torch.float64, device=device)
        for piece in _pieces(rows, head.weight):
            logits = torch.nn.functional.linear(hidden[piece], head.weight, bias)
            nll = torch.nn.functional.cross_entropy(logits, rows.labels[piece], reduction="none")
            sums.index_add_(0, rows.sequence[piece], nll.double())
        found[windows] = sums.cpu().numpy()
        task.advance(len(ids))
    return found


@torch.no_grad()
def judge_targets(teachers: Sequence[Teacher], rules: Sequence[FusedRule], part: Part, task: Task) -> list[F64]:
    """float64 [W] per rule: negative log-likelihood under the fused target at temperature 1.

    Args:
        teachers: resident, in the order of every rule's weights.
        task: advanced by one per window.
    """
    device = teachers[0].head_weight.device
    heads = [(t.head_weight.float(), None if t.head_bias is None else t.head_bias.float()) for t in teachers]
    found = [np.zeros(part.n_windows) for _ in rules]
    for windows in _batches(part):
        ids, labels = _read(part, windows, device)
        domain = torch.from_numpy(part.domain[windows].astype(np.int64)).to(device)
        rows = Rows.of(labels, domain)
        hidden = [rows.take(t.hidden(ids)[0]).float() for t in teachers]
        for nll, fused in zip(found, rules, strict=True):
            answers = [
                TeacherRows(h, weight, bias, calibration)
                for h, (weight, bias), calibration in zip(hidden, heads, fused.calibrations, strict=True)
            ]
            nll[windows] = _fused_nll(answers, fused.rule, rows, len(ids))
        task.advance(len(ids))
    return found


def _fused_nll(teachers: Sequence[TeacherRows], rule: WeightRule, rows: Rows, windows: int) -> F64:
    """float64 [windows] of one batch."""
    target = OnlineTarget(teachers, rule, rows)
    sums = torch.zeros(windows, dtype=torch.float64, device=rows.labels.device)
    for piece in _pieces(rows, teachers[0].head):
        label = target.chunk(piece).log_p.gather(1, rows.labels[piece].unsqueeze(1)).squeeze(1)
        sums.index_add_(0, rows.sequence[piece], -label.double())
    return np.asarray(sums.cpu().numpy(), np.float64)


def _pieces(rows: Rows, head: Tensor) -> list[slice]:
    """Ranges of whole sequences whose logits by `head` [V, d] fit into a chunk."""
    return chunks(rows.lengths, max(1, CHUNK_BYTES[head.device.type] // (4 * head.shape[0])))


def _batches(part: Part) -> list[I64]:
    size = max(1, BATCH_TOKENS // part.token_ids.shape[1])
    windows = np.arange(part.n_windows, dtype=np.int64)
    return [windows[start : start + size] for start in range(0, len(windows), size)]


def _read(part: Part, windows: I64, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids int64 [B, T] and labels [B, T] with IGNORE where they do not count."""
    ids = torch.from_numpy(part.token_ids[windows].astype(np.int64)).to(device)
    labels = ids.clone()
    if part.loss_mask is not None:
        labels[torch.from_numpy(part.loss_mask[windows] == 0).to(device)] = IGNORE
    return ids, labels
