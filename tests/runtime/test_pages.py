"""Pages of a mapped file are given back when nothing was written to them, and only then."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from edgestill.runtime.backends.pages import SMAPS, MappedWeights, trim_heap, unwritten_mappings

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
        MappedWeights(file).release()
        assert resident(file) == (before if written else 0)
        assert (mapped[5], mapped[300]) == (77 if written else 5, 300 - 256)  # nothing is lost


def test_a_range_that_is_anothers_by_now_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx.data"
    file.write_bytes(b"\1" * SIZE)
    with file.open("rb") as handle:
        mapped = mmap.mmap(handle.fileno(), SIZE, access=mmap.ACCESS_COPY)
        assert sum(mapped[::4096]) == SIZE // 4096
        weights = MappedWeights(file)
        (range_,) = unwritten_mappings(file)
        mapped.close()
    # the kernel hands out the highest free range that fits: the one that was just left
    others = [mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(4)]
    for other in others:
        other[::4096] = b"\2" * (SIZE // 4096)
    taken = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [tuple(int(part, 16) for part in span.split("-")) for span in taken]
    if not any(start < range_[1] and range_[0] < end for start, end in spans):
        pytest.skip("the kernel gave the range to nobody")
    weights.release()
    assert all(sum(other[::4096]) == 2 * (SIZE // 4096) for other in others)


def test_no_file_is_no_trouble(tmp_path: Path) -> None:
    weights = MappedWeights(tmp_path / "absent")
    weights.release()
    trim_heap()
    assert not weights.worth_it
    assert unwritten_mappings(tmp_path / "absent") == []
