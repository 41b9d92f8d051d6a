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
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from turns import software, write_json

from edgestill.compress.ablate_statistics import Scores, difference, perplexity
from edgestill.compress.corpus import Corpus, open_corpus
from edgestill.compress.packing import Part, spread
from edgestill.export.graph_io import copy_graph
from edgestill.export.input_moments import window_feeds
from edgestill.export.model_facts import facts_of_checkpoint
from edgestill.export.onnx_export import ExportedGraph, Exports, describe_graph, export_fused, export_onnx
from edgestill.export.post_training import matrices, quantize_weights
from edgestill.export.quantize import ByValues, digest_of, graph_bytes, quantize_graph
from edgestill.export.rewrite.rules import join_weights
from edgestill.export.trained import trained_weights
from edgestill.profiles.schema import PrecisionSpec
from edgestill.runtime.backends.ort import OrtBackend

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
CODE = 2
"""Revision of what a cell computes; raise it when the same student would get other numbers."""
CALIBRATION_WINDOWS = 64
PROMPT, NEW, RUNS = 128, 64, 15


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

    def counted(self, window: int) -> npt.NDArray[np.bool_]:
        """bool [T - 1]: labels of a window that count."""
        if self.part.loss_mask is None:
            return np.ones(self.part.token_ids.shape[1] - 1, bool)
        return np.asarray(self.part.loss_mask[window, 1:] != 0)

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

    def graph(self, cell: str, seed: int) -> tuple[Path, ExportedGraph]:
        """(the file of a cell, the float32 graph it comes from)."""
        row = row_of(cell)
        checkpoint, exports = self.exported(row, seed)
        plain, fused = exports.plain, exports.fused
        if cell == "float":
            path = fused.path.parent / "float" / "model.onnx"
            copy_graph(fused.path, path)
            join_weights(path)
            return path, fused
        scheme, method = cell.split()
        words: dict[str, Any] = {"weights": scheme, "method": method if method in ("gptq", "hqq") else "nearest"}
        precision = PrecisionSpec(**words)
        path = fused.path.parent / cell.replace(" ", "-") / "model.onnx"
        given = trained_weights(checkpoint, precision) if method == "trained" else None
        if method == "trained" and given is None:
            raise SystemExit(f"{checkpoint}: was not trained on {scheme}; run the ablation of rows_quantized.yaml")
        if precision.method != "nearest":
            picked = spread(self.corpus.training, CALIBRATION_WINDOWS)
            ids = self.corpus.training.token_ids[picked].astype(np.int64)
            feeds = list(window_feeds(plain.graph, ids))
            blocks, found = quantize_weights(plain.path, precision, precision.method, feeds), matrices(plain.path)
            given = ByValues({digest_of(found[name]): block for name, block in blocks.items()})
        quantize_graph(fused.path, path, precision, given=given)
        join_weights(path)
        return path, fused


def row_of(cell: str) -> str:
    """The row of the ablation whose student a cell ships."""
    return cell if cell.endswith("trained") else "default"


def backend_of(path: Path, exported: ExportedGraph, threads: int) -> OrtBackend:
    return OrtBackend(path, exported.facts, exported.graph, threads=threads)


def judge(study: Study, cell: str, seed: int, threads: int) -> dict[str, Any]:
    """One cell: sums per window, size."""
    path, exported = study.graph(cell, seed)
    ours = backend_of(path, exported, threads)
    plain = backend_of(study.exported("default", seed)[1].fused.path, exported, threads)
    nll, divergence = [], []
    for window in study.windows:
        ids = study.part.token_ids[window].astype(np.int64)
        log_q, log_p = (log_softmax(b, ids) for b in (ours, plain))
        rows = study.counted(window).nonzero()[0]
        nll.append(-float(log_q[rows, ids[rows + 1]].sum()))
        divergence.append(float((np.exp(log_p[rows]) * (log_p[rows] - log_q[rows])).sum()))
    return {
        "cell": cell,
        "seed": seed,
        "part": study.name,
        "key": study.key(cell, seed),
        "nll": nll,
        "kl": divergence,
        "bytes": graph_bytes(path),
        "tokenizer_bytes": (study.checkpoint(row_of(cell), seed) / "tokenizer.json").stat().st_size,
    }


def log_softmax(backend: OrtBackend, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """float64 [T - 1, V] of the predictions of all but the first token."""
    logits = backend.step(backend.new_state(1, len(ids)), ids[None, :])[0, :-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.asarray(logits)


def decode_speeds(study: Study, cells: Sequence[str], seed: int, threads: int) -> dict[str, float]:
    """Median tokens per second of each cell's file; the files take turns. Kept, like the cells."""
    file = study.out / "quantization" / "speeds.json"
    key = {"cells": {cell: study.key(cell, seed) for cell in cells}, "threads": threads}
    if (kept := stored(file, key)) is not None:
        return dict(kept["tokens_per_s"])
    prompt = study.part.token_ids[study.windows[0]][:PROMPT].astype(np.int64)[None]
    backends = {cell: backend_of(*study.graph(cell, seed), threads) for cell in cells}
    found: dict[str, list[float]] = {cell: [] for cell in cells}
    for _ in range(RUNS + 1):
        for cell, backend in backends.items():
            state = backend.new_state(1, prompt.shape[1] + NEW)
            token = backend.step(state, prompt)[0, -1].argmax()
            started = time.perf_counter()
            for _ in range(NEW - 1):
                token = backend.step(state, np.array([[token]], np.int64))[0, -1].argmax()
            found[cell].append((NEW - 1) / (time.perf_counter() - started))
    speeds = {cell: round(statistics.median(values[1:]), 1) for cell, values in found.items()}
    write_json(file, {"key": key, "tokens_per_s": speeds})
    return speeds


def stored(file: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run left of the same students."""
    found = json.loads(file.read_text()) if file.exists() else {}
    return found if found.get("key") == key else None


def table(
    study: Study, cells: dict[tuple[str, int], dict[str, Any]], seeds: Sequence[int], speeds: dict[str, float]
) -> list[dict[str, Any]]:
    """One row per cell."""
    part, picked = study.part, study.windows
    tokens = np.array([int(study.counted(window).sum()) for window in picked])
    domains = sorted({int(d) for d in part.domain[picked]})

    def scores(cell: str, what: str) -> Scores:
        values = np.array([cells[cell, seed][what] for seed in seeds])
        return Scores(tuple(seeds), values, tokens, part.domain[picked], part.block[picked])

    floats = scores("float", "nll")
    nothing = dataclasses.replace(floats, nll=np.zeros_like(floats.nll))
    rows = []
    for cell in dict.fromkeys(cell for cell, _ in cells):
        reached = perplexity(scores(cell, "nll"), domains)
        one = cells[cell, seeds[0]]
        over = difference(scores(cell, "nll"), floats, domains) if cell != "float" else None
        kl = difference(scores(cell, "kl"), nothing, domains) if cell != "float" else None
        rows.append(
            {
                "cell": cell,
                "perplexity": round(reached.value, 3),
                "perplexity_standard_error": rounded(reached.standard_error, 3),
                "over_float_nats": rounded(over and over.nats, 5),
                "standard_error": rounded(over and over.standard_error, 5),
                "kl_nats": 0.0 if kl is None else round(kl.nats, 6),
                "kl_standard_error": rounded(kl and kl.standard_error, 6),
                "graph_mib": round(one["bytes"] / 2**20, 3),
                "bundle_mib": round((one["bytes"] + one["tokenizer_bytes"]) / 2**20, 3),
                "decode_tokens_per_s": speeds[cell],
            }
        )
    return rows


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


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
    cells = {}
    for seed in seeds:
        for cell in chosen:
            file = arguments.out / "quantization" / f"{name}-{len(study.windows)}-{cell.replace(' ', '-')}-{seed}.json"
            kept = stored(file, study.key(cell, seed))
            if kept is None:
                kept = judge(study, cell, seed, arguments.threads)
                write_json(file, kept)
            cells[cell, seed] = kept
    rows = table(study, cells, seeds, decode_speeds(study, chosen, seeds[0], arguments.threads))
    shown = markdown(rows)
    print(shown)
    if arguments.json:
        facts = {"part": name, "windows": len(study.windows), "seeds": list(seeds), "rows": rows}
        write_json(arguments.json, {**facts, "environment": software()})
        arguments.json.with_suffix(".md").write_text(shown, encoding="utf-8")


if __name__ == "__main__":
    main()
