"""Two models beside each other: how far their answers are apart, and where greedy texts part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgestill.runtime.model import Model
from edgestill.runtime.reference import FOLDER, load_reference
from edgestill.runtime.score import ScorePath

I64 = npt.NDArray[np.int64]
TIE = 0.05
"""Nats between the two likeliest tokens below which 16-bit arithmetic may choose either."""


@dataclass(frozen=True)
class Tie:
    """A token that the judge would not have chosen, though hardly less likely."""

    position: int
    token: int
    preferred: int
    gap: float
    """Nats."""


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    found: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return found


def logits_of(model: Model, ids: I64, path: ScorePath) -> npt.NDArray[np.float32]:
    """float32 [B, T, V] for windows [B, T]."""
    return np.concatenate([logits.copy() for _, logits in model.forward_windows(ids, path)], axis=1)


def mean_kl(theirs: Model, ours: Model, windows: I64, path: ScorePath) -> float:
    """KL(theirs || ours), nats per token, one window after the other."""
    sums = 0.0
    for window in windows:
        log_p, log_q = (log_softmax(logits_of(model, window[None], path)) for model in (theirs, ours))
        sums += float((np.exp(log_p) * (log_p - log_q)).sum())
    return sums / windows.size


def ties(judge: Model, prompt: list[int], chosen: list[int]) -> list[Tie]:
    """Where `judge`, reading the same text, would have chosen another token than `chosen`, greedily.

    Raises:
        AssertionError: the token is not as likely by TIE.
    """
    text = np.array([*prompt, *chosen][:-1])
    logits = log_softmax(logits_of(judge, text[None], "prefill")[0, len(prompt) - 1 :])
    found = []
    for i, (row, token) in enumerate(zip(logits, chosen, strict=True)):
        best = int(row.argmax())
        if best != token:
            tie = Tie(len(prompt) + i, token, best, float(row[best] - row[token]))
            assert tie.gap <= TIE, f"another token, and no tie: {tie}"
            found.append(tie)
    return found


def compare_500(ours: Model, same: Model, folder: Path, say: Callable[[str, object], None]) -> None:
    """Greedy continuations of held-out text, each token judged by the same graph on a CPU; ties are shown."""
    compared, shown = 0, []
    for window in load_reference(folder / FOLDER).token_ids:
        prompt = window[:40].tolist()
        chosen = ours.generate(prompt, max_new_tokens=100, temperature=0.0).token_ids
        shown += ties(same, prompt, chosen)
        compared += len(chosen)
        if compared >= 500:
            break
    assert compared >= 500
    say(f"greedy tokens compared, {ours.bundle.manifest.engine} {ours.bundle.manifest.precision.weights}", compared)
    for tie in shown:
        say("tie", tie)
