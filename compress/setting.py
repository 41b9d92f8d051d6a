"""What all stages of one recipe share once its teachers are found and its corpus is built."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edgestill.compress.corpus import Corpus, training_order
from edgestill.compress.fusion import WeightRule
from edgestill.compress.reinforced import SelectionPolicy
from edgestill.compress.stages import Workspace
from edgestill.compress.teachers import TeacherFacts
from edgestill.profiles.load import LoadedRecipe
from edgestill.profiles.schema import Recipe
from edgestill.runtime.errors import BadInput
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
    offsets: tuple[float, ...] = ()
    """Of the teachers' entropies, once they are fitted (distill_teachers.with_offsets)."""

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def progress(self) -> Progress:
        return self.space.progress

    @property
    def listens(self) -> bool:
        """Whether the student hears its teachers at all (a cross-entropy baseline does not)."""
        return self.recipe.losses.output.weight > 0 or self.aligns

    @property
    def aligns(self) -> bool:
        """Whether the student is held to what happens inside its teachers."""
        return self.recipe.losses.features is not None or self.recipe.losses.attention is not None

    @property
    def rule(self) -> WeightRule:
        """How the teachers are weighted and mixed, as far as that is known without training."""
        return self.rule_with(None)

    def rule_with(self, policy: SelectionPolicy | None) -> WeightRule:
        """The same with the policy that selects the teachers under `weights: reinforced`; without it they count alike.

        Raises:
            BadInput: a teacher of a domain that no text has.
        """
        return WeightRule.of(
            self.recipe.fusion,
            [t.weight for t in self.recipe.teachers],
            self.vocabulary,
            domains=self._claims(),
            policy=policy,
            offsets=self.offsets,
        )

    def policy(self) -> SelectionPolicy | None:
        """A new policy that selects the teachers, if the recipe asks for one."""
        fusion = self.recipe.fusion
        if fusion.weights != "reinforced":
            return None
        return SelectionPolicy(fusion.reinforced, len(self.teachers), math.log(self.vocabulary)).to(self.device)

    def _claims(self) -> list[frozenset[int]]:
        """Per teacher, the domains that it answers for."""
        if self.recipe.fusion.weights != "routed":
            return []
        for teacher in self.recipe.teachers:
            for name in teacher.domains:
                if name not in self.domains:
                    raise BadInput(
                        f"teachers: {teacher.name!r} claims domain {name!r}, but the texts have {', '.join(self.domains)}"
                    )
        return [frozenset(self.domains.index(name) for name in t.domains) for t in self.recipe.teachers]

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
            "domains": [t.domains for t in self.recipe.teachers],
            "offsets": list(self.offsets),
        }
