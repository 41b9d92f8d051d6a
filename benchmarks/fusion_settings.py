"""How good is the fused target itself? Perplexity of every way to weight and mix a recipe's teachers, on validation text.

    python benchmarks/fusion_settings.py quickstart --json benchmarks/results/fusion_quickstart.json

No student is trained: this is how the recipe's fusion was chosen. `calibration` says what was fitted before entropies were
compared (compress/calibrate.py), on other windows than those that are judged. `alone` is each teacher by itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgestill.compress.calibrate import CalibrationAnswers, calibrate, calibration_windows, fit_offsets
from edgestill.compress.corpus import Corpus, Part, build_corpus, open_corpus
from edgestill.compress.fusion import WeightRule, entropy_of
from edgestill.compress.reference import choose_windows
from edgestill.compress.rows import Rows, chunks
from edgestill.compress.targets import OnlineTarget, TeacherRows
from edgestill.compress.teachers import Teacher, best_device, check_same_tokenizer, load_teacher, resolve_teachers
from edgestill.profiles.load import load_recipe
from edgestill.profiles.schema import FusionSpec
from edgestill.runtime.device import environment
from edgestill.runtime.progress import Progress, QuietProgress

TOKENS = 24_000
CALIBRATIONS: tuple[dict[str, Any], ...] = (
    {"calibrate": False},
    {"calibration": "temperature"},
    {"calibration": "offset"},
)
ROWS = 512


def settings() -> list[FusionSpec]:
    """The fusion of every row."""
    rows = [FusionSpec(weights="uniform", mix=mix) for mix in ("arithmetic", "geometric")]
    taus = (0.5, 0.1, 0.05, 0.02, 0.01, 0.005)
    for granularity, tau, calibration in itertools.product(("sequence", "ema", "token"), taus, CALIBRATIONS):
        rows.append(FusionSpec(granularity=granularity, entropy_temperature=tau, **calibration))
    rows += [
        FusionSpec(granularity="ema", ema_decay=decay, entropy_temperature=tau)
        for decay, tau in itertools.product((0.9, 0.95, 0.99), (0.05, 0.02, 0.01))
    ]
    rows += [
        FusionSpec(weights="label", granularity=granularity, label_temperature=tau, calibrate=False)
        for granularity, tau in itertools.product(("token", "sequence"), (2.0, 1.0, 0.5, 0.1))
    ]
    rows.append(FusionSpec(mix="geometric"))
    rows += [FusionSpec(floor=floor) for floor in (0.0, 0.05, 0.1)]
    return rows


@torch.no_grad()
def study(recipe: str) -> dict[str, Any]:
    """All rows, and what the teachers say alone."""
    loaded = load_recipe(recipe)
    facts = resolve_teachers(loaded.recipe.teachers, loaded.resolve)
    vocabulary = check_same_tokenizer(facts)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        build_corpus(loaded.recipe.data, loaded.resolve, facts[0].path, out, seed=0, progress=QuietProgress())
        corpus = open_corpus(out)
        teachers = [load_teacher(f, best_device()) for f in facts]
        return {"recipe": loaded.name, **_evaluate(corpus, teachers, vocabulary), "environment": environment()}


def _evaluate(corpus: Corpus, teachers: list[Teacher], vocabulary: int) -> dict[str, Any]:
    part, everyone = corpus.validation, range(len(teachers))
    fitted_on = calibration_windows(part)
    temperatures, evidence = _evidence(teachers, part, fitted_on)
    windows = np.setdiff1d(choose_windows(part, TOKENS), fitted_on)
    ids = torch.from_numpy(part.token_ids[windows].astype(np.int64)).to(best_device())
    rows = Rows.of(ids, torch.from_numpy(part.domain[windows].astype(np.int64)).to(ids.device))
    hidden = [torch.cat([t.hidden(b)[0][:, :-1].flatten(0, 1).float() for b in ids.split(8)]) for t in teachers]
    answers = [TeacherRows(hidden[k], t.head_weight.float(), t.head_bias) for k, t in enumerate(teachers)]
    seen = {1.0: Said(answers, rows)}
    seen |= {0.0: Said([replace(a, calibration=t) for a, t in zip(answers, temperatures, strict=True)], rows)}

    def perplexities(log_p: Tensor) -> dict[str, float]:
        masks = {"mixed": rows.domain >= 0, **{name: rows.domain == i for i, name in enumerate(corpus.domains)}}
        return {name: round(math.exp(-float(log_p[mask].double().mean())), 3) for name, mask in masks.items()}

    found = []
    for spec in settings():
        rule = WeightRule.of(spec, [1.0] * len(teachers), vocabulary)
        by = spec.calibration if spec.calibrate and spec.weights == "entropy" else None
        if by == "offset":
            rule = replace(rule, offsets=fit_offsets(rule, evidence, part, fitted_on))
        log_p = seen[0.0 if by == "temperature" else 1.0].fused(rule)
        found.append(
            {**spec.model_dump(), "calibration": by, "offsets": list(rule.offsets), "perplexity": perplexities(log_p)}
        )
    alone = {t.facts.name: perplexities(seen[1.0].label_log_p[k]) for k, t in zip(everyone, teachers, strict=True)}
    return {"tokens": int(ids.numel()), "temperatures": temperatures, "alone": alone, "rows": found}


def _evidence(
    teachers: list[Teacher], part: Part, windows: npt.NDArray[np.int64]
) -> tuple[list[float], CalibrationAnswers]:
    """The fitted temperatures, and what offsets are fitted on."""
    temperatures, parts = [], []
    for teacher in teachers:
        with QuietProgress().task("", 1) as task:
            found, evidence = calibrate(teacher, part, windows, batch_size=8, task=task)
        temperatures.append(found.temperature)
        parts.append(evidence)
    return temperatures, CalibrationAnswers.joined(parts)


class Said:
    """The teachers' entropies and log-probabilities of the true tokens, float32 [K, n], from one pass over their logits.

    An arithmetic mix of the true tokens needs no more; a geometric one goes through the logits again.
    """

    def __init__(self, answers: list[TeacherRows], rows: Rows) -> None:
        self.answers, self.rows = answers, rows
        self.entropy = torch.zeros(len(answers), rows.labels.numel(), device=rows.labels.device)
        self.label_log_p = torch.zeros_like(self.entropy)
        for chunk in chunks(rows.lengths, ROWS):
            for k, answer in enumerate(answers):
                logits = answer.logits(chunk)
                log_p = torch.log_softmax(logits / answer.calibration, -1)
                self.entropy[k, chunk] = entropy_of(log_p)
                picked = logits.gather(1, rows.labels[chunk, None]).squeeze(1)
                self.label_log_p[k, chunk] = picked - logits.logsumexp(-1)

    def fused(self, rule: WeightRule) -> Tensor:
        """log p of the true tokens under the fused target, float32 [n]."""
        if not rule.geometric:
            weights = rule.weights(self.entropy, self.label_log_p, self.rows.sequence, self.rows.domain)
            return torch.logsumexp(weights.log() + self.label_log_p, 0)
        target, picked = OnlineTarget(self.answers, rule, self.rows), []
        for chunk in chunks(self.rows.lengths, ROWS):
            picked.append(target.chunk(chunk).log_p.gather(1, self.rows.labels[chunk, None]).squeeze(1))
        return torch.cat(picked)


def tau_of(row: dict[str, Any]) -> float:
    """The temperature that a row's weights use."""
    return float(row["label_temperature" if row["weights"] == "label" else "entropy_temperature"])


def main() -> None:
    """Print the rows, best last, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    progress = Progress()
    progress.say(f"{arguments.recipe}: {len(settings())} ways to fuse")
    result = study(arguments.recipe)
    for row in sorted(result["rows"], key=lambda r: -r["perplexity"]["mixed"]):
        words = f"{row['weights']} {row['granularity']} tau {tau_of(row)} floor {row['floor']} {row['mix']}" + (
            f" decay {row['ema_decay']}" if row["granularity"] == "ema" else ""
        )
        print(f"{words:60} {row['calibration'] or '':12} {row['perplexity']}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
