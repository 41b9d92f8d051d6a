"""Stages 5 to 7 of the story: the student is made, what it is held to is fitted, and it learns. It is left as a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from edgestill.compress.alignment import Alignment
from edgestill.compress.distill_module import DistillModule
from edgestill.compress.feature_fit import evenly, fit_alignment
from edgestill.compress.low_rank import load_student
from edgestill.compress.objectives import module_of
from edgestill.compress.processes import from_first, is_first
from edgestill.compress.quantize.fake_quant import FakeQuant
from edgestill.compress.quantize.shipped import ShippedWeights, load_shipped_student
from edgestill.compress.reference import choose_windows, perplexity
from edgestill.compress.setting import Setting
from edgestill.compress.sharding import whole_state
from edgestill.compress.stages import Stage
from edgestill.compress.student import count_parameters, make_student
from edgestill.compress.teachers import load_teacher
from edgestill.compress.trainer import train
from edgestill.compress.training_log import LOG
from edgestill.compress.windows import OrderedWindows
from edgestill.runtime.files import write_atomically

CODE = {"student": 1, "align": 3, "train": 2, "gptq": 2}
"""Revision of what each stage computes; raise it when the same inputs would give another result."""
VALIDATION_TOKENS = 16384
STATE = "distill_state.safetensors"
"""Beside the student: projections, selection policy, balances. Never in its checkpoint."""


def student_of(at: Setting, calibrations: Sequence[float], caches: list[Path] | None) -> Stage:
    """The trained student (`student/`), `distill_state.safetensors` and training.jsonl."""
    recipe = at.recipe
    made = made_of(at)
    aligned = aligned_of(at, made) if recipe.losses.features is not None else None
    apart = {"checkpoint_every_steps", "teacher_cache", "cache_top_k", "cache_mode", "cache_samples"}
    inputs: dict[str, Any] = {
        "student": made.key,
        "losses": recipe.losses.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json", exclude=apart),
        "corpus": at.corpus_key,
        "tokenizer": at.teachers[0].weights_sha256,
        "code": CODE["train"],
    }
    if recipe.quantize is not None:
        inputs["quantize"] = recipe.quantize.model_dump(mode="json")
        if recipe.quantize.initialize == "gptq":
            inputs["entered"] = CODE["gptq"]
    if at.listens:
        inputs |= {
            "teachers": at.teacher_hashes(),
            **at.fusion_words(),
            "calibration": list(calibrations),
            "caches": [c.name for c in caches] if caches else None,
            "align": aligned.key if aligned else None,
        }

    def learn(folder: Path) -> dict[str, Any]:
        return _train_into(at, folder, made, aligned, calibrations, caches)

    return at.space.stage("train", "train: the student", inputs, learn, together=True)


def made_of(at: Setting) -> Stage:
    """The student before training; its info has `origin` (the teacher's layer of each of its own) and what was cut."""
    recipe = at.recipe

    def make(folder: Path) -> dict[str, Any]:
        with at.progress.task("student", 0, "tokens") if recipe.student.measures else nullcontext() as task:
            made = make_student(
                recipe.student,
                at.teachers,
                at.vocabulary,
                recipe.train.seed,
                text=at.corpus.training,
                device=at.device,
                task=task,
            )
        made.model.save_pretrained(folder / "student")
        return {"origin": made.origin, "parameters": count_parameters(made.model), **made.notes}

    measures = recipe.student.init != "config"
    inputs = {
        "student": recipe.student.model_dump(mode="json"),
        "teachers": at.teacher_hashes() if measures else at.teachers[0].weights_sha256,
        "corpus": at.corpus_key if measures else None,
        "vocabulary": at.vocabulary,
        "seed": recipe.train.seed,
        "code": CODE["student"],
    }
    return at.space.stage("student", "student: made", inputs, make)


def aligned_of(at: Setting, made: Stage) -> Stage:
    """Layer pairs and projections (alignment.py), fitted on the untrained student."""
    spec = at.recipe.losses.features
    if spec is None:
        raise ValueError("the recipe aligns no features")

    def fit(folder: Path) -> None:
        windows = evenly(at.corpus.training.token_ids, spec.fit_tokens)
        student = load_student(made.folder / "student", torch.float32).to(at.device)
        with at.progress.task("feature fit", windows.size * len(at.teachers), "tokens") as task:
            found = fit_alignment(
                spec,
                student,
                [partial(load_teacher, t, at.device) for t in at.teachers],
                windows,
                origins_of(at, made),
                batch_size=at.recipe.train.batch_size,
                task=task,
            )
        found.save(folder)

    inputs = {
        "features": spec.model_dump(mode="json"),
        "student": made.key,
        "teachers": at.teacher_hashes(),
        "corpus": at.corpus_key,
        "code": CODE["align"],
    }
    return at.space.stage("align", "align: layers and projections", inputs, fit)


def origins_of(at: Setting, made: Stage) -> list[list[int] | None]:
    """Per teacher, the layer of it that each layer of the student was copied from; None for the others."""
    source = at.recipe.student.init.removeprefix("teacher:")
    return [made.info["origin"] if t.name == source else None for t in at.teachers]


def _train_into(
    at: Setting,
    folder: Path,
    made: Stage,
    aligned: Stage | None,
    calibrations: Sequence[float],
    caches: list[Path] | None,
) -> dict[str, Any]:
    """Everything but the last rename; a run that was killed while it tidied up is not trained again. All processes train, the
    first keeps the result."""
    run, result = folder / "run", folder / "result.json"
    if not from_first(result.exists):
        student = load_student(made.folder / "student", torch.float32).to(at.device)
        alignment = Alignment.load(aligned.folder) if aligned is not None else None
        module = module_of(at, student, alignment, calibrations, caches)
        facts = _learn(at, module, run)
        state = whole_state(module)
        if is_first():
            info = {"teachers_from": "cache" if caches else "memory", "made": made.info, **facts}
            _keep_result(at, made, state, folder)
            if module.quantization is not None:
                _keep_bytes(at, module.quantization, state, folder / "student")
            info |= _validated(at, folder / "student")
            shutil.copy(run / LOG, folder / LOG)
            write_atomically(result, json.dumps(info).encode())
    if not is_first():
        return {}
    shutil.rmtree(run, ignore_errors=True)
    return dict(json.loads(result.read_text(encoding="utf-8")))


def _learn(at: Setting, module: DistillModule, run: Path) -> dict[str, Any]:
    """Train in the folder `run`; returns facts about it."""
    parameters = count_parameters(module.student)
    _say_sizes(at, parameters)
    order = at.order()
    names = {"teachers": tuple(t.name for t in at.teachers), "domains": at.domains}
    run.mkdir(exist_ok=True)
    with at.progress.task("training", len(order) * at.corpus.sequence_length, "tokens") as task:
        info = train(module, OrderedWindows(at.corpus.training, order), at.recipe.train, run, task, names=names)
    if at.listens:
        info["histograms"] = module.meter.histograms(names["teachers"], names["domains"])
    return {"parameters": parameters, **info}


def _keep_result(at: Setting, made: Stage, state: dict[str, Tensor], folder: Path) -> None:
    """The student's checkpoint, and beside it what was trained along."""
    student = load_student(made.folder / "student", torch.float32)
    student.load_state_dict(
        {name.removeprefix("student."): t for name, t in state.items() if name.startswith("student.")}
    )
    student.save_pretrained(folder / "student")
    AutoTokenizer.from_pretrained(at.teachers[0].path).save_pretrained(folder / "student")
    beside = {name: t for name, t in state.items() if not name.startswith(("student.", "meter."))}
    if beside:
        save_file({name: t.cpu().contiguous() for name, t in beside.items()}, folder / STATE)


def _keep_bytes(at: Setting, quantization: FakeQuant, state: dict[str, Tensor], checkpoint: Path) -> None:
    """The weights on their grid, as they will ship."""
    weights = {name.removeprefix("student."): t for name, t in state.items() if name.startswith("student.")}
    ShippedWeights.of(quantization.spec, quantization.encoded(weights)).save(checkpoint)


def _validated(at: Setting, checkpoint: Path) -> dict[str, float]:
    """Perplexities on validation text of the student as it is kept, on the CPU: in float32, and with the weights that ship."""
    windows = choose_windows(at.corpus.validation, VALIDATION_TOKENS)

    def reached(student: PreTrainedModel, what: str) -> float:
        found = perplexity(student.eval(), at.corpus.validation, windows, batch_size=at.recipe.train.batch_size)
        at.progress.say(f"student: validation perplexity {found:.1f}{what}")
        return round(found, 3)

    values = {"validation_perplexity": reached(load_student(checkpoint, torch.float32), "")}
    if at.recipe.quantize is not None:
        what = f" with its {at.recipe.quantize.scheme} weights"
        values["quantized_validation_perplexity"] = reached(load_shipped_student(checkpoint), what)
    return values


def _say_sizes(at: Setting, parameters: int) -> None:
    teachers = ", ".join(f"{t.name} {t.parameters:,}" for t in at.teachers)
    at.progress.say(f"student: {parameters:,} parameters; teachers: {teachers}")
    smallest = min(t.parameters for t in at.teachers)
    if parameters > smallest:
        at.progress.say(
            f"warning: the student ({parameters:,} parameters) is larger than its smallest teacher ({smallest:,})"
        )
