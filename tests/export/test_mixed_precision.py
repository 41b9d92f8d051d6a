"""Which weights get 8 bits: sensitivities against torch, the choice by hand, the budget to the byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_helpers import Export
from transformers import AutoModelForCausalLM

from edgestill.export.blockwise import dequantize, quantize_int4, quantize_int8
from edgestill.export.input_moments import window_feeds
from edgestill.export.mixed_precision import MIB, in_eight_bits, sensitivities, stored_bytes
from edgestill.export.post_training import matrices
from edgestill.export.quantize import ByValues, digest_of, quantize_graph
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.errors import BadInput

IDS = np.random.default_rng(0).integers(1, 263, (3, 12))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sensitivity_is_the_divergence_that_this_weight_alone_makes(family: str, exported: Export) -> None:
    checkpoint, export = exported(family)
    blocks = {name: quantize_int4(matrix, 32, True) for name, matrix in matrices(export.path).items()}
    found = sensitivities(export.path, blocks, list(window_feeds(export.graph, IDS)))
    assert list(found) == list(blocks)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    head = model.get_output_embeddings().weight
    theirs = []
    with torch.no_grad():
        plain = torch.log_softmax(model(torch.from_numpy(IDS)).logits.double(), -1)
        for matrix, block in zip(matrices(export.path).values(), blocks.values(), strict=True):
            places = [p for p in model.parameters() if p.ndim == 2 and p is not head]
            places = [p for p in places if matrix.shape in (tuple(p.shape), tuple(p.shape[::-1]))]
            place = next((p for p in places for m in (p, p.T) if np.array_equal(m.numpy(), matrix)), None)
            if place is None:
                theirs.append(None)  # the tied head: torch would change the embedding with it
                continue
            kept, value = place.clone(), torch.tensor(dequantize(block))
            place.copy_(value if np.array_equal(place.numpy(), matrix) else value.T)
            other = torch.log_softmax(model(torch.from_numpy(IDS)).logits.double(), -1)
            place.copy_(kept)
            theirs.append(float((plain.exp() * (plain - other)).sum(-1).mean()))
    compared = [(ours, other) for ours, other in zip(found.values(), theirs, strict=True) if other is not None]
    assert len(compared) >= len(found) - 1
    for ours, other in compared:
        assert ours == pytest.approx(other, rel=1e-3, abs=1e-7)


def test_most_felt_per_byte_goes_first_and_the_budget_holds() -> None:
    shapes = {"wide": (64, 100), "thin": (64, 10), "deaf": (64, 10)}
    felt = {"wide": 0.5, "thin": 0.1, "deaf": 0.0}
    assert stored_bytes((64, 10), 4, 32) == 10 * 2 * (16 + 4)
    assert stored_bytes((40, 10), 8, 32) == 10 * 2 * (32 + 4)
    least = sum(stored_bytes(shape, 4, 32) for shape in shapes.values())
    thin, wide = 10 * 2 * 16, 100 * 2 * 16
    for spare, expected in {
        0: [],
        thin - 1: [],
        thin: ["thin"],
        wide: ["thin"],
        wide + thin: ["thin", "wide"],
        10 * wide: ["thin", "wide"],
    }.items():
        assert in_eight_bits(felt, shapes, 32, (least + spare) / MIB) == expected
    beside = [(64, 40)]  # an embedding of its own: 40 rows of 64 stay in 4 bits and take their part
    taken = stored_bytes(beside[0], 4, 32)
    assert in_eight_bits(felt, shapes, 32, (least + taken + thin) / MIB, beside) == ["thin"]
    assert in_eight_bits(felt, shapes, 32, (least + taken + thin - 1) / MIB, beside) == []
    with pytest.raises(BadInput, match=r"precision.graph_mib 0.001: int4 alone takes 0.005 MiB; raise it"):
        in_eight_bits(felt, shapes, 32, 0.001)


def test_both_widths_in_one_graph(exported: Export, tmp_path: Path) -> None:
    _, export = exported("llama")
    float32 = matrices(export.path)
    name = next(iter(float32))
    given = {digest_of(float32[name]): quantize_int8(float32[name], 32)}
    path = tmp_path / "model.onnx"
    report = quantize_graph(export.path, path, PrecisionSpec(weights="int4"), given=ByValues(given))
    assert sorted({node.bits for node in report.quantized}) == [4, 8]
    bits = [
        a.i for n in onnx.load(path).graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "bits"
    ]
    assert bits.count(8) == 1


def test_no_text_is_refused(exported: Export) -> None:
    _, export = exported("llama")
    with pytest.raises(BadInput, match="no calibration text"):
        sensitivities(export.path, {}, [])
