"""What a bundle keeps of the teachers' part in training: histograms in its manifest, means per log interval in training.jsonl.

Histograms count predicted tokens by a teacher's weight in the fused target and by its entropy as a share of log V, both in 0..1,
per domain. Where the weights do not depend on entropies none may be taken; training then writes zeros, which no teacher has, and
here they are absent, not 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgestill.runtime.errors import BundleError

WHERE = ("provenance", "training", "histograms")
"""Path in the manifest."""
MOST_BINS = 1000

Counts = dict[str, dict[str, tuple[int, ...]]]
"""Domain -> teacher -> tokens per bin, ascending from 0 to 1."""


@dataclass(frozen=True)
class Histograms:
    """weights, entropies: every domain with every teacher; `entropies` is empty where they were not taken."""

    bins: int
    weights: Counts
    entropies: Counts

    def tokens(self, domain: str) -> int:
        """Predicted tokens of the domain, each counted once however many teachers answered."""
        return max((sum(counts) for counts in self.weights.get(domain, {}).values()), default=0)


@dataclass(frozen=True)
class TeacherMeans:
    """One teacher on one domain, over the whole of training.

    weight: in the fused target, 0..1. entropy: nats, at the temperature at which it was compared; None where none was taken.
    tokens: predicted tokens of the domain; None where the bundle holds no histograms.
    """

    domain: str
    teacher: str
    weight: float
    entropy: float | None
    tokens: int | None


def histograms_of(manifest: Mapping[str, Any]) -> Histograms | None:
    """The histograms of `manifest` (manifest.json); None for a student without teachers and for an older bundle.

    Raises:
        BundleError: they are there, but are no histograms.
    """
    found: Any = manifest
    for name in WHERE:
        found = found.get(name) if isinstance(found, Mapping) else None
    if found is None:
        return None
    bins = found.get("bins") if isinstance(found, Mapping) else None
    if type(bins) is not int or not 0 < bins <= MOST_BINS:
        raise _refused(f"bins is {_short(bins)}, not a number from 1 to {MOST_BINS}")
    weights, entropies = (_counts(found.get(word), word, bins) for word in ("weights", "entropies"))
    return Histograms(bins, weights, entropies if _taken(entropies) else {})


def without_histograms(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A copy for the table of provenance, in which hundreds of counts would hide the rest."""
    copy = dict(manifest)
    at = copy
    for name in WHERE[:-1]:
        if not isinstance(at.get(name), Mapping):
            return copy
        at[name] = dict(at[name])
        at = at[name]
    at.pop(WHERE[-1], None)
    return copy


def teacher_means(
    training: Sequence[Mapping[str, Any]] | None, histograms: Histograms | None = None
) -> list[TeacherMeans]:
    """Mean weight and entropy of each teacher on each domain, domain by domain; empty where no teacher was heard.

    The mean is taken over the log intervals, each counted by its length: a histogram knows a value only to its bin.

    Args:
        training: rows of training.jsonl, or None.
    """
    rows = [row for row in training or [] if row.get("weights")]
    lengths = _lengths(rows)
    domains = dict.fromkeys(domain for row in rows for domain in row["weights"])
    entropies_taken = any(h for row in rows for each in row.get("entropies", {}).values() for h in each.values())
    found = []
    for domain in domains:
        for teacher in dict.fromkeys(name for row in rows for name in row["weights"].get(domain, {})):
            weight = _mean(rows, lengths, "weights", domain, teacher)
            entropy = _mean(rows, lengths, "entropies", domain, teacher) if entropies_taken else None
            tokens = histograms.tokens(domain) if histograms is not None else None
            if weight is not None:
                found.append(TeacherMeans(domain, teacher, weight, entropy, tokens))
    return found


def tokens_at(row: Mapping[str, Any]) -> float:
    """Tokens that training had seen at a row of training.jsonl."""
    return float(row.get("tokens", row.get("step", 0)))


def _lengths(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Tokens of the interval that each row tells of."""
    ends = [tokens_at(row) for row in rows]
    return [end - start for start, end in zip([0.0, *ends], ends, strict=False)]


def _mean(
    rows: Sequence[Mapping[str, Any]], lengths: Sequence[float], word: str, domain: str, teacher: str
) -> float | None:
    """Over the intervals in which the domain occurred."""
    pairs = [
        (length, float(row[word][domain][teacher]))
        for row, length in zip(rows, lengths, strict=True)
        if teacher in row.get(word, {}).get(domain, {})
    ]
    total = sum(length for length, _ in pairs)
    return sum(length * value for length, value in pairs) / total if total > 0 else None


def _counts(found: Any, word: str, bins: int) -> Counts:
    if not isinstance(found, Mapping) or not all(isinstance(teachers, Mapping) for teachers in found.values()):
        raise _refused(f"{word} is {_short(found)}, not counts by domain and teacher")
    for domain, teachers in found.items():
        for teacher, counts in teachers.items():
            if not isinstance(counts, list) or len(counts) != bins or not all(_is_count(n) for n in counts):
                raise _refused(f"{word} of {_short(teacher)} on {_short(domain)} are not {bins} counts of tokens")
    return {domain: {teacher: tuple(counts) for teacher, counts in each.items()} for domain, each in found.items()}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _taken(entropies: Counts) -> bool:
    """Whether any entropy lies beyond the first bin."""
    return any(any(counts[1:]) for teachers in entropies.values() for counts in teachers.values())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _refused(why: str) -> BundleError:
    return BundleError(f"manifest.json: {'.'.join(WHERE)}: {why}; build the bundle again")
