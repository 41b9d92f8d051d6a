"""Words for a name that is not known: the nearest known one, or all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'threads'?`, or where nothing is near, `known: arch, engine, ...`."""
    names = list(known)
    longer = sorted((known for known in names if known.startswith(name)), key=len)
    close = longer or difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else "none is known here"
