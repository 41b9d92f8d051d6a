"""The working process's end of a benchmark's line to its parent.

Standard library only: peers run in interpreters without edgestill.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any


class Replies:
    """Lines of JSON to the parent. What anything else prints to stdout, libraries in C included, goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def say(self, facts: Mapping[str, Any]) -> None:
        """One line."""
        self._out.write(json.dumps(facts) + "\n")

    def wait(self) -> bool:
        """Block until it is this side's turn; False when there are no more."""
        return sys.stdin.readline().strip() == "go"

    def turns(self) -> Iterator[int]:
        """Numbers of the turns, as the parent gives them; each is answered before the next is asked for."""
        turn = 0
        while self.wait():
            yield turn
            turn += 1

    def serve(self, work: Callable[[], Mapping[str, Any]]) -> None:
        """Do one piece of work per turn."""
        self.say({"ready": True})
        for _ in self.turns():
            self.say(work())
