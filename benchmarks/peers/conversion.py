"""Which peers are here, and a checkpoint converted for each: in child processes, each kept until what it is made of changes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from registry import Peer

WORKER = Path(__file__).with_name("worker.py")
PACKAGE = Path(__file__).parents[2]
CONVERT_S, ANSWER_S = 3600, 900
DONE = "done.json"


class LeftOut(Exception):
    """Why a peer is not measured, without paths of this machine."""


def interpreter_of(peer: Peer, pythons: Mapping[str, str]) -> str:
    """The interpreter for `peer`: ours here, a peer's by its name or family, then the one for all."""
    if peer.ours:
        return sys.executable
    return next(
        (pythons[key] for key in (peer.name, peer.name.rpartition("-")[0], "") if key in pythons), sys.executable
    )


def installed(peer: Peer, python: str) -> dict[str, str]:
    """Versions of what `peer` needs.

    Raises:
        LeftOut: something is missing.
    """
    found = answer(python, ["versions", peer.name], ANSWER_S)[peer.name]
    missing = [name for name, version in found.items() if version is None]
    if missing:
        raise LeftOut(f"not installed: {', '.join(missing)}")
    return dict(found)


def converted(
    peer: Peer, python: str, checkpoint: Path, identity: str, versions: Mapping[str, str], work: Path
) -> tuple[Path, dict[str, Any]]:
    """(folder, facts): `checkpoint` in the peer's own format. Made beside and renamed.

    Raises:
        LeftOut: the peer's converter refuses.
    """
    made_of = {"checkpoint": identity, "versions": dict(versions), "code": code_of(peer)}
    folder = work / peer.name
    if (folder / DONE).is_file():
        facts = json.loads((folder / DONE).read_text(encoding="utf-8"))
        if facts["made_of"] == made_of:
            return folder, facts
    beside = folder.with_name(f"{folder.name}.tmp")
    for old in (beside, folder):
        shutil.rmtree(old, ignore_errors=True)
    start = time.monotonic()
    found = answer(python, ["convert", peer.name, str(checkpoint), str(beside)], CONVERT_S)
    facts = {"made_of": made_of, "seconds": round(time.monotonic() - start, 1), **found}
    (beside / DONE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    beside.rename(folder)
    return folder, facts


def code_of(peer: Peer) -> str:
    """sha256 of what converts: the peer's file here, and for ours the packages that write bundles."""
    files = [WORKER.with_name(f"peer_{peer.family}.py"), WORKER.with_name("llama_gguf.py")]
    if peer.ours:
        files += sorted(file for part in ("export", "compress", "runtime") for file in (PACKAGE / part).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def answer(python: str, words: Sequence[str], limit_s: float) -> dict[str, Any]:
    """What a worker says.

    Raises:
        LeftOut: it fails or takes too long; the reason is its last line.
    """
    try:
        done = subprocess.run(
            [python, str(WORKER), *words], capture_output=True, text=True, timeout=limit_s, check=False
        )
    except FileNotFoundError as missing:
        raise LeftOut("its interpreter is not there; give another --python") from missing
    except subprocess.TimeoutExpired as late:
        raise LeftOut(f"{words[0]}: no answer in {limit_s:.0f} s") from late
    if done.returncode != 0 or not done.stdout.strip():
        sys.stderr.write(done.stderr)
        raise LeftOut(f"{words[0]}: {reason(done.stderr) or f'status {done.returncode}'}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def reason(text: str) -> str:
    """The error at the end of `text`, else its last line, without this machine's paths."""
    lines = [line for line in text.splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)]
    said = " ".join(line.strip() for line in (lines[starts[-1] :] if starts else lines[-1:]))
    return re.sub(r"(?:/[^\s/'\",:;)]+){2,}/?", "...", said)[:300]
