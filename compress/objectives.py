"""From the words of a recipe to what is trained: student, teachers and losses in one module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from edgestill.compress.alignment import Alignment
from edgestill.compress.attention import AttentionLoss
from edgestill.compress.distill_module import DistillModule
from edgestill.compress.distill_teachers import compared_at
from edgestill.compress.divergence import Settings
from edgestill.compress.features import FeatureLoss
from edgestill.compress.fused_head import OutputLoss
from edgestill.compress.fusion import WeightRule
from edgestill.compress.lessons import TeachersAtWork, TeacherSource, TeachersRemembered
from edgestill.compress.packing import spread
from edgestill.compress.quantize.fake_quant import FakeQuant
from edgestill.compress.setting import Setting
from edgestill.compress.step_state import Taid
from edgestill.compress.teacher_cache import open_caches
from edgestill.compress.teacher_files import read_config
from edgestill.compress.teachers import load_teacher
from edgestill.compress.trainer import autocast_bfloat16

GRID_WINDOWS = 64
"""Training windows from which GPTQ learns what reaches the layers; as many as an export takes."""


def module_of(
    at: Setting,
    student: PreTrainedModel,
    alignment: Alignment | None,
    calibrations: Sequence[float],
    caches: Sequence[Path] | None,
) -> DistillModule:
    """Everything that is trained or asked in training, on its device.

    Args:
        alignment: of the features, when the recipe aligns them.
        caches: folders of the teachers' stored answers; None: the teachers are loaded and run.
    """
    losses = at.recipe.losses
    policy = at.policy()
    attention = attention_of(at, student)
    features = None
    if losses.features is not None and alignment is not None:
        shapes = [(t.name, t.hidden_size, t.n_layers) for t in at.teachers]
        width = student.config.get_text_config(decoder=True).hidden_size
        features = FeatureLoss(losses.features, alignment, width, shapes, at.recipe.train.seed).to(at.device)
    return DistillModule(
        student,
        source_of(at, at.rule_with(policy), calibrations, caches, attention),
        output_of(at),
        len(at.domains),
        features=features,
        attention=attention,
        policy=policy,
        quantization=FakeQuant(at.recipe.quantize, student) if at.recipe.quantize is not None else None,
        grid_text=_grid_text(at),
        taid=Taid(losses.output.taid).to(at.device) if losses.output.divergence == "taid" else None,
    )


def _grid_text(at: Setting) -> npt.NDArray[np.int64] | None:
    """Training windows int64 [W, T], as many of each domain, that show what reaches the layers of a student on a grid."""
    if at.recipe.quantize is None or at.recipe.quantize.initialize == "nearest":
        return None
    training = at.corpus.training
    return training.token_ids[spread(training, GRID_WINDOWS)].astype(np.int64)


def output_of(at: Setting) -> OutputLoss:
    """What is minimised at the output."""
    losses, words = at.recipe.losses, at.recipe.losses.output
    bf16 = autocast_bfloat16(at.recipe.train, at.device)
    return OutputLoss(
        divergence=words.divergence,
        temperature=words.temperature,
        settings=Settings(beta=words.beta, skew=words.skew, head_mass=words.head_mass),
        weight=words.weight,
        cross_entropy=losses.cross_entropy,
        ranking=losses.ranking,
        chunk_bytes=words.chunk_mib << 20,
        matmul_dtype=torch.bfloat16 if bf16 else torch.float32,
    )


def attention_of(at: Setting, student: PreTrainedModel) -> AttentionLoss | None:
    """The attention loss, if the recipe has one; the student is given the kernel that its taps need."""
    spec = at.recipe.losses.attention
    if spec is None:
        return None
    configs = [(t.name, read_config(t.path, t.name, trust_remote_code=t.trust_remote_code)) for t in at.teachers]
    attention = AttentionLoss(spec, student.config, configs)
    attention.prepare(student)
    return attention


def source_of(
    at: Setting,
    rule: WeightRule,
    calibrations: Sequence[float],
    caches: Sequence[Path] | None,
    attention: AttentionLoss | None = None,
) -> TeacherSource | None:
    """Where lessons come from; None for a student that hears no teacher."""
    if not at.listens:
        return None
    names = [t.name for t in at.teachers]
    if caches:
        hashes = [t.weights_sha256 for t in at.teachers]
        opened = open_caches(caches, hashes, corpus_sha256=at.corpus.sha256)
        calibrated = compared_at(at.recipe, calibrations) == list(calibrations)
        return TeachersRemembered(names, opened, rule, at.vocabulary, calibrated=calibrated)
    resident = [load_teacher(t, at.device) for t in at.teachers]
    if attention is not None:
        for teacher in resident:
            attention.prepare(teacher.model)
    return TeachersAtWork(resident, compared_at(at.recipe, calibrations), rule, at.recipe.losses.output.temperature)
