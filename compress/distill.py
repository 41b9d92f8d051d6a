"""The recipe as one story: teachers and text in, student checkpoint and reference out.

    1. teachers    found, hashed, compared by token map and by encoding probe strings
    2. corpus      read, tokenised once, packed, split into three disjoint parts
    3. calibrate   one temperature per teacher on validation text (entropy weights only)
    4. cache       the teachers' answers, when tokens repeat or the teachers do not fit in memory together
    5. student     made: from a configuration, or cut from a teacher
    6. align       layer pairs and projections, when the student is held to features
    7. train       the student learns the fused target; resumes from its newest complete checkpoint
    8. reference   the answers on the held-out tokens that travel with the bundle

Every stage is kept under its key (stages.py) and not run again while nothing it depends on has changed. Under torchrun all
processes read this story; the cache and the training are the work of all, the rest that of the first (processes.py).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from edgestill.compress.corpus import Corpus, build_corpus, open_corpus, source_hashes
from edgestill.compress.distill_student import STATE, student_of
from edgestill.compress.distill_teachers import caches_of, calibrations_of, compared_at, with_offsets
from edgestill.compress.inputs import Inputs, check_inputs
from edgestill.compress.low_rank import load_student
from edgestill.compress.packing import Part, some_of, spread
from edgestill.compress.processes import first_then_others, from_first, is_first, joined, share_of
from edgestill.compress.reference import choose_windows, make_reference
from edgestill.compress.reinforced import SelectionPolicy
from edgestill.compress.setting import Setting
from edgestill.compress.sharding import check_sharding
from edgestill.compress.stages import Stage, Workspace, explained_write_errors
from edgestill.compress.teachers import TeacherFacts, best_device, load_teacher
from edgestill.compress.training_log import LOG, read_log
from edgestill.profiles.load import LoadedRecipe, load_recipe
from edgestill.runtime.progress import Progress, QuietProgress
from edgestill.runtime.reference import save_reference

CALIBRATION_WINDOWS = 64
COMPARED_WINDOWS = 256
"""Of validation text, for choices after training."""
CODE = {"corpus": 2, "reference": 1}
"""Revision of what each stage computes; raise it when the same inputs would give another result."""


@dataclass(frozen=True)
class Distilled:
    """What the later stages need."""

    student: Path
    reference: Path
    student_key: str
    """Changes whenever the student would."""
    facts: dict[str, Any]
    """For the manifest: teachers, corpus, training, calibration."""
    training_log: list[dict[str, Any]]
    calibration: npt.NDArray[np.int64]
    """int64 [W, T] windows of training text, evenly over its domains, for quantization that looks at activations."""
    validation: Part
    """Windows of validation text, evenly over its domains, for choices after training."""
    stages: tuple[Stage, ...]


def distill(recipe: str, out: Path, progress: Progress) -> None:
    """`edgestill distill`: run the story and place the student checkpoint in `out/student`."""
    with joined():
        progress = progress if is_first() else QuietProgress()
        loaded, given = first_then_others(lambda: _checked(recipe))
        with Workspace(out, progress).locked() as space:
            made = run(loaded, given, space)
            from_first(lambda: _place(made.student, out))
        progress.say(f"student: {out / 'student'}")


def _checked(recipe: str) -> tuple[LoadedRecipe, Inputs]:
    loaded = load_recipe(recipe)
    share_of(loaded.recipe.train.batch_size)
    check_sharding(loaded.recipe.train)
    return loaded, check_inputs(loaded)


def _place(student: Path, out: Path) -> None:
    """Copy the checkpoint to `out/student`, whole or not at all."""
    beside = out / "student.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    with explained_write_errors(out):
        shutil.copytree(student, beside)
    shutil.rmtree(out / "student", ignore_errors=True)
    beside.rename(out / "student")


def run(loaded: LoadedRecipe, given: Inputs, space: Workspace) -> Distilled:
    """All stages after the first, in a folder that this process holds."""
    recipe, teachers = loaded.recipe, given.teachers
    stage, corpus = corpus_of(loaded, space, teachers[0])
    at = Setting(loaded, space, teachers, given.vocabulary, corpus, stage.key, best_device())
    calibrations = calibrations_of(at)
    at = with_offsets(at)
    caches = caches_of(at, calibrations)
    trained = student_of(at, calibrations, caches)
    reference = _reference(at, trained, calibrations)
    facts = {
        "teachers": [_words(t) for t in teachers],
        "calibration": {"temperatures": calibrations, "offsets": list(at.offsets)},
        "corpus": {"sha256": corpus.sha256, "sources": list(corpus.sources), "domains": list(corpus.domains)},
        "training": trained.info,
        "reference": reference.info,
        "seed": recipe.train.seed,
    }
    return Distilled(
        student=trained.folder / "student",
        student_key=trained.key,
        reference=reference.folder,
        facts=facts,
        training_log=read_log(trained.folder / LOG),
        calibration=corpus.training.token_ids[spread(corpus.training, CALIBRATION_WINDOWS)].astype(np.int64),
        validation=some_of(corpus.validation, COMPARED_WINDOWS),
        stages=tuple(space.done),
    )


def corpus_of(loaded: LoadedRecipe, space: Workspace, teacher: TeacherFacts) -> tuple[Stage, Corpus]:
    """Stage 2: the text of the recipe in the tokens of `teacher`."""
    data, seed = loaded.recipe.data, loaded.recipe.train.seed
    inputs = {
        "data": data.model_dump(mode="json"),
        "texts": source_hashes(data, loaded.resolve),
        "tokenizer": _hash(teacher.path / "tokenizer.json"),
        "seed": seed,
        "code": CODE["corpus"],
    }

    def make(folder: Path) -> None:
        build_corpus(data, loaded.resolve, teacher.path, folder, seed=seed, progress=space.progress)

    stage = space.stage("corpus", "corpus: read, tokenise, pack, split", inputs, make)
    return stage, open_corpus(stage.folder)


def _reference(at: Setting, trained: Stage, calibrations: Sequence[float]) -> Stage:
    """held_out.safetensors (runtime/reference.py) for this student and its fused teachers."""
    recipe = at.recipe

    def answer(folder: Path) -> dict[str, Any]:
        student = load_student(trained.folder / "student", torch.float32).to(at.device).eval()
        teachers = [partial(load_teacher, t, at.device) for t in at.teachers]
        windows = choose_windows(at.corpus.held_out, recipe.reference.tokens)
        with at.progress.task("held-out answers", len(windows) * (1 + len(teachers)), "windows") as task:
            made = make_reference(
                at.corpus.held_out,
                at.domains,
                recipe.reference,
                teachers,
                compared_at(recipe, calibrations),
                at.rule_with(_trained_policy(at, trained)),
                student,
                batch_size=recipe.train.batch_size,
                task=task,
            )
        save_reference(made, folder)
        available = len(at.corpus.held_out.token_ids)
        return {"windows": len(windows), "of": available, "tokens": int(made.token_ids.size)}

    inputs = {
        "student": trained.key,  # and with it the policy that was trained along
        "teachers": at.teacher_hashes(),
        **at.fusion_words(),
        "calibration": compared_at(recipe, calibrations),
        "reference": recipe.reference.model_dump(mode="json"),
        "code": CODE["reference"],
    }
    return at.space.stage("reference", "reference: the teachers' answers on held-out text", inputs, answer)


def _trained_policy(at: Setting, trained: Stage) -> SelectionPolicy | None:
    """The policy that selected the teachers, as training left it; it selects without chance from here on."""
    policy = at.policy()
    if policy is not None:
        state = load_file(trained.folder / STATE)
        policy.load_state_dict(
            {name.removeprefix("policy."): t for name, t in state.items() if name.startswith("policy.")}
        )
        policy.eval()
    return policy


def _words(facts: TeacherFacts) -> dict[str, Any]:
    """JSON-able facts of a teacher for the manifest, without paths of this machine."""
    words = asdict(facts)
    words.pop("path", None)
    return words


def _hash(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
