"""What all stages of one recipe share once its teachers are found and its corpus is built."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edgestill.compress.corpus import Corpus, training_order
from edgestill.compress.fusion import WeightRule
from edgestill.compress.stages import Workspace
from edgestill.compress.teachers import TeacherFacts
from edgestill.profiles.load import LoadedRecipe
from edgestill.profiles.schema import Recipe
from edgestill.runtime.progress import Progress


@dataclass(frozen=True)
class Setting:
    """A recipe with its teachers, its shared vocabulary and its corpus, in the build folder where the stages go."""

    loaded: LoadedRecipe
    space: Workspace
    teachers: list[TeacherFacts]
    vocabulary: int
    corpus: Corpus
    corpus_key: str
    device: torch.device

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def progress(self) -> Progress:
        return self.space.progress

    @property
    def listens(self) -> bool:
        """Whether the student hears its teachers at all (a cross-entropy baseline does not)."""
        return self.recipe.losses.output.weight > 0 or self.recipe.losses.features is not None

    @property
    def rule(self) -> WeightRule:
        """How the teachers are weighted and mixed."""
        return WeightRule.of(self.recipe.fusion, [t.weight for t in self.recipe.teachers], self.vocabulary)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.corpus.domains)

    def order(self) -> npt.NDArray[np.int64]:
        """int64 [steps x batch]: the training window of every example, in the order they are seen."""
        train, length = self.recipe.train, self.corpus.sequence_length
        per_step = train.batch_size * train.gradient_accumulation * length
        tokens = math.ceil(train.tokens / per_step) * per_step
        return training_order(self.corpus, tokens, train.seed)[: tokens // length]

    def teacher_hashes(self) -> list[list[str]]:
        """[name, weights sha256, precision] of each: what a stage that asks the teachers depends on."""
        return [[t.name, t.weights_sha256, t.precision] for t in self.teachers]

    def fusion_words(self) -> dict[str, object]:
        """The words that decide the fused target."""
        return {
            "fusion": self.recipe.fusion.model_dump(mode="json"),
            "static": [t.weight for t in self.recipe.teachers],
        }
