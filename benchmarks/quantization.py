"""What int8, int4 and nf4 cost a student: rounded, by GPTQ, by HQQ, or trained with them. One table, all from exported files.

    edgestill ablate benchmarks/study/study.yaml --rows benchmarks/study/rows_quantized.yaml --out build/study --seeds 3 --jobs 2
    python benchmarks/quantization.py build/study --seeds 3 --json FILE              # validation text
    python benchmarks/quantization.py build/study --seeds 3 --held-out --json FILE   # once, at the end

Of every student: perplexity and KL to the float student trained on the same tokens, window by window through onnxruntime at the
shipped accuracy_level; size of the graph, and of the bundle without its reference; decode speed at batch 1 (128 + 64 tokens, the
median of interleaved runs). A JSON per cell lies in <out>/quantization; finished cells of the same students are kept. Differences
to float are paired by seed and block of text. FILE and the table beside it (FILE with .md) hold all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from turns import software, write_json

from edgestill.compress.corpus import Corpus, open_corpus
from edgestill.compress.packing import Part, spread
from edgestill.export.alternatives import Alternative, unchanged, write_alternative
from edgestill.export.model_facts import facts_of_checkpoint
from edgestill.export.onnx_export import ExportedGraph, Exports, describe_graph, export_fused, export_onnx
from edgestill.export.quantize import graph_bytes
from edgestill.export.weights_table import Judged, decode_speeds, judge_windows, open_graph, table
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.errors import BadInput

CELLS = (
    "float",
    "int8 nearest",
    "int8 trained",
    "int4 nearest",
    "int4 hqq",
    "int4 gptq",
    "int4 trained",
    "nf4 nearest",
    "nf4 trained",
)
CODE = 3
"""Revision of what a cell computes; raise it when the same student would get other numbers."""
CALIBRATION_WINDOWS = 64


@dataclass(frozen=True)
class Study:
    """An ablation's folder, and what is judged."""

    out: Path
    corpus: Corpus
    part: Part
    name: str
    windows: npt.NDArray[np.int64]

    def student_key(self, row: str, seed: int) -> str:
        """The student of a row, as the ablation calls it."""
        result = json.loads((self.out / "ablate" / f"{row.replace(' ', '-')}-{seed}.json").read_text())
        return str(result["student_key"])

    def checkpoint(self, row: str, seed: int) -> Path:
        """The student of a row."""
        return self.out / "work" / f"train-{self.student_key(row, seed)}" / "student"

    def seeds(self) -> list[int]:
        """Those that the float student was trained with."""
        return sorted(int(f.stem.rpartition("-")[2]) for f in (self.out / "ablate").glob("default-*.json"))

    def key(self, cell: str, seed: int) -> dict[str, Any]:
        """What a cell's numbers depend on."""
        students = [self.student_key(row, seed) for row in dict.fromkeys(("default", row_of(cell)))]
        return {"code": CODE, "students": students}

    def exported(self, row: str, seed: int) -> tuple[Path, Exports]:
        """(checkpoint, its float32 graphs), exported once."""
        checkpoint = self.checkpoint(row, seed)
        folder = self.out / "quantization" / "onnx" / checkpoint.parent.name
        paths = folder / "model.onnx", folder / "fused" / "model.onnx"
        if not paths[1].exists():
            export_fused(checkpoint, export_onnx(checkpoint, folder), paths[1].parent)
        facts = facts_of_checkpoint(checkpoint)
        return checkpoint, Exports(*(ExportedGraph(path, describe_graph(path), facts) for path in paths))

    def graph(self, cell: str, seed: int) -> ExportedGraph:
        """The file of a cell."""
        checkpoint, exports = self.exported(row_of(cell), seed)
        picked = spread(self.corpus.training, CALIBRATION_WINDOWS)
        calibration = self.corpus.training.token_ids[picked].astype(np.int64)
        path = exports.fused.path.parent / cell.replace(" ", "-") / "model.onnx"
        try:
            return write_alternative(alternative(cell), checkpoint, exports, calibration, path)
        except BadInput as error:
            raise SystemExit(f"{error}, or run the ablation of rows_quantized.yaml") from error


def alternative(cell: str) -> Alternative:
    """`int4 gptq` in words of the export."""
    if cell == "float":
        return unchanged()
    words: dict[str, Any] = dict(zip(("weights", "method"), cell.split(), strict=True))
    method = words["method"]
    if method == "trained":
        words["method"] = "nearest"
    return Alternative(PrecisionSpec(**words), method)


def row_of(cell: str) -> str:
    """The row of the ablation whose student a cell ships."""
    return cell if cell.endswith("trained") else "default"


def judge(study: Study, cell: str, seed: int, threads: int) -> dict[str, Any]:
    """One cell: sums per window, sizes."""
    exported = study.graph(cell, seed)
    plain = open_graph(study.exported("default", seed)[1].fused, threads)
    nll, kl = judge_windows(open_graph(exported, threads), plain, study.part, study.windows)
    tokenizer = study.checkpoint(row_of(cell), seed) / "tokenizer.json"
    found = {
        "nll": nll,
        "kl": kl,
        "graph_bytes": graph_bytes(exported.path),
        "tokenizer_bytes": tokenizer.stat().st_size,
    }
    return {"cell": cell, "seed": seed, "part": study.name, "key": study.key(cell, seed), **found}


def speeds_of(study: Study, cells: Sequence[str], seed: int, threads: int) -> dict[str, float]:
    """Decode speed of each cell's file. Kept, like the cells."""
    file = study.out / "quantization" / "speeds.json"
    key = {"cells": {cell: study.key(cell, seed) for cell in cells}, "threads": threads}
    if (kept := stored(file, key)) is not None:
        return dict(kept["tokens_per_s"])
    prompt = study.part.token_ids[study.windows[0]].astype(np.int64)
    speeds = decode_speeds({cell: study.graph(cell, seed) for cell in cells}, prompt, threads)
    write_json(file, {"key": key, "tokens_per_s": speeds})
    return speeds


def stored(file: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run left of the same students."""
    found = json.loads(file.read_text()) if file.exists() else {}
    return found if found.get("key") == key else None


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for people."""

    def apart(value: float | None, error: float | None, form: str) -> str:
        if value is None:
            return ""
        return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form.lstrip('+')}}"

    lines = [
        "| | perplexity | over float, nats per token | KL to float, nats | graph, MiB | bundle, MiB | decode, tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cell = {"float": "float32"}.get(row["cell"], row["cell"].replace(" ", ", "))
        words = [
            cell.replace("nearest", "rounded").replace("gptq", "GPTQ").replace("hqq", "HQQ"),
            apart(row["perplexity"], row["perplexity_standard_error"], ".2f"),
            apart(row["over_float_nats"], row["standard_error"], "+.4f"),
            apart(row["kl_nats"], row["kl_standard_error"], ".4f"),
            f"{row['graph_mib']:.2f}",
            f"{row['bundle_mib']:.2f}",
            f"{row['decode_tokens_per_s']:,.0f}",
        ]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Cells, table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder that the ablation wrote")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=512, help="windows that are judged, the same of each domain")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS, metavar="CELL", help="these only")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    (folder,) = (arguments.out / "work").glob("corpus-*")
    corpus = open_corpus(folder)
    name = "held_out" if arguments.held_out else "validation"
    part = corpus.held_out if arguments.held_out else corpus.validation
    study = Study(arguments.out, corpus, part, name, spread(part, arguments.windows))
    seeds = study.seeds()[: arguments.seeds]
    if len(seeds) < arguments.seeds:
        raise SystemExit(
            f"{arguments.out}: has students of {len(seeds)} seeds, not of {arguments.seeds}; lower --seeds"
        )
    chosen = list(dict.fromkeys(("float", *arguments.cells)))
    cells: dict[str, dict[int, Judged]] = {cell: {} for cell in chosen}
    for seed in seeds:
        for cell in chosen:
            file = arguments.out / "quantization" / f"{name}-{len(study.windows)}-{cell.replace(' ', '-')}-{seed}.json"
            kept = stored(file, study.key(cell, seed))
            if kept is None:
                kept = judge(study, cell, seed, arguments.threads)
                write_json(file, kept)
            cells[cell][seed] = Judged(*(kept[what] for what in ("nll", "kl", "graph_bytes", "tokenizer_bytes")))
    rows = table(part, study.windows, cells, speeds_of(study, chosen, seeds[0], arguments.threads))
    shown = markdown(rows)
    print(shown)
    if arguments.json:
        facts = {"part": name, "windows": len(study.windows), "seeds": list(seeds), "rows": rows}
        write_json(arguments.json, {**facts, "environment": software()})
        arguments.json.with_suffix(".md").write_text(shown, encoding="utf-8")


if __name__ == "__main__":
    main()
