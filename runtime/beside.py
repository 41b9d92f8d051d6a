"""The artifact beside its teachers: one row per model, quality, latency and memory on the same tokens and the same workload.

The teachers and the float student were measured in torch on the build machine, the artifact on this one; the rows say which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COLUMNS = ("perplexity", "first_token_ms_p50", "inter_token_ms_p50", "decode_tokens_per_s", "peak_rss_mib")
"""What is compared; names of metrics.py."""
ARTIFACT = "artifact"
FLOAT_STUDENT = "float student"


@dataclass(frozen=True)
class Row:
    """One model. values: in the order of COLUMNS, None where it was not measured."""

    name: str
    runs_on: str
    values: tuple[float | None, ...]


def rows_beside(report: Mapping[str, Any]) -> list[Row]:
    """Teachers, fused target, float student, artifact; empty when nothing stands beside the artifact."""
    perplexity = {row["name"]: row["values"][0] for row in (report.get("quality") or {}).get("rows", [])}
    speeds = {str(t.get("name")): t.get("torch") or {} for t in report.get("teachers") or []}
    speeds[FLOAT_STUDENT] = report.get("student_torch") or {}
    names = [*perplexity, *(name for name, speed in speeds.items() if speed and name not in perplexity)]
    rows = []
    for name in names:
        if name == ARTIFACT:
            continue
        speed = speeds.get(name, {})
        measured = (speed.get(column) for column in COLUMNS[1:])
        runs_on = f"torch, {speed['precision']}" if speed else "torch"
        rows.append(Row(name, runs_on, (perplexity.get(name), *(None if v is None else float(v) for v in measured))))
    checks = {row["name"]: row["value"] for row in report["checks"]}
    mine = tuple(checks.get(column) for column in COLUMNS)
    engine = report.get("engine") or {}
    runs_on = engine.get("fingerprint", {}).get("flavour", "no engine here") if engine else "onnxruntime"
    return [*rows, Row(ARTIFACT, runs_on, mine)] if rows else []
