"""How large a TensorRT-RTX engine is per precision, and how long and in how much memory it is built, on a machine without a GPU.

    python benchmarks/engine_sizes.py --work FOLDER [--checkpoint DIR] [--compute-capability 8.9] [--json FILE]

The student is random: 48 M parameters (512 wide, 14 layers, vocabulary 8,192), or a checkpoint that is given. Each engine is built
in a process of its own, as `edgestill engine --ahead` does; beside it stands the same graph with one optimization profile instead
of two, to show what the second costs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from turns import software, write_json

from edgestill.export.engine.make import lower_graph, ship_graph
from edgestill.export.onnx_export import ExportedGraph, export_fused, export_onnx
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.engines.builder import EngineBuilder
from edgestill.runtime.engines.flavour import open_library
from edgestill.runtime.engines.plan import EnginePlan
from edgestill.runtime.workload import peak_resident_mib

RESULT = Path(__file__).parent / "results" / "engine_sizes.json"
PRECISIONS = ("float16", "bfloat16", "fp8", "int8", "int4")
SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 14,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1536,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def random_checkpoint(folder: Path) -> Path:
    """A Llama of SHAPE with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


def build_here(shipped: ExportedGraph, weights: str, card: str, profiles: int) -> dict[str, float]:
    """Size, seconds and peak memory of one engine with the first of the profiles, or both."""

    class Some(EngineBuilder):
        def profiles(self, *given: Any) -> list[Any]:
            return super().profiles(*given)[:profiles]

    longest = shipped.facts.max_tokens
    prompt, attended = min(128, longest), min(192, longest)
    plan = EnginePlan("tensorrt-rtx", weights, "model.onnx", "", longest, 1, prompt, 1, prompt, attended)
    builder = Some(open_library("tensorrt-rtx"), lambda _: None)
    made = builder.build(shipped.path, plan, shipped.graph, shipped.facts, card)
    found = {
        "mib": len(made.data) / 2**20,
        "seconds": made.parse_seconds + made.build_seconds,
        "peak_rss_mib": peak_resident_mib() or 0.0,
    }
    return {name: round(value, 2) for name, value in found.items()}


def built(*asked: Any) -> dict[str, float]:
    """The same in a process of its own, whose peak is the build's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(build_here, *asked).result()


def measure(checkpoint: Path, work: Path, card: str) -> list[dict[str, Any]]:
    """A row per precision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = export_onnx(checkpoint, work / "plain")
        fused, _ = export_fused(checkpoint, plain, work / "fused")
    lowered = lower_graph(fused, work / "lowered", fused.facts.max_tokens)
    rows = []
    for weights in PRECISIONS:
        precision = PrecisionSpec(weights=weights, block_size=64, accuracy_level=0)
        shipped, _ = ship_graph(lowered, work / weights, precision, None, work / weights / "yardstick" / "model.onnx")
        size = sum(path.stat().st_size for path in (work / weights).glob("model.onnx*"))
        row: dict[str, Any] = {"weights": weights, "onnx_mib": round(size / 2**20, 2)}
        row["engine"] = built(shipped, weights, card, 2)
        row["one_profile"] = built(shipped, weights, card, 1)
        rows.append(row)
        print(
            f"{weights:<9} onnx {row['onnx_mib']:>7.1f} MiB  engine {row['engine']['mib']:>7.1f} MiB in "
            f"{row['engine']['seconds']:.1f} s  one profile {row['one_profile']['mib']:>7.1f} MiB"
        )
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--compute-capability", default="8.9")
    parser.add_argument("--json", type=Path, default=RESULT)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        checkpoint = given.checkpoint or random_checkpoint(work / "checkpoint")
        rows = measure(checkpoint, work, given.compute_capability)
    sizes = {row["weights"]: row["engine"]["mib"] for row in rows}
    result = {
        "shape": SHAPE if given.checkpoint is None else given.checkpoint.name,
        "compute_capability": given.compute_capability,
        "rows": rows,
        "int4_of_float16": round(sizes["int4"] / sizes["float16"], 4),
        "environment": software(),
    }
    write_json(given.json, result)


if __name__ == "__main__":
    main()
