"""How a session is opened and fed on this device: chosen by `edgestill tune`, kept in the bundle's local/.

    threads         of one operator
    spinning        whether they wait for work by spinning (fast, and a core each while waiting) or asleep
    prefill_chunk   tokens of one pass through a prompt

Settings fit the machine they were measured on and the onnxruntime that ran; elsewhere they are ignored, not used wrongly.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgestill.runtime.backends import PREFILL_CHUNK
from edgestill.runtime.bundle import Bundle, open_bundle, read_local, write_local
from edgestill.runtime.manifest import MANIFEST
from edgestill.runtime.processor import cpu_model, usable_cores

FILE = "tuned.json"
SPINNING = "session.intra_op.allow_spinning"


@dataclass(frozen=True)
class SessionSettings:
    """What may differ from device to device; the defaults are those of a bundle that was never tuned."""

    threads: int
    spinning: bool = True
    prefill_chunk: int = PREFILL_CHUNK

    @property
    def session_options(self) -> dict[str, str]:
        """onnxruntime's session config entries."""
        return {SPINNING: "1" if self.spinning else "0"}


def default_threads(bundle: Bundle) -> int:
    """Those that the profile grants, at most the processors of this process."""
    wanted = bundle.manifest.profile.get("device", {}).get("threads")
    return min(wanted, usable_cores()) if isinstance(wanted, int) else usable_cores()


def machine() -> dict[str, Any]:
    """What settings depend on."""
    import onnxruntime

    return {"cpu": cpu_model(), "cores": usable_cores(), "onnxruntime": onnxruntime.__version__}


def read_settings(bundle: Bundle) -> SessionSettings | None:
    """What `edgestill tune` chose for this bundle on this machine; None when it was not run here."""
    data = read_local(bundle, FILE)
    if data is None:
        return None
    found = json.loads(data)
    if found["machine"] != machine() or found["bundle"] != _digest(bundle):
        return None
    return SessionSettings(**found["settings"])


def tuned_threads(folder: Path) -> int | None:
    """The threads that `edgestill tune` chose for the bundle in `folder` on this machine; None when it was not run here."""
    settings = read_settings(open_bundle(folder))
    return None if settings is None else settings.threads


def write_settings(bundle: Bundle, settings: SessionSettings, measured: list[dict[str, Any]]) -> None:
    """Keep `settings` with the measurements that chose them.

    Raises:
        OutputRefused: local/ can't be written.
    """
    content = {
        "settings": dataclasses.asdict(settings),
        "machine": machine(),
        "bundle": _digest(bundle),
        "measured": measured,
    }
    write_local(bundle, FILE, (json.dumps(content, indent=1) + "\n").encode())


def _digest(bundle: Bundle) -> str:
    """Of the manifest, which holds the hashes of all that ships."""
    return hashlib.sha256((bundle.folder / MANIFEST).read_bytes()).hexdigest()
