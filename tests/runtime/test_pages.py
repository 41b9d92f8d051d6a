"""Pages of a mapped file are given back when nothing was written to them, and only then."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from edgestill.runtime.backends.pages import SMAPS, release_after_opening, unwritten_mappings

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/smaps is Linux")
SIZE = 4 << 20


def resident(file: Path) -> int:
    """Bytes of `file` in this process's memory."""
    total, ours = 0, False
    for line in SMAPS.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if not fields[0].endswith(":"):
            ours = len(fields) == 6 and fields[5] == str(file)
        elif ours and fields[0] == "Rss:":
            total += int(fields[1]) << 10
    return total


@pytest.mark.parametrize("written", [False, True])
def test_pages_that_were_only_read_are_given_back(written: bool, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx.data"
    file.write_bytes(bytes(range(256)) * (SIZE // 256))
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), SIZE, access=mmap.ACCESS_COPY) as mapped:
        assert sum(mapped[::4096]) == 0
        if written:
            mapped[5] = 77
        before = resident(file)
        assert before > SIZE // 4  # a write to a huge page leaves its neighbours to be read again
        assert len(unwritten_mappings(file)) == (not written)
        release_after_opening(file)
        assert resident(file) == (before if written else 0)
        assert (mapped[5], mapped[300]) == (77 if written else 5, 300 - 256)  # nothing is lost


def test_no_file_is_no_trouble(tmp_path: Path) -> None:
    release_after_opening(tmp_path / "absent")
    assert unwritten_mappings(tmp_path / "absent") == []
