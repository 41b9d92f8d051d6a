"""What a rewrite did to a graph, for the report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """`done` places were rewritten; `left` has, for each place that looked alike and was not, its node and the reason."""

    rule: str
    done: int
    left: tuple[str, ...] = ()

    @classmethod
    def of(cls, rule: str, places: Iterable[tuple[str, str | None]]) -> Outcome:
        """From (name, None when it was rewritten, else why not) of every place."""
        found = list(places)
        left = tuple(f"{name}: {why}" for name, why in found if why is not None)
        return cls(rule, len(found) - len(left), left)
