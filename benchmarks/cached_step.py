"""A training step with two cached teachers against plain cross-entropy in the same loop: tokens per second.

    python benchmarks/cached_step.py                     # a student of 3.3 M parameters, minutes
    python benchmarks/cached_step.py --rounds 20 --json FILE

Both sides are the loop that `edgestill build` runs (`train` of compress/trainer.py: Trainer, AdamW, log, autocast), each in a
process of its own; they take turns (turns.py) of 20 steps. The cached side reads k = 64 answers of two teachers from disk, fuses
them with the shipped weights and learns 1.0 x forward KL + 0.2 x cross-entropy; the other has no teachers. No accumulation.
Tokens and teachers are random and seeded: a step's cost does not depend on what the text says. The first turns are warm-up.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from replies import Replies
from transformers import AutoConfig, AutoModelForCausalLM
from turns import alternate, measured, software, summary, write_json

from edgestill.compress.cache_capture import capture
from edgestill.compress.corpus import Part
from edgestill.compress.distill_module import DistillModule
from edgestill.compress.fused_head import OutputLoss
from edgestill.compress.fusion import WeightRule
from edgestill.compress.lessons import TeachersRemembered
from edgestill.compress.teacher_cache import open_cache
from edgestill.compress.teachers import Teacher, TeacherFacts, best_device
from edgestill.compress.trainer import autocast_bfloat16, train
from edgestill.compress.windows import OrderedWindows
from edgestill.profiles.schema import FusionSpec, LossesSpec, TrainSpec
from edgestill.runtime.progress import QuietProgress, Task

RESULT = Path(__file__).parent / "results" / "cached_step.json"
SIDES = ("cached", "cross_entropy")
AT_LEAST = 0.9
TEACHERS = {"narrow": 96, "wide": 128}
"""Name -> width. What answered once does not matter afterwards, so they are small."""
WARM_UP = 1


@dataclass(frozen=True)
class Size:
    """The setting that is measured."""

    batch: int = 8
    tokens: int = 256
    """Per window."""
    vocabulary: int = 8192
    top_k: int = 64
    windows: int = 320
    """In the corpus; a run goes through it several times."""
    steps: int = 20
    """Per turn; whole log intervals."""
    student: dict[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "intermediate_size": 512,
        }
    )

    def config(self, **fields: int) -> Any:
        """A Llama with tied embeddings."""
        return AutoConfig.for_model(
            "llama",
            vocab_size=self.vocabulary,
            max_position_embeddings=self.tokens,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            **fields,
        )


def corpus(size: Size) -> Part:
    """Random windows; frequent tokens are frequent, as in text."""
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.2, (size.windows, size.tokens)) - 1, size.vocabulary - 1)
    zeros = np.zeros(size.windows, np.int16)
    return Part(
        ids.astype(np.uint16 if size.vocabulary <= 1 << 16 else np.uint32),
        None,
        zeros,
        np.arange(size.windows, dtype=np.int32),
        zeros,
    )


def random_teacher(name: str, width: int, size: Size) -> Teacher:
    """Random weights, three times the usual size so that its distributions are not flat."""
    torch.manual_seed(width)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 2 * width}
    model = AutoModelForCausalLM.from_config(size.config(hidden_size=width, num_hidden_layers=1, **heads))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3.0)
    facts = TeacherFacts(
        name=name,
        path=Path(name),
        revision=None,
        weights_sha256=name,
        model_type="llama",
        parameters=sum(p.numel() for p in model.parameters()),
        hidden_size=width,
        n_layers=1,
        vocab_size=size.vocabulary,
        head_width=size.vocabulary,
        precision="float32",
        memory_bytes=0,
    )
    return Teacher(facts, model.to(best_device()))


def prepare(folder: Path, size: Size) -> None:
    """Both teachers' answers on the whole corpus."""
    part = corpus(size)
    for name, width in TEACHERS.items():
        capture(
            random_teacher(name, width, size),
            part,
            np.arange(size.windows),
            folder / name,
            size=size.top_k,
            batch_size=size.batch,
            corpus_sha256="random",
            progress=QuietProgress(),
        )


def module_of(side: str, folder: Path, size: Size, spec: TrainSpec) -> DistillModule:
    """What `edgestill build` would train, with or without teachers."""
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(size.config(**size.student)).to(best_device())
    dtype = torch.bfloat16 if autocast_bfloat16(spec, best_device()) else torch.float32
    if side == "cross_entropy":
        return DistillModule(student, None, OutputLoss(weight=0.0, cross_entropy=1.0, matmul_dtype=dtype), 1)
    caches = [open_cache(folder / name, teacher_sha256=name, corpus_sha256="random") for name in TEACHERS]
    rule = WeightRule.of(FusionSpec(), [1.0] * len(caches), size.vocabulary)
    source = TeachersRemembered(tuple(TEACHERS), caches, rule, size.vocabulary, calibrated=True)
    losses = LossesSpec()
    output = OutputLoss(losses.output.divergence, cross_entropy=losses.cross_entropy, matmul_dtype=dtype)
    return DistillModule(student, source, output, 1)


class Turns:
    """Stands where the progress of a training run stands: after every turn's steps it reports and waits for the next."""

    def __init__(self, replies: Replies, tokens: int) -> None:
        self.replies, self.tokens = replies, tokens
        self.done = 0
        replies.say({"ready": True})
        replies.wait()
        self.started = time.perf_counter()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """`amount` more tokens were learnt."""
        self.done += round(amount)
        if self.done < self.tokens:
            return
        seconds = time.perf_counter() - self.started
        self.replies.say({"tokens_per_s": self.done / seconds, "note": note})
        self.done = 0
        self.replies.wait()
        self.started = time.perf_counter()


def train_in_turns(
    make: Callable[[TrainSpec], DistillModule], run: Path, size: Size, turns: int, teachers: tuple[str, ...]
) -> None:
    """What `make` makes, in the loop that `edgestill build` runs, `size.steps` steps a turn."""
    replies = Replies()
    steps = turns * size.steps
    spec = TrainSpec(tokens=steps * size.batch * size.tokens, batch_size=size.batch, checkpoint_every_steps=steps)
    module = make(spec)
    epochs = range(-(-steps * size.batch // size.windows))
    order = np.concatenate([np.random.default_rng(epoch).permutation(size.windows) for epoch in epochs])
    run.mkdir()
    task = cast(Task, Turns(replies, size.steps * size.batch * size.tokens))
    data = OrderedWindows(corpus(size), order[: steps * size.batch])
    train(module, data, spec, run, task, names={"teachers": teachers, "domains": ("text",)})


def work(side: str, folder: Path, size: Size, turns: int) -> None:
    """One side in this process."""
    teachers = tuple(TEACHERS) if side == "cached" else ()
    train_in_turns(lambda spec: module_of(side, folder, size, spec), folder / side, size, turns, teachers)


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """Both sides."""
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        prepare(Path(folder), size)
        words = ("--size", json.dumps(asdict(size)), "--folder", folder, "--turns", str(WARM_UP + rounds))
        script = str(Path(__file__).resolve())
        found = alternate({side: (script, "--side", side, *words) for side in SIDES}, warm_up=WARM_UP, rounds=rounds)
    speeds = {side: [turn["tokens_per_s"] for turn in turns] for side, turns in found.items()}
    ratios = [mine / plain for mine, plain in zip(*(speeds[side] for side in SIDES), strict=True)]
    return {
        "tokens_per_s": {side: summary(values) for side, values in speeds.items()},
        "last": {side: turns[-1]["note"] for side, turns in found.items()},
        "ratio": summary(ratios),
        "at_least": AT_LEAST,
        "holds": statistics.median(ratios) >= AT_LEAST,
    }


def main() -> None:
    """Table and JSON."""
    arguments = measured(__doc__, RESULT, SIDES).parse_args()
    size = Size(**arguments.size)
    if arguments.side:
        work(arguments.side, arguments.folder, size, arguments.turns)
        return
    before = software()
    result = measure(size, arguments.rounds)
    for side, speed in result["tokens_per_s"].items():
        print(f"{side:14} {speed['median']:9.1f} tokens/s ({speed['min']:.1f} to {speed['max']:.1f})")
    verdict = "holds" if result["holds"] else "MISSED"
    print(f"cached / cross_entropy: {result['ratio']['median']:.3f} (at least {AT_LEAST}) {verdict}")
    facts = {"size": asdict(size), "warm_up_turns": WARM_UP, **result, "environment": before}
    write_json(arguments.json, {**facts, "conditions_after": software()["start"]})
    print(arguments.json)


if __name__ == "__main__":
    main()
