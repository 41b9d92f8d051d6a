"""The output loss of several teachers: ours against plain torch and against a call per teacher, in memory and in time.

    python benchmarks/fused_loss.py                        # 8 x 256 tokens, vocabulary 49,152; minutes
    python benchmarks/fused_loss.py --rounds 9 --json FILE

Student width 512, three teachers of width 768, forward KL to their mixture with entropy weights per sequence, as
shipped, + 0.2 cross-entropy. Every side is a process of its own and takes turns with the others (turns.py):

    ours_3       one call, three teachers
    ours_1       one call, one teacher
    ours_3x1     three calls of one teacher each, their gradients added: what a loss for one teacher would cost
    dense_3      plain torch over [n, V] tensors (dense_reference.py)
    ours_1_jsd   on a GPU with liger-kernel: JSD(0.5) + 0.2 cross-entropy, one teacher
    liger_1_jsd  the same by liger-kernel's LigerFusedLinearJSDLoss

Peak memory is what the process needs above its inputs (which exist and were written before), gradients included, over all its
turns. Products run in float32, or in bfloat16 with the student's head in float32 and the teachers in bfloat16, as in training.
The sides' losses and gradient norms stand in the JSON: they must agree.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dense_reference import dense_loss
from replies import Replies
from torch import Tensor
from turns import PeakMemory, alternate, software, summary, write_json

from edgestill.compress.fused_head import OutputLoss, output_loss
from edgestill.compress.fusion import WeightRule
from edgestill.compress.rows import full_rows
from edgestill.compress.targets import OnlineTarget, TeacherRows
from edgestill.profiles.schema import FusionSpec, LossesSpec

RESULT = Path(__file__).parent / "results" / "fused_loss.json"
SIDES = ("ours_3", "ours_1", "ours_3x1", "dense_3")
BARS = (
    ("memory", "ours_3", "dense_3", 0.25),
    ("memory", "ours_3", "ours_1", 1.05),
    ("seconds", "ours_3", "ours_3x1", 0.7),
    ("seconds", "ours_1_jsd", "liger_1_jsd", 1.0),
)
"""(what, side, divided by side, at most)."""
FUSION = FusionSpec(weights="entropy", granularity="sequence")
"""The rest as shipped."""
CROSS_ENTROPY = LossesSpec().cross_entropy
WARM_UP = 1


@dataclass(frozen=True)
class Size:
    """The setting that is measured."""

    windows: int = 8
    tokens: int = 256
    """Per window."""
    vocabulary: int = 49152
    student: int = 512
    teacher: int = 768
    teachers: int = 3
    precision: str = "float32"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


class Inputs:
    """Everything that exists before the loss; the same numbers in every process. Logits have a standard deviation of about 3."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size = size
        n = size.windows * size.tokens
        generator = torch.Generator(device).manual_seed(0)

        def draw(count: int, width: int, scale: float, dtype: torch.dtype) -> Tensor:
            return torch.randn(count, width, generator=generator, device=device, dtype=dtype).mul_(scale)

        self.hidden = draw(n, size.student, 1.0, torch.float32).requires_grad_()
        self.head = draw(size.vocabulary, size.student, 3 / size.student**0.5, torch.float32).requires_grad_()
        self.teachers = [
            (
                draw(n, size.teacher, 1.0, size.dtype),
                draw(size.vocabulary, size.teacher, (2.5 + 0.5 * k) / size.teacher**0.5, size.dtype),
            )
            for k in range(size.teachers)
        ]
        tokens = torch.randint(0, size.vocabulary, (size.windows, size.tokens + 1), generator=generator, device=device)
        self.rows = full_rows(tokens)

    def clear(self) -> None:
        """No gradients, as at the start of a step."""
        self.hidden.grad = self.head.grad = None


def ours(inputs: Inputs, which: list[int], divergence: str = "forward_kl") -> Tensor:
    """Loss of one call with these teachers; gradients are added to those of the inputs."""
    size = inputs.size
    rule = WeightRule.of(FUSION, [1.0] * len(which), size.vocabulary)
    target = OnlineTarget([TeacherRows(*inputs.teachers[k], None) for k in which], rule, inputs.rows)
    spec = OutputLoss(divergence, cross_entropy=CROSS_ENTROPY, matmul_dtype=size.dtype)
    normaliser = torch.tensor(float(inputs.hidden.shape[0]), device=inputs.hidden.device)
    loss, _ = output_loss(inputs.hidden, inputs.head, None, inputs.rows, target, normaliser, spec)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def dense(inputs: Inputs) -> Tensor:
    """The same in plain torch."""
    size = inputs.size
    loss = dense_loss(
        inputs.hidden,
        inputs.head,
        inputs.rows.labels,
        inputs.teachers,
        windows=size.windows,
        tau=FUSION.entropy_temperature,
        floor=FUSION.floor,
        cross_entropy=CROSS_ENTROPY,
        dtype=size.dtype,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def liger(inputs: Inputs) -> Callable[[], Tensor]:
    """liger-kernel's chunked JSD as it is used in training: heads in the products' precision, chunk body compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(weight_hard_loss=CROSS_ENTROPY, weight_soft_loss=1.0, beta=0.5)

    def step() -> Tensor:
        dtype = inputs.size.dtype
        hidden, head = inputs.hidden.to(dtype), inputs.head.to(dtype)
        loss: Tensor = function(hidden, head, *inputs.teachers[0], inputs.rows.labels, None, None)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def step_of(side: str, inputs: Inputs) -> Callable[[], Tensor]:
    """Forward and backward of one side; returns its loss."""
    everyone = list(range(inputs.size.teachers))
    steps: dict[str, Callable[[], Tensor]] = {
        "ours_3": lambda: ours(inputs, everyone),
        "ours_1": lambda: ours(inputs, [0]),
        "ours_3x1": lambda: torch.stack([ours(inputs, [k]) for k in everyone]).sum(),
        "dense_3": lambda: dense(inputs),
        "ours_1_jsd": lambda: ours(inputs, [0], "jsd"),
    }
    return liger(inputs) if side == "liger_1_jsd" else steps[side]


def work(side: str, size: Size) -> None:
    """One side in this process."""
    replies = Replies()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = Inputs(replace(size, windows=1, tokens=8, vocabulary=512), device)
    step_of(side, small)()  # code and thread pools are loaded before memory is counted
    del small
    inputs = Inputs(size, device)
    step = step_of(side, inputs)
    memory = PeakMemory(device.type == "cuda")

    def turn() -> dict[str, Any]:
        inputs.clear()
        _finish(device)
        started = time.perf_counter()
        loss = step()
        _finish(device)
        seconds = time.perf_counter() - started
        gradients = {name: _norm(value.grad) for name, value in (("hidden", inputs.hidden), ("head", inputs.head))}
        return {"seconds": seconds, "memory": memory.mib(), "loss": float(loss), "gradient_norm": gradients}

    replies.serve(turn)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _norm(gradient: Tensor | None) -> float:
    """In slices: it must not need memory of its own."""
    if gradient is None:
        return 0.0
    return float(torch.stack([part.double().square().sum() for part in gradient.split(1024)]).sum().sqrt())


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """All sides of one precision."""
    sides = list(SIDES)
    if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None:
        sides += ["ours_1_jsd", "liger_1_jsd"]
    script = str(Path(__file__).resolve())
    commands = {side: (script, "--side", side, "--size", json.dumps(asdict(size))) for side in sides}
    found = alternate(commands, warm_up=WARM_UP, rounds=rounds)
    rows = {}
    for side, turns in found.items():
        rows[side] = {
            "seconds": summary([t["seconds"] for t in turns]),
            "memory_mib": round(_peak(turns), 1),
            "loss": turns[-1]["loss"],
            "gradient_norm": turns[-1]["gradient_norm"],
        }
    return {"sides": rows, "bars": _bars(found)}


def _peak(turns: list[dict[str, Any]]) -> float:
    return float(max(t["memory"] for t in turns))


def _bars(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The ratios that are promised. Time: the median of the ratios within a round, since a slow minute hits both sides."""
    bars = []
    for what, side, other, limit in BARS:
        if side not in found or other not in found:
            continue
        ratios = [mine[what] / theirs[what] for mine, theirs in zip(found[side], found[other], strict=True)]
        ratio = statistics.median(ratios) if what == "seconds" else _peak(found[side]) / _peak(found[other])
        bars.append(
            {
                "what": what,
                "side": side,
                "over": other,
                "ratio": round(ratio, 4),
                "at_most": limit,
                "holds": ratio <= limit,
            }
        )
    return bars


def show(precision: str, result: dict[str, Any]) -> None:
    """A table on the terminal."""
    print(f"\nproducts in {precision}")
    print(f"{'side':12} {'seconds':>9} {'min':>8} {'max':>8} {'MiB above inputs':>17} {'loss':>10}")
    for side, row in result["sides"].items():
        s = row["seconds"]
        print(
            f"{side:12} {s['median']:9.3f} {s['min']:8.3f} {s['max']:8.3f} {row['memory_mib']:17.1f} {row['loss']:10.5f}"
        )
    for bar in result["bars"]:
        verdict = "holds" if bar["holds"] else "MISSED"
        print(f"{bar['what']:8} {bar['side']} / {bar['over']}: {bar['ratio']:.3f} (at most {bar['at_most']}) {verdict}")


def main() -> None:
    """Both precisions, one after the other; table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], action="append", help="default: both")
    parser.add_argument("--size", type=json.loads, default={}, help='JSON, for example {"vocabulary": 8192}')
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    size = Size(**arguments.size)
    if arguments.side:
        work(arguments.side, size)
        return
    results: dict[str, Any] = {"size": asdict(size), "warm_up_turns": WARM_UP, "environment": software()}
    del results["size"]["precision"]
    for precision in arguments.precision or ["float32", "bfloat16"]:
        results[precision] = measure(replace(size, precision=precision), arguments.rounds)
        show(precision, results[precision])
    results["conditions_after"] = software()["start"]
    write_json(arguments.json, results)
    print(f"\n{arguments.json}")


if __name__ == "__main__":
    main()
