"""Two bundles and the teachers on the same held-out tokens, paired: is the first better, and by how many standard errors?

    edgestill build quickstart    --profile cpu-x86
    edgestill build quickstart-ce --profile cpu-x86
    python benchmarks/compare_bundles.py build/quickstart/cpu-x86 build/quickstart-ce/cpu-x86 --json FILE

Both bundles are scored from their shipped graph through the cached one-token path. Both must carry the same held-out tokens.
Differences are mean log-likelihoods per token in nats (positive: the first bundle is better) with standard errors over
blocks of windows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgestill.runtime import load
from edgestill.runtime.bundle import read_manifest
from edgestill.runtime.device import environment
from edgestill.runtime.quality import score_windows
from edgestill.runtime.reference import FOLDER, Reference, load_reference
from edgestill.runtime.statistics import block_mean

F64 = npt.NDArray[np.float64]


def label_logp(bundle: Path, reference: Reference) -> F64:
    """float64 [n]: what the shipped graph of `bundle` says of every held-out token."""
    model = load(bundle)
    none = np.zeros((0, 2), np.int32)
    return score_windows(model, reference, "cached", none, model.facts.vocab_size).label_logp


def paired(ours: F64, theirs: F64, blocks: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Mean difference in nats per token, its standard error, and their ratio."""
    difference = block_mean(ours - theirs, blocks)
    assert difference.value is not None and difference.standard_error is not None
    return {
        "nats_per_token": round(difference.value, 5),
        "standard_error": round(difference.standard_error, 5),
        "standard_errors": round(difference.value / difference.standard_error, 2),
        "n": difference.n,
    }


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Everything, per domain and on all tokens."""
    reference = load_reference(first / FOLDER)
    other = load_reference(second / FOLDER)
    if not np.array_equal(reference.token_ids, other.token_ids):
        raise SystemExit(f"{first} and {second} carry different held-out tokens; build them from the same corpus")
    logp = {"first": label_logp(first, reference), "second": label_logp(second, reference)}
    for i, name in enumerate(reference.teacher_names):
        logp[f"teacher {name}"] = reference.teacher_label_logp[i].astype(np.float64)
    if reference.fused is not None:
        logp["fused teachers"] = reference.fused.label_logp.astype(np.float64)
    blocks = np.asarray(reference.per_answer(reference.block)).astype(np.int64)
    domain = np.asarray(reference.per_answer(reference.domain))
    scored = reference.scored.astype(bool)
    rows = {}
    for name, mask in {"mixed": scored, **{d: scored & (domain == i) for i, d in enumerate(reference.domains)}}.items():
        rows[name] = {
            "perplexity": {who: round(float(np.exp(-x[mask].mean())), 3) for who, x in logp.items()},
            "first_over": {
                who: paired(logp["first"][mask], x[mask], blocks[mask]) for who, x in logp.items() if who != "first"
            },
        }
    return {
        "first": read_manifest(first).name,
        "second": read_manifest(second).name,
        "domains": rows,
        "environment": environment(),
    }


def main() -> None:
    """Print the comparison and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = compare(arguments.first, arguments.second)
    for domain, row in result["domains"].items():
        for who, perplexity in row["perplexity"].items():
            gain = row["first_over"].get(who)
            beside = (
                f"first better by {gain['nats_per_token']:+.4f} ± {gain['standard_error']:.4f} nats" if gain else ""
            )
            print(f"{domain:8} {who:16} perplexity {perplexity:9.2f}  {beside}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
