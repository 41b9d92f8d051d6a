"""What a rewrite did to a graph, for the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """`done` places were rewritten; `left` has, for each place that looked alike and was not, its node and the reason."""

    rule: str
    done: int
    left: tuple[str, ...] = ()
