"""The recipe as one story: teachers and text in, student checkpoint and reference out.

    1. teachers    found, hashed, compared by token map and by encoding probe strings
    2. corpus      read, tokenised once, packed, split into three disjoint parts
    3. calibrate   one temperature per teacher on validation text (entropy weights only)
    4. cache       the teachers' answers, when tokens repeat or the teachers do not fit in memory together
    5. train       the student learns the fused target; resumes from its newest complete checkpoint
    6. reference   the answers on the held-out tokens that travel with the bundle

Every stage is kept under its key (stages.py) and not run again while nothing it depends on has changed.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgestill.compress.calibrate import MAX_WINDOWS, calibrate
from edgestill.compress.corpus import Corpus, build_corpus, open_corpus, source_hashes, training_order
from edgestill.compress.distill_module import DistillModule, TeachersAtWork, TeacherSource, TeachersRemembered
from edgestill.compress.features import FeatureLoss
from edgestill.compress.fused_head import OutputLoss
from edgestill.compress.fusion import WeightRule
from edgestill.compress.reference import choose_windows, make_reference, perplexity
from edgestill.compress.stages import Stage, Workspace
from edgestill.compress.student import count_parameters, make_student
from edgestill.compress.teacher_cache import capture, open_cache
from edgestill.compress.teachers import (
    TeacherFacts,
    check_same_tokenizer,
    fit_together,
    load_teacher,
    resolve_teachers,
)
from edgestill.compress.trainer import LOG, OrderedWindows, autocast_bfloat16, read_log, train
from edgestill.profiles.load import LoadedRecipe, load_recipe
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import Progress
from edgestill.runtime.reference import save_reference

CODE = {"corpus": 1, "calibrate": 1, "cache": 1, "train": 1, "reference": 1}
"""Revision of what each stage computes; raise it when the same inputs would give another result."""

REPEATS_THAT_PAY = 2.0
"""From this many passes over the same tokens, capturing the teachers once costs less than running them every time."""


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
    stages: tuple[Stage, ...]


def distill(recipe: str, out: Path, progress: Progress) -> None:
    """`edgestill distill`: run the story and place the student checkpoint in `out/student`."""
    with Workspace(out, progress).locked() as space:
        made = run(load_recipe(recipe), space, progress)
        beside = out / "student.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(made.student, beside)
        shutil.rmtree(out / "student", ignore_errors=True)
        beside.rename(out / "student")
    progress.say(f"student: {out / 'student'}")


def run(loaded: LoadedRecipe, space: Workspace, progress: Progress) -> Distilled:
    """All six stages."""
    recipe = loaded.recipe
    teachers = resolve_teachers(recipe.teachers, loaded.resolve)
    vocabulary = check_same_tokenizer(teachers)
    corpus_stage, corpus = _corpus(loaded, space, teachers[0])
    story = _Story(loaded, space, progress, teachers, vocabulary, corpus_stage, corpus)
    calibrations = story.calibrate()
    caches = story.cache(calibrations)
    trained = story.train(calibrations, caches)
    reference = story.reference(trained, calibrations)
    facts = {
        "teachers": [_teacher_words(t) for t in teachers],
        "calibration": calibrations,
        "corpus": {"sha256": corpus.sha256, "sources": list(corpus.sources), "domains": list(corpus.domains)},
        "training": trained.info,
        "reference": reference.info,
        "seed": recipe.train.seed,
    }
    log = read_log(trained.folder / LOG)
    return Distilled(trained.folder / "student", reference.folder, trained.key, facts, log, tuple(space.done))


def _corpus(loaded: LoadedRecipe, space: Workspace, teacher: TeacherFacts) -> tuple[Stage, Corpus]:
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


@dataclass(frozen=True)
class _Story:
    """What the stages after the corpus share."""

    loaded: LoadedRecipe
    space: Workspace
    progress: Progress
    teachers: list[TeacherFacts]
    vocabulary: int
    corpus_stage: Stage
    corpus: Corpus

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def listens(self) -> bool:
        """Whether the student hears its teachers at all (a cross-entropy baseline does not)."""
        losses = self.loaded.recipe.losses
        return losses.output.weight > 0 or losses.features is not None

    @property
    def rule(self) -> WeightRule:
        recipe = self.loaded.recipe
        return WeightRule.of(recipe.fusion, [t.weight for t in recipe.teachers], self.vocabulary)

    def order(self) -> npt.NDArray[np.int64]:
        """Window of every training example, in the order they are seen."""
        train, length = self.loaded.recipe.train, self.corpus.sequence_length
        per_step = train.batch_size * train.gradient_accumulation * length
        steps = math.ceil(train.tokens / per_step)
        return training_order(self.corpus, steps * per_step, train.seed)[: steps * per_step // length]

    # 3 ----------------------------------------------------------------------------------------------------------

    def calibrate(self) -> list[float]:
        """One temperature per teacher; 1.0 where entropies are not compared."""
        fusion = self.loaded.recipe.fusion
        if not (fusion.weights == "entropy" and fusion.calibrate):
            return [1.0] * len(self.teachers)
        batch = self.loaded.recipe.train.batch_size

        def fit(folder: Path) -> dict[str, Any]:
            found = {}
            for facts in self.teachers:
                teacher = load_teacher(facts, self.device)
                windows = min(MAX_WINDOWS, len(self.corpus.validation.token_ids))
                with self.progress.task(f"teacher {facts.name}", windows, "windows") as task:
                    result = calibrate(teacher, self.corpus.validation, batch_size=batch, task=task)
                self.progress.say(
                    f"teacher {facts.name}: temperature {result.temperature:.3f}, validation perplexity "
                    f"{result.perplexity:.1f} -> {result.calibrated_perplexity:.1f}"
                )
                found[facts.name] = asdict(result)
            return found

        inputs = {"teachers": self._teacher_hashes(), "corpus": self.corpus_stage.key, "code": CODE["calibrate"]}
        stage = self.space.stage("calibrate", "calibrate: one temperature per teacher", inputs, fit)
        return [float(stage.info[t.name]["temperature"]) for t in self.teachers]

    # 4 ----------------------------------------------------------------------------------------------------------

    def cache(self, calibrations: Sequence[float]) -> list[Path] | None:
        """Folders of the teachers' stored answers, or None when the teachers run during training."""
        recipe = self.loaded.recipe
        windows = np.unique(self.order())
        if not self._cache_pays(len(self.order()) / len(windows)):
            return None
        folders = []
        for facts, calibration in zip(self.teachers, calibrations, strict=True):

            def store(folder: Path, facts: TeacherFacts = facts, calibration: float = calibration) -> None:
                capture(
                    load_teacher(facts, self.device),
                    self.corpus.training,
                    windows,
                    folder,
                    top_k=min(recipe.train.cache_top_k, self.vocabulary),
                    batch_size=recipe.train.batch_size,
                    corpus_sha256=self.corpus.sha256,
                    calibration=calibration,
                    progress=self.progress,
                )

            inputs = {
                "teacher": [facts.weights_sha256, facts.precision, calibration],
                "corpus": self.corpus_stage.key,
                "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
                "top_k": recipe.train.cache_top_k,
                "code": CODE["cache"],
            }
            title = f"cache: answers of teacher {facts.name} on {len(windows)} windows"
            folders.append(self.space.stage(f"cache-{facts.name}", title, inputs, store).folder)
        return folders

    def _cache_pays(self, repeats: float) -> bool:
        recipe = self.loaded.recipe
        wanted = recipe.train.teacher_cache
        memory = torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else psutil.virtual_memory().available
        fits = fit_together(self.teachers, memory)
        if not self.listens or wanted == "never":
            return False
        if recipe.losses.features is not None:
            if wanted == "always" or not fits:
                raise BadInput(
                    "losses.features needs the teachers during training, which the cache replaces; remove losses.features "
                    + ("or teacher_cache: always" if fits else "or free memory: the teachers do not fit together")
                )
            return False
        return wanted == "always" or repeats >= REPEATS_THAT_PAY or not fits

    # 5 ----------------------------------------------------------------------------------------------------------

    def train(self, calibrations: Sequence[float], caches: list[Path] | None) -> Stage:
        """The student checkpoint (`student/`), `distill_state.safetensors` and training.jsonl."""
        recipe = self.loaded.recipe
        words = recipe.train.model_dump(mode="json", exclude={"checkpoint_every_steps", "teacher_cache", "cache_top_k"})
        inputs: dict[str, Any] = {
            "student": recipe.student.model_dump(mode="json"),
            "losses": recipe.losses.model_dump(mode="json"),
            "train": words,
            "corpus": self.corpus_stage.key,
            "tokenizer": self.teachers[0].weights_sha256,
            "code": CODE["train"],
        }
        if self.listens:
            inputs |= {
                "teachers": self._teacher_hashes(),
                "fusion": recipe.fusion.model_dump(mode="json"),
                "static": [t.weight for t in recipe.teachers],
                "calibration": list(calibrations),
                "caches": [c.name for c in caches] if caches else None,
            }
        return self.space.stage(
            "train", "train: the student", inputs, lambda folder: self._train_into(folder, calibrations, caches)
        )

    def _train_into(self, folder: Path, calibrations: Sequence[float], caches: list[Path] | None) -> dict[str, Any]:
        recipe = self.loaded.recipe
        student = make_student(recipe.student, self.teachers, self.vocabulary, recipe.train.seed).to(self.device)
        parameters = count_parameters(student)
        self.progress.say(f"student: {parameters:,} parameters; teachers: {self._sizes()}")
        smallest = min(t.parameters for t in self.teachers)
        if parameters > smallest:
            self.progress.say(
                f"warning: the student ({parameters:,} parameters) is larger than its smallest teacher ({smallest:,})"
            )
        module = self._module(student, calibrations, caches)
        order = self.order()
        length = self.corpus.sequence_length
        names = {"teachers": tuple(t.name for t in self.teachers), "domains": tuple(self.corpus.domains)}
        run = folder / "run"
        run.mkdir(exist_ok=True)
        with self.progress.task("training", len(order) * length, "tokens") as task:
            data = OrderedWindows(self.corpus.training, order)
            info = train(module, data, recipe.train, run, task, names=names)
        student = student.eval().float().cpu()
        validation = choose_windows(self.corpus.validation, 16384)
        info["validation_perplexity"] = round(
            perplexity(student, self.corpus.validation, validation, batch_size=recipe.train.batch_size), 3
        )
        self.progress.say(f"student: validation perplexity {info['validation_perplexity']:.1f}")
        student.save_pretrained(folder / "student")
        AutoTokenizer.from_pretrained(self.teachers[0].path).save_pretrained(folder / "student")
        if module.features is not None:
            save_file(module.features.state_dict(), folder / "distill_state.safetensors")
        shutil.copy(run / LOG, folder / LOG)
        shutil.rmtree(run)
        return {"parameters": parameters, "teachers_from": "cache" if caches else "memory", **info}

    def _module(self, student: Any, calibrations: Sequence[float], caches: list[Path] | None) -> DistillModule:
        recipe = self.loaded.recipe
        losses = recipe.losses
        bf16 = autocast_bfloat16(recipe.train, self.device)
        output = OutputLoss(
            divergence=losses.output.divergence,
            temperature=losses.output.temperature,
            beta=losses.output.beta,
            weight=losses.output.weight,
            cross_entropy=losses.cross_entropy,
            matmul_dtype=torch.bfloat16 if bf16 else torch.float32,
        )
        source: TeacherSource | None = None
        if self.listens and caches:
            opened = [
                open_cache(c, teacher_sha256=t.weights_sha256, corpus_sha256=self.corpus.sha256)
                for c, t in zip(caches, self.teachers, strict=True)
            ]
            source = TeachersRemembered([t.name for t in self.teachers], opened, self.rule, self.vocabulary)
        elif self.listens:
            resident = [load_teacher(t, self.device) for t in self.teachers]
            source = TeachersAtWork(resident, calibrations, self.rule, losses.output.temperature)
        features = None
        if losses.features is not None:
            shape = (student.config.hidden_size, student.config.num_hidden_layers)
            shapes = [(t.name, t.hidden_size, t.n_layers) for t in self.teachers]
            features = FeatureLoss(losses.features, shape, shapes, recipe.train.seed).to(self.device)
        return DistillModule(student, source, output, features, len(self.corpus.domains))

    # 6 ----------------------------------------------------------------------------------------------------------

    def reference(self, trained: Stage, calibrations: Sequence[float]) -> Stage:
        """held_out.safetensors (runtime/reference.py) for this student and its fused teachers."""
        recipe = self.loaded.recipe

        def answer(folder: Path) -> dict[str, Any]:
            student = AutoModelForCausalLM.from_pretrained(trained.folder / "student", dtype=torch.float32)
            student = student.to(self.device).eval()
            teachers = [partial(load_teacher, t, self.device) for t in self.teachers]
            windows = choose_windows(self.corpus.held_out, recipe.reference.tokens)
            with self.progress.task("held-out answers", len(windows) * (1 + len(teachers)), "windows") as task:
                made = make_reference(
                    self.corpus.held_out,
                    self.corpus.domains,
                    recipe.reference,
                    teachers,
                    calibrations,
                    self.rule,
                    student,
                    batch_size=recipe.train.batch_size,
                    task=task,
                )
            save_reference(made, folder)
            available = len(self.corpus.held_out.token_ids)
            return {"windows": len(windows), "of": available, "tokens": int(made.token_ids.size)}

        inputs = {
            "student": trained.key,
            "teachers": self._teacher_hashes(),
            "fusion": recipe.fusion.model_dump(mode="json"),
            "static": [t.weight for t in recipe.teachers],
            "calibration": list(calibrations),
            "reference": recipe.reference.model_dump(mode="json"),
            "code": CODE["reference"],
        }
        return self.space.stage("reference", "reference: the teachers' answers on held-out text", inputs, answer)

    def _teacher_hashes(self) -> list[list[str]]:
        return [[t.name, t.weights_sha256, t.precision] for t in self.teachers]

    def _sizes(self) -> str:
        return ", ".join(f"{t.name} {t.parameters:,}" for t in self.teachers)


def _teacher_words(facts: TeacherFacts) -> dict[str, Any]:
    """JSON-able facts of a teacher for the manifest, without paths of this machine."""
    words = asdict(facts)
    words.pop("path", None)
    return words


def _hash(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
