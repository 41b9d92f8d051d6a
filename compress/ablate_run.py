"""One row and one seed: what its student depends on, its training in a worker, and the JSON that is kept of it.

ablate/<row>-<seed>.json             judged on validation text
ablate/held-out/<row>-<seed>.json    the same student on held-out text; with --seal written as soon as it is trained, unread
ablate/targets/<key>.json            a fused target on one of them; shared by all rows and seeds that fuse alike
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers

from edgestill.compress.ablate_judge import F64, I64, FusedRule, judge_student, scored_tokens
from edgestill.compress.ablate_rows import Row
from edgestill.compress.corpus import Corpus, Part, open_corpus
from edgestill.compress.distill_student import aligned_of, made_of, student_of
from edgestill.compress.distill_teachers import caches_of, compared_at
from edgestill.compress.packing import some_of
from edgestill.compress.setting import Setting
from edgestill.compress.stages import Stage, Workspace, stage_key
from edgestill.compress.teachers import TeacherFacts, best_device
from edgestill.profiles.load import LoadedRecipe
from edgestill.runtime.device import environment
from edgestill.runtime.errors import BadInput
from edgestill.runtime.files import write_atomically
from edgestill.runtime.progress import Progress, QuietProgress

PartName = Literal["validation", "held_out"]
FOLDER = "ablate"
HELD_OUT = "held-out"
MIXED = "mixed"
"""Name of the perplexity over all domains, beside theirs."""
JUDGED_TOKENS = 1 << 17
"""Of a part, for each student; standard errors of paired differences are far below what rows differ by."""
FORMAT = 1
CODE = 1
"""Revision of what judging computes; raise it when the same student would get another result."""


@dataclass(frozen=True)
class Run:
    """One row and seed; it is pickled into a worker, so it holds paths and words, no arrays."""

    row: Row
    """With the seed in its recipe."""
    root: Path
    teachers: list[TeacherFacts]
    vocabulary: int
    corpus: Path
    corpus_key: str
    calibrations: tuple[float, ...]
    offsets: tuple[float, ...]
    caches: tuple[Path, ...] | None
    """Of its teachers' answers; None: they run during training, or are not heard."""
    part: PartName
    part_sha256: str
    sealed_sha256: str | None = None
    """Identity of the held-out windows when its student is judged on them too, unseen, as soon as it is trained."""

    @property
    def seed(self) -> int:
        return self.row.loaded.recipe.train.seed

    @property
    def label(self) -> str:
        """`uniform #1`: row and seed."""
        return f"{self.row.name} #{self.seed}"

    @property
    def file(self) -> Path:
        """Where its result goes."""
        folder = self.root / FOLDER
        return (folder / HELD_OUT if self.part == "held_out" else folder) / f"{self.row.file_stem}-{self.seed}.json"

    def setting(self, space: Workspace) -> Setting:
        """What its stages share."""
        return Setting(
            loaded=self.row.loaded,
            space=space,
            teachers=self.teachers,
            vocabulary=self.vocabulary,
            corpus=open_corpus(self.corpus),
            corpus_key=self.corpus_key,
            device=best_device(),
            offsets=self.offsets,
        )

    def student(self) -> tuple[str, bool]:
        """(key of its student, whether it is there), without training it."""
        stage = student_of(self._asking(), *self._answers())
        return stage.key, stage.reused

    def key(self, student_key: str) -> str:
        """Changes with the student and with what it is judged on."""
        return stage_key("judged", {"student": student_key, "windows": self.part_sha256, "code": CODE})

    def fused(self) -> FusedRule | None:
        """How its teachers are fused; None when the student does not hear their outputs, or a policy decides in training."""
        recipe = self.row.loaded.recipe
        if recipe.losses.output.weight == 0 or recipe.fusion.weights == "reinforced":
            return None
        return FusedRule(self._asking().rule, tuple(compared_at(recipe, self.calibrations)))

    def target_key(self) -> str:
        """Changes with the fused target and with what it is judged on."""
        at = self._asking()
        inputs = {
            "teachers": at.teacher_hashes(),
            **at.fusion_words(),
            "calibration": compared_at(at.recipe, self.calibrations),
            "windows": self.part_sha256,
            "code": CODE,
        }
        return stage_key("target", inputs)

    def with_caches(self, space: Workspace) -> Run:
        """The same run with its caches as they are in `space`: made when it is a Workspace, only named when it is asking."""
        caches = caches_of(self.setting(space), list(self.calibrations))
        return dataclasses.replace(self, caches=None if caches is None else tuple(caches))

    def prepare(self, space: Workspace) -> Run:
        """Do what other runs may share, so that no two workers write the same folder: caches, untrained student, projections.

        What is there is not hashed again for every run; a reader hashes.
        """
        stored = self.caches is None or all(folder.is_dir() for folder in self.caches)
        run = self if stored else self.with_caches(space)
        asked, at = self._asking(), self.setting(space)
        made = made_of(asked)
        if not made.reused:
            made_of(at)
        if at.recipe.losses.features is not None and not aligned_of(asked, made).reused:
            aligned_of(at, made_of(at))
        return run

    def unsealed(self) -> Run | None:
        """The run that judges the same student on held-out text, where that was asked for in advance."""
        if self.sealed_sha256 is None:
            return None
        return dataclasses.replace(self, part="held_out", part_sha256=self.sealed_sha256, sealed_sha256=None)

    def train(self, at: Setting) -> Stage:
        """Its student, trained or found."""
        return student_of(at, *self._answers())

    def _asking(self) -> Setting:
        return self.setting(Workspace(self.root, QuietProgress(), asking=True))

    def _answers(self) -> tuple[list[float], list[Path] | None]:
        return list(self.calibrations), None if self.caches is None else list(self.caches)


def finished(run: Run, student_key: str) -> dict[str, Any] | None:
    """The result that is kept of this run, if it is of this student and these windows."""
    stored = read_json(run.file)
    return stored if stored is not None and stored.get("key") == run.key(student_key) else None


def train_and_judge(run: Run, progress: Progress) -> dict[str, Any]:
    """Train (or find) the student of a run, judge it, write its JSON and hand that back. Runs in a worker.

    A sealed run leaves its held-out JSON first, so that a kept result never lacks it.
    """
    at = run.setting(Workspace(run.root, progress, brief=True))
    stage = run.train(at)
    if (sealed := run.unsealed()) is not None and finished(sealed, stage.key) is None:
        _judge(sealed, stage, at, progress)
    return _judge(run, stage, at, progress)


def _judge(run: Run, stage: Stage, at: Setting, progress: Progress) -> dict[str, Any]:
    part = part_of(at.corpus, run.part)
    with progress.task("judging", part.n_windows, "windows") as task:
        nll = judge_student(stage.folder / "student", part, at.device, task)
    if not np.isfinite(nll).all():
        bad = int((~np.isfinite(nll)).sum())
        raise BadInput(f"its student diverged: no likelihood on {bad} of {len(nll)} windows; lower train.learning_rate")
    result = {
        "format": FORMAT,
        "key": run.key(stage.key),
        "student_key": stage.key,
        "row": run.row.name,
        "seed": run.seed,
        "changes": run.row.changes,
        "recipe": run.row.loaded.name,
        "recipe_sha256": hashlib.sha256(run.row.loaded.text.encode()).hexdigest(),
        "part": run.part,
        "part_sha256": run.part_sha256,
        "calibration": {"temperatures": list(run.calibrations), "offsets": list(run.offsets)},
        "training": stage.info,
        "perplexity": means(nll, part, at.domains),
        "windows": _windows(nll, part, at.domains),
        "environment": {
            **environment(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "torch_threads": torch.get_num_threads(),
            "device": str(at.device),
        },
    }
    save_json(run.file, result)
    return result


def part_of(corpus: Corpus, name: PartName) -> Part:
    """The windows that are judged: about JUDGED_TOKENS, the same of each domain."""
    part = corpus.validation if name == "validation" else corpus.held_out
    return some_of(part, JUDGED_TOKENS // corpus.sequence_length)


def means(nll: F64, part: Part, domains: Sequence[str]) -> dict[str, float]:
    """Perplexity per domain that the part has, and MIXED: exp of the mean over these domains."""
    tokens: I64 = scored_tokens(part)
    found = {}
    for index, name in enumerate(domains):
        inside = part.domain == index
        if tokens[inside].sum():
            found[name] = float(nll[inside].sum() / tokens[inside].sum())
    found[MIXED] = sum(found.values()) / max(len(found), 1)
    return {name: round(math.exp(value), 4) for name, value in found.items()}


def _windows(nll: F64, part: Part, domains: Sequence[str]) -> dict[str, Any]:
    return {
        "nll": [round(float(x), 5) for x in nll],
        "tokens": scored_tokens(part).tolist(),
        "domain": part.domain.tolist(),
        "block": part.block.tolist(),
        "domains": list(domains),
    }


def with_seed(loaded: LoadedRecipe, seed: int) -> LoadedRecipe:
    """The recipe with another train.seed."""
    train = loaded.recipe.train.model_copy(update={"seed": seed})
    return dataclasses.replace(loaded, recipe=loaded.recipe.model_copy(update={"train": train}))


def save_json(path: Path, value: Any) -> None:
    """Write `value` so that nobody meets half of it; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None when it is missing or not one of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
