"""The parity gate: every family passes in every way of running it, and planted faults do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from export_helpers import Export
from onnx import numpy_helper
from tiny import SIZES, write_model

from edgestill.export.onnx_export import ExportedGraph, export_onnx
from edgestill.export.parity import (
    LOSSY_SQNR_DB,
    PARITY_FLOAT_MAX_ABS,
    ParityRow,
    check_parity,
    check_quantized_parity,
    ort_logits,
    parity_limit,
    parity_rows,
)
from edgestill.export.quantize import dequantize_graph, quantize_graph
from edgestill.export.ways import WAYS
from edgestill.profiles.schema import PrecisionSpec

IDS = np.random.default_rng(0).integers(0, 320, (2, 26)).astype(np.int32)


def _verdicts(rows: list[ParityRow]) -> dict[str, bool]:
    return {row.path: row.passed for row in rows}


def _damaged(export: ExportedGraph, folder: Path, damage: Callable[[onnx.ModelProto], None]) -> ExportedGraph:
    model = onnx.load(export.path)
    damage(model)
    onnx.save(model, folder / "model.onnx")
    return dataclasses.replace(export, path=folder / "model.onnx")


def _change_weight(name_part: str, value: float) -> Callable[[onnx.ModelProto], None]:
    """Set one entry of the first initializer of that name."""

    def damage(model: onnx.ModelProto) -> None:
        tensor = next(i for i in model.graph.initializer if name_part in i.name)
        array = numpy_helper.to_array(tensor).copy()
        array.flat[array.size // 2] = value
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return damage


def _swap_outputs(model: onnx.ModelProto) -> None:
    """Hand back keys of layer 0 where values are asked for, and values for keys."""
    names = {"present.0.key": "present.0.value", "present.0.value": "present.0.key"}
    for node in model.graph.node:
        for side in (node.input, node.output):
            side[:] = [names.get(name, name) for name in side]


@pytest.mark.parametrize("family", SIZES)
def test_the_float32_file_computes_what_torch_computes(family: str, exported: Export) -> None:
    checkpoint, export = exported(family)
    rows = check_parity(checkpoint, export, IDS)
    assert [row.path for row in rows] == [*WAYS, "over-long prompt"]
    assert all(row.passed for row in rows), rows
    compared = {row.path: row for row in rows[:-1]}
    assert all((row.max_abs_delta or 0) <= 1e-4 == row.limit == PARITY_FLOAT_MAX_ABS for row in compared.values())
    assert {name: row.positions for name, row in compared.items()} == {
        "prefill": 52,
        "chunked prefill": 52,
        "single steps": 26,
        "decode after prefill": 52,
        "left padding": 26 + 26 - 26 // 3,
    }
    assert all(row.equal_argmax == row.positions for row in compared.values())


def test_a_window_longer_than_the_sliding_attention(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "checkpoint", "mistral", sliding_window=8)
    rows = check_parity(checkpoint, export_onnx(checkpoint, tmp_path / "onnx"), IDS)
    assert all(row.passed for row in rows), rows


@pytest.mark.parametrize("family", SIZES)
def test_one_changed_weight_fails_every_comparison(family: str, exported: Export, tmp_path: Path) -> None:
    checkpoint, export = exported(family)
    damaged = _damaged(export, tmp_path, _change_weight("transformer.h.0.mlp" if family == "gpt2" else "MatMul", 1.0))
    assert _verdicts(check_parity(checkpoint, damaged, IDS)) == dict.fromkeys(WAYS, False) | {"over-long prompt": True}


def test_a_wrong_cache_is_seen_where_the_cache_is_read(exported: Export, tmp_path: Path) -> None:
    checkpoint, export = exported("gpt_neox")
    verdicts = _verdicts(check_parity(checkpoint, _damaged(export, tmp_path, _swap_outputs), IDS))
    assert verdicts.pop("prefill")
    assert verdicts.pop("over-long prompt")
    assert not any(verdicts.values())


def test_a_weight_that_is_no_number_fails_with_the_reason(exported: Export, tmp_path: Path) -> None:
    checkpoint, export = exported("llama")
    rows = check_parity(checkpoint, _damaged(export, tmp_path, _change_weight("MatMul", np.nan)), IDS)
    assert [row.reason for row in rows[:-1]] == ["logits that are no numbers"] * len(WAYS)
    assert not any(row.passed for row in rows[:-1])


def test_a_file_that_does_not_open_is_a_failed_row(exported: Export, tmp_path: Path) -> None:
    checkpoint, export = exported("llama")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    (row,) = check_parity(checkpoint, dataclasses.replace(export, path=tmp_path / "model.onnx"), IDS)
    assert (row.path, row.passed) == ("opening", False)
    assert "can't open" in row.reason


def test_a_window_longer_than_the_model_is_a_failed_row(exported: Export) -> None:
    checkpoint, export = exported("llama")
    short = dataclasses.replace(export, facts=dataclasses.replace(export.facts, max_tokens=20))
    rows = check_parity(checkpoint, short, IDS)
    assert not any(row.passed for row in rows[:-1])
    assert "exceed the 20" in rows[0].reason
    assert rows[-1].passed


def _shipped(export: ExportedGraph, precision: PrecisionSpec, folder: Path) -> tuple[Path, Path]:
    """(quantized file, its yardstick)."""
    quantize_graph(export.path, folder / "model.onnx", precision)
    dequantize_graph(folder / "model.onnx", folder / "yardstick.onnx")
    return folder / "model.onnx", folder / "yardstick.onnx"


@pytest.mark.parametrize(
    ("family", "precision"),
    [(family, PrecisionSpec()) for family in SIZES] + [("gpt2", PrecisionSpec(weights="int8", block_size=64))],
    ids=[*SIZES, "gpt2 int8"],
)
def test_quantized_files_compute_with_the_weights_they_ship(
    family: str, precision: PrecisionSpec, exported: Export, tmp_path: Path
) -> None:
    _, export = exported(family)
    rows = check_quantized_parity(*_shipped(export, precision, tmp_path), export.facts, export.graph, IDS)
    ways = [*WAYS, "over-long prompt"]
    assert [row.path for row in rows] == [f"accuracy_level {level}: {way}" for level in (0, 4) for way in ways]
    assert all(row.passed for row in rows), rows
    exact, lossy = rows[: len(WAYS)], rows[len(ways) : -1]
    assert {row.unit for row in exact} == {"logit"}
    assert max(row.max_abs_delta or 0 for row in exact) <= 1e-5
    assert {(row.unit, row.limit) for row in lossy} == {("dB", LOSSY_SQNR_DB)}
    assert 30 < min(row.sqnr_db or 0 for row in lossy) < 60  # the floor is near what is measured, and the loss is real


def test_at_level_0_only_the_exact_comparison_is_made(exported: Export, tmp_path: Path) -> None:
    _, export = exported("llama")
    files = _shipped(export, PrecisionSpec(accuracy_level=0), tmp_path)
    rows = check_quantized_parity(*files, export.facts, export.graph, IDS)
    assert [row.path for row in rows] == [f"accuracy_level 0: {way}" for way in [*WAYS, "over-long prompt"]]


def test_swapped_nibbles_fail_both_comparisons(exported: Export, tmp_path: Path) -> None:
    _, export = exported("qwen2")
    shipped, yardstick = _shipped(export, PrecisionSpec(), tmp_path)

    def swap(model: onnx.ModelProto) -> None:
        tensor = next(i for i in model.graph.initializer if i.name.endswith("_codes") and "rows" not in i.name)
        codes = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((codes >> 4) | ((codes & 15) << 4), tensor.name))

    (tmp_path / "bad").mkdir()
    damaged = _damaged(dataclasses.replace(export, path=shipped), tmp_path / "bad", swap)
    rows = check_quantized_parity(damaged.path, yardstick, export.facts, export.graph, IDS)
    compared = [row for row in rows if not row.path.endswith("over-long prompt")]
    assert len(compared) == 2 * len(WAYS)
    assert not any(row.passed for row in compared)
    assert max(row.sqnr_db or 0 for row in compared) < 15


def test_parity_rows_are_logits_of_the_yardstick(exported: Export) -> None:
    _, export = exported("gpt2")
    positions, logits = parity_rows(export.path, export.facts, export.graph, IDS, rows=9, seed=3)
    assert (positions.dtype, logits.dtype, logits.shape) == (np.int32, np.float32, (9, 320))
    assert positions.tolist() == [list(place) for place in sorted({(w, t) for w, t in positions.tolist()})]
    theirs = ort_logits(export.path, export.facts, export.graph, IDS)
    assert np.array_equal(logits, theirs[positions[:, 0], positions[:, 1]])
    again, _ = parity_rows(export.path, export.facts, export.graph, IDS, rows=9, seed=3)
    other, _ = parity_rows(export.path, export.facts, export.graph, IDS, rows=9, seed=4)
    assert np.array_equal(positions, again)
    assert not np.array_equal(positions, other)


def test_more_rows_than_positions_gives_every_position(exported: Export) -> None:
    _, export = exported("llama")
    positions, logits = parity_rows(export.path, export.facts, export.graph, IDS, rows=1000, seed=0)
    assert positions.tolist() == [[window, t] for window in range(2) for t in range(26)]
    assert logits.shape == (52, 320)


def test_limits_for_the_device() -> None:
    logits: npt.NDArray[np.float32] = np.array([[-7.0, 3.0], [2.0, 5.0]], np.float32)
    assert parity_limit(PrecisionSpec(weights="float32"), logits) == 1e-4
    assert parity_limit(PrecisionSpec(weights="int4", accuracy_level=0), logits) == pytest.approx(1e-3)
    assert parity_limit(PrecisionSpec(weights="float32"), logits * 10) == pytest.approx(7e-4)
    assert parity_limit(PrecisionSpec(weights="int8", accuracy_level=4), logits) == pytest.approx(0.7)
