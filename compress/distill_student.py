"""Stage 5 of the story: the student learns, and is left as a normal checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel

from edgestill.compress.distill_module import DistillModule, TeachersAtWork, TeacherSource, TeachersRemembered
from edgestill.compress.features import FeatureLoss
from edgestill.compress.fused_head import OutputLoss
from edgestill.compress.reference import choose_windows, perplexity
from edgestill.compress.setting import Setting
from edgestill.compress.stages import Stage
from edgestill.compress.student import count_parameters, make_student
from edgestill.compress.teacher_cache import open_cache
from edgestill.compress.teachers import load_teacher
from edgestill.compress.trainer import LOG, OrderedWindows, autocast_bfloat16, train
from edgestill.runtime.files import write_atomically

CODE = 1
"""Revision of what this stage computes; raise it when the same inputs would give another student."""
VALIDATION_TOKENS = 16384


def student_of(at: Setting, calibrations: Sequence[float], caches: list[Path] | None) -> Stage:
    """The student checkpoint (`student/`), `distill_state.safetensors` and training.jsonl."""
    recipe = at.recipe
    words = recipe.train.model_dump(mode="json", exclude={"checkpoint_every_steps", "teacher_cache", "cache_top_k"})
    inputs: dict[str, Any] = {
        "student": recipe.student.model_dump(mode="json"),
        "losses": recipe.losses.model_dump(mode="json"),
        "train": words,
        "corpus": at.corpus_key,
        "tokenizer": at.teachers[0].weights_sha256,
        "code": CODE,
    }
    if at.listens:
        inputs |= {
            "teachers": at.teacher_hashes(),
            **at.fusion_words(),
            "calibration": list(calibrations),
            "caches": [c.name for c in caches] if caches else None,
        }
    return at.space.stage(
        "train", "train: the student", inputs, lambda folder: _train_into(at, folder, calibrations, caches)
    )


def _train_into(at: Setting, folder: Path, calibrations: Sequence[float], caches: list[Path] | None) -> dict[str, Any]:
    """Everything but the last rename; a run that was killed while it tidied up is not trained again."""
    run, result = folder / "run", folder / "result.json"
    if not result.exists():
        info = _train_in(run, at, folder, calibrations, caches)
        write_atomically(result, json.dumps(info).encode())
    shutil.rmtree(run, ignore_errors=True)
    return dict(json.loads(result.read_text(encoding="utf-8")))


def _train_in(
    run: Path, at: Setting, folder: Path, calibrations: Sequence[float], caches: list[Path] | None
) -> dict[str, Any]:
    spec = at.recipe.train
    student = make_student(at.recipe.student, at.teachers, at.vocabulary, spec.seed).to(at.device)
    parameters = count_parameters(student)
    _say_sizes(at, parameters)
    module = _module(at, student, calibrations, caches)
    order = at.order()
    names = {"teachers": tuple(t.name for t in at.teachers), "domains": at.domains}
    run.mkdir(exist_ok=True)
    with at.progress.task("training", len(order) * at.corpus.sequence_length, "tokens") as task:
        info = train(module, OrderedWindows(at.corpus.training, order), spec, run, task, names=names)
    student = student.eval().float().cpu()
    windows = choose_windows(at.corpus.validation, VALIDATION_TOKENS)
    reached = perplexity(student, at.corpus.validation, windows, batch_size=spec.batch_size)
    at.progress.say(f"student: validation perplexity {reached:.1f}")
    student.save_pretrained(folder / "student")
    AutoTokenizer.from_pretrained(at.teachers[0].path).save_pretrained(folder / "student")
    if module.features is not None:
        save_file(module.features.state_dict(), folder / "distill_state.safetensors")
    shutil.copy(run / LOG, folder / LOG)
    source = "cache" if caches else "memory"
    return {"parameters": parameters, "teachers_from": source, "validation_perplexity": round(reached, 3), **info}


def _say_sizes(at: Setting, parameters: int) -> None:
    teachers = ", ".join(f"{t.name} {t.parameters:,}" for t in at.teachers)
    at.progress.say(f"student: {parameters:,} parameters; teachers: {teachers}")
    smallest = min(t.parameters for t in at.teachers)
    if parameters > smallest:
        at.progress.say(
            f"warning: the student ({parameters:,} parameters) is larger than its smallest teacher ({smallest:,})"
        )


def _module(
    at: Setting, student: PreTrainedModel, calibrations: Sequence[float], caches: list[Path] | None
) -> DistillModule:
    recipe = at.recipe
    losses = recipe.losses
    bf16 = autocast_bfloat16(recipe.train, at.device)
    output = OutputLoss(
        divergence=losses.output.divergence,
        temperature=losses.output.temperature,
        beta=losses.output.beta,
        weight=losses.output.weight,
        cross_entropy=losses.cross_entropy,
        matmul_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    source: TeacherSource | None = None
    if at.listens and caches:
        opened = [
            open_cache(c, teacher_sha256=t.weights_sha256, corpus_sha256=at.corpus.sha256)
            for c, t in zip(caches, at.teachers, strict=True)
        ]
        source = TeachersRemembered([t.name for t in at.teachers], opened, at.rule, at.vocabulary)
    elif at.listens:
        resident = [load_teacher(t, at.device) for t in at.teachers]
        source = TeachersAtWork(resident, calibrations, at.rule, losses.output.temperature)
    features = None
    if losses.features is not None:
        shape = (student.config.hidden_size, student.config.num_hidden_layers)
        shapes = [(t.name, t.hidden_size, t.n_layers) for t in at.teachers]
        features = FeatureLoss(losses.features, shape, shapes, recipe.train.seed).to(at.device)
    return DistillModule(student, source, output, features, len(at.domains))
