"""Which engines may be opened: those that this machine built, and those whose hash a manifest declares.

An engine is executable content. What this machine built is sealed with a key that never leaves it (HMAC-SHA256 over fingerprint and
bytes), so an engine that somebody put into a bundle's local/ reads as absent and is built anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from edgestill.runtime.errors import OutputRefused

KEY_BYTES = 32
SEAL_CHARACTERS = 64
HOME = "EDGESTILL_HOME"
"""Environment variable: where this machine's key and the engines of read-only bundles are kept (default ~/.cache/edgestill)."""


def home() -> Path:
    """This user's folder for what is made on this machine."""
    given = os.environ.get(HOME)
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "edgestill"


def seal(data: bytes, fingerprint: str) -> str:
    """Hex seal of an engine that was built here."""
    return hmac.new(_key(), fingerprint.encode() + b"\0" + hashlib.sha256(data).digest(), "sha256").hexdigest()


def is_sealed(data: bytes, fingerprint: str, found: str) -> bool:
    """Whether `found` is the seal that this machine gave."""
    return hmac.compare_digest(seal(data, fingerprint), found)


def _key() -> bytes:
    """This machine's key, made on first use and readable by its user only.

    Raises:
        OutputRefused: it can be neither read nor made.
    """
    path = home() / "machine.key"
    try:
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _make_key(path)
            key = path.read_bytes()
    except OSError as error:
        raise OutputRefused(
            f"{path}: this machine's key for engines can't be kept ({error.strerror}); set {HOME} to a folder that can be written"
        ) from error
    if len(key) != KEY_BYTES:
        raise OutputRefused(
            f"{path}: holds {len(key)} bytes, not a key of {KEY_BYTES}; delete it, and engines are built anew"
        )
    return key


def _make_key(path: Path) -> None:
    """Write a key that nobody else may read at any moment; of two who are first at once, the first one's stays."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
            handle.write(secrets.token_bytes(KEY_BYTES))
            handle.flush()
            os.fsync(handle.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(beside, path)  # whole or not at all, and never over another's
    finally:
        beside.unlink(missing_ok=True)
