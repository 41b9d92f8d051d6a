"""What every peer looks like to the one who measures it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


class Engine(Protocol):
    """A loaded model. Greedy; end-of-text is a token like any other."""

    def prefill(self, ids: I64, new_tokens: int) -> I64:
        """Forget what was before, run the prompts int64 [B, T]; the first next token of every row, int64 [B].

        Room is made for `new_tokens` further ones.
        """
        ...

    def decode(self, n: int) -> I64:
        """`n` further tokens of every row, int64 [B, n]; `n` is the `new_tokens` of the prefill."""
        ...


def run_tool(command: Sequence[str]) -> int:
    """Run a converter's command; what it says goes to stderr, where the last line becomes the reason of a failure. Its status."""
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode


def files_in(folder: Path, *patterns: str) -> list[Path]:
    """Files of `folder` that match."""
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
