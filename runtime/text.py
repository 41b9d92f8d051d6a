"""Token ids to text while they arrive: only whole characters, nothing of a stop string.

Two holds, in this order. A character may be spread over tokens (byte-level BPE, byte fallback): its decoded text ends in
U+FFFD until the last byte arrives, so such an end waits. A stop string may be spread over tokens: an end of the text that could
become one waits. What still waits for bytes when the text ends is not emitted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from edgestill.runtime.errors import BadInput

REPLACEMENT = "\ufffd"
LONGEST_UNFINISHED = 3
"""Bytes of a UTF-8 character that can be waiting for the last; some decoders show each as one U+FFFD, some all as one."""

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Incremental decoding with a window: text of a token = decode(context + token) minus decode(context).

    A decoder may treat the first token differently (it strips a leading space) or join tokens (bytes), so tokens are decoded
    together with those before them; the window begins at the last place where the text was whole.
    """

    def __init__(self, decode: Decode, special_ids: Collection[int] = ()) -> None:
        """`decode` turns ids into text; ids in `special_ids` have no text and never enter the window."""
        self._decode = decode
        self._special = frozenset(special_ids)
        self._context: list[int] = []
        self._context_text = ""
        self._new: list[int] = []
        self._sent = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often the token's own, sometimes empty."""
        if token_id in self._special:
            return ""
        self._new.append(token_id)
        text = self._decode([*self._context, *self._new])
        # A decoder takes a character of the context back when the bytes after it are none: then they are decoded alone.
        follows = text.startswith(self._context_text)
        text = text[len(self._context_text) :] if follows else self._decode(self._new)
        whole = without_unfinished(text)
        piece, self._sent = whole[self._sent :], max(self._sent, len(whole))
        if text and whole == text:
            self._context, self._new, self._sent = self._new, [], 0
            self._context_text = self._decode(self._context)
        return piece


def without_unfinished(text: str) -> str:
    """`text` without the U+FFFD (at most LONGEST_UNFINISHED) at its end, which further bytes may turn into a character."""
    tail = len(text) - len(text.rstrip(REPLACEMENT))
    return text[: len(text) - min(tail, LONGEST_UNFINISHED)]


class StopStrings:
    """Passes text on until one of `stops` appears in it; the earliest ends it, and no part of a stop string gets out."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: strings, none empty."""
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise BadInput(f"stop holds {stop!r}; give strings of at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What of `text` (and of what was held) can be shown now. `stopped` turns true when a stop string is complete."""
        if not self._stops:
            return text
        text = self._held + text
        starts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The held end, once no more text can come and it turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop` (and not all of it)."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
