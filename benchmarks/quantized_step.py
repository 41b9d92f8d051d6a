"""A training step with weights on a grid against the plain step: tokens per second.

    python benchmarks/quantized_step.py                     # a student of 3.3 M parameters, minutes
    python benchmarks/quantized_step.py --rounds 20 --json FILE

Both sides are the loop that `edgestill build` runs, on cross-entropy alone (teachers would hide the cost), in processes of their
own that take turns of 20 steps. No accumulation: every step rounds all weights anew. The first turns are warm-up.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from cached_step import WARM_UP, Size, train_in_turns
from transformers import AutoModelForCausalLM
from turns import alternate, measured, software, summary, write_json

from edgestill.compress.distill_module import DistillModule
from edgestill.compress.fused_head import OutputLoss
from edgestill.compress.quantize.fake_quant import FakeQuant
from edgestill.compress.teachers import best_device
from edgestill.compress.trainer import autocast_bfloat16
from edgestill.profiles.quantize_words import Scheme
from edgestill.profiles.schema import QuantizeSpec, TrainSpec

RESULT = Path(__file__).parent / "results" / "quantized_step.json"
PLAIN = "float"
SIDES = (PLAIN, *get_args(Scheme))
AT_MOST = {"cpu": 1.10, "cuda": 1.03}


def module_of(side: str, size: Size, spec: TrainSpec) -> DistillModule:
    """A student that learns on the grid `side`, or in float."""
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(size.config(**size.student)).to(best_device())
    dtype = torch.bfloat16 if autocast_bfloat16(spec, best_device()) else torch.float32
    grid = FakeQuant(QuantizeSpec.model_validate({"scheme": side}), student) if side != PLAIN else None
    return DistillModule(
        student, None, OutputLoss(weight=0.0, cross_entropy=1.0, matmul_dtype=dtype), 1, quantization=grid
    )


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """All sides."""
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        words = ("--size", json.dumps(asdict(size)), "--folder", folder, "--turns", str(WARM_UP + rounds))
        script = str(Path(__file__).resolve())
        found = alternate({side: (script, "--side", side, *words) for side in SIDES}, warm_up=WARM_UP, rounds=rounds)
    speeds = {side: [turn["tokens_per_s"] for turn in turns] for side, turns in found.items()}
    costs = {side: [p / q for p, q in zip(speeds[PLAIN], speeds[side], strict=True)] for side in SIDES[1:]}
    limit = AT_MOST[best_device().type]
    return {
        "tokens_per_s": {side: summary(values) for side, values in speeds.items()},
        "cost": {side: summary(values) for side, values in costs.items()},
        "at_most": limit,
        "holds": {side: statistics.median(values) <= limit for side, values in costs.items()},
    }


def main() -> None:
    """Table and JSON."""
    arguments = measured(__doc__, RESULT, SIDES).parse_args()
    size, side = Size(**arguments.size), arguments.side
    if side:
        train_in_turns(lambda spec: module_of(side, size, spec), arguments.folder / side, size, arguments.turns, ())
        return
    before = software()
    result = measure(size, arguments.rounds)
    for name, speed in result["tokens_per_s"].items():
        print(f"{name:8} {speed['median']:9.1f} tokens/s ({speed['min']:.1f} to {speed['max']:.1f})")
    for name, cost in result["cost"].items():
        verdict = "holds" if result["holds"][name] else "MISSED"
        print(f"{name:8} costs {cost['median']:.3f} of the plain step (at most {result['at_most']}) {verdict}")
    facts = {"size": asdict(size), "warm_up_turns": WARM_UP, **result, "environment": before}
    write_json(arguments.json, {**facts, "conditions_after": software()["start"]})
    print(arguments.json)


if __name__ == "__main__":
    main()
