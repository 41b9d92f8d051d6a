"""Everything a recipe refers to, checked before a folder is claimed or a second is spent on work.

What can be known without reading text or weights is refused here: missing files, teachers that differ, a student that cannot
be, windows that are too long, layers that are not there.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
from transformers import PretrainedConfig

from edgestill.compress.attention import mapped_attention
from edgestill.compress.corpus import require_sources
from edgestill.compress.features import check_features
from edgestill.compress.on_policy import check as check_on_policy
from edgestill.compress.quantize.fake_quant import check_widths
from edgestill.compress.student import student_config
from edgestill.compress.teacher_files import read_config
from edgestill.compress.teachers import TeacherFacts, check_same_tokenizer, resolve_teachers
from edgestill.profiles.load import LoadedRecipe
from edgestill.profiles.schema import Recipe
from edgestill.runtime.errors import BadInput

ORDER_BYTES_PER_WINDOW = 48
"""Peak of corpus.training_order, measured: 46 bytes a window (due times, permutations, places of 8 bytes each)."""


@dataclass(frozen=True)
class Inputs:
    """What the recipe's words stand for on this machine."""

    teachers: list[TeacherFacts]
    vocabulary: int
    """Real size of the tokenizer that all teachers share."""
    student: PretrainedConfig


def check_inputs(loaded: LoadedRecipe) -> Inputs:
    """Find the teachers and the texts, and describe the student.

    Raises:
        BadInput: any of it cannot be used; one line per problem of a kind.
    """
    recipe = loaded.recipe
    require_sources(recipe.data, loaded.resolve)
    teachers = resolve_teachers(recipe.teachers, loaded.resolve)
    vocabulary = check_same_tokenizer(teachers)
    student = student_config(recipe.student, teachers, vocabulary)
    _check_lengths(recipe, teachers, student)
    _check_alignment(recipe, teachers, student)
    if recipe.train.on_policy is not None:
        check_on_policy(recipe.train.on_policy, recipe.data.sequence_length)
    if recipe.quantize is not None:
        check_widths(recipe.quantize, student)
    _check_domains(recipe)
    return Inputs(teachers, vocabulary, student)


def _check_alignment(recipe: Recipe, teachers: list[TeacherFacts], student: PretrainedConfig) -> None:
    if recipe.losses.features is not None:
        text = student.get_text_config(decoder=True)
        shapes = [(t.name, t.hidden_size, t.n_layers) for t in teachers]
        check_features(
            recipe.losses.features,
            (text.hidden_size, text.num_hidden_layers),
            shapes,
            cut_from=None if recipe.student.init == "config" else recipe.student.init.removeprefix("teacher:"),
            length=recipe.data.sequence_length,
        )
    if recipe.losses.attention is not None:
        configs = [(t.name, read_config(t.path, t.name, trust_remote_code=t.trust_remote_code)) for t in teachers]
        mapped_attention(recipe.losses.attention, student, configs, recipe.data.sequence_length)


def _check_domains(recipe: Recipe) -> None:
    """Routed teachers claim domains of the texts; those that a column names are known when the text is read."""
    if recipe.fusion.weights != "routed" or any(source.domain_column for source in recipe.data.sources):
        return
    known = sorted({source.domain for source in recipe.data.sources})
    for teacher in recipe.teachers:
        for name in teacher.domains:
            if name not in known:
                raise BadInput(
                    f"teachers: {teacher.name!r} claims domain {name!r}, but the texts have {', '.join(known)}; correct it"
                )


def _check_lengths(recipe: Recipe, teachers: list[TeacherFacts], student: PretrainedConfig) -> None:
    length = recipe.data.sequence_length
    own = getattr(student.get_text_config(decoder=True), "max_position_embeddings", None)
    limits = [(t.max_tokens, f"teacher {t.name!r} was made for") for t in teachers]
    limits.append((own, "the student's max_position_embeddings is"))
    limit, words = min(((limit, words) for limit, words in limits if limit is not None), default=(length, ""))
    if length > limit:
        raise BadInput(f"data.sequence_length: {length} tokens, but {words} {limit}; shorten the windows")
    windows, memory = recipe.train.tokens // length, psutil.virtual_memory().available
    if windows * ORDER_BYTES_PER_WINDOW > memory:
        raise BadInput(
            f"train.tokens: the order of {windows:.3g} windows alone takes {windows * ORDER_BYTES_PER_WINDOW / 2**30:,.0f} GiB "
            f"of memory ({memory / 2**30:,.0f} GiB are free); train on fewer tokens"
        )
