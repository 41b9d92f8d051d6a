"""Each family is written and exported once per session; tests that edit a file work on a copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from export_helpers import Export
from tiny import write_model

from edgestill.export.onnx_export import ExportedGraph, export_onnx


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """family -> (checkpoint, its float32 export)."""
    known: dict[str, tuple[Path, ExportedGraph]] = {}

    def export(family: str) -> tuple[Path, ExportedGraph]:
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            checkpoint = write_model(folder / "checkpoint", family)
            known[family] = (checkpoint, export_onnx(checkpoint, folder / "onnx"))
        return known[family]

    return export
