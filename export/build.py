"""All stages in order: the recipe's story (compress/distill.py, stages 1 to 6), then one bundle per profile (ship.py, 7 to 10).

`build` is the whole; `export_checkpoint` is the second half for people who already have a student. Both run inside one locked
folder and return the worst verdict of the bundles they made.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from edgestill.compress import distill
from edgestill.compress.corpus import held_out_part
from edgestill.compress.low_rank import load_student
from edgestill.compress.quantize.shipped import FILE
from edgestill.compress.reference import choose_windows, make_reference
from edgestill.compress.sources import source_files, source_hash
from edgestill.compress.stages import Workspace
from edgestill.compress.teacher_files import count_parameters
from edgestill.export.bundle_writer import tokenizer_files
from edgestill.export.model_facts import load_config, size_of_config
from edgestill.export.origin import Origin
from edgestill.export.plan import load_all, plan, require_builder
from edgestill.export.ship import ship
from edgestill.profiles.arithmetic import refuse_impossible
from edgestill.profiles.load import load_limits, load_profile, load_recipe
from edgestill.profiles.schema import ReferenceSpec, SourceSpec
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import Progress
from edgestill.runtime.reference import save_reference

__all__ = ["build", "default_folder", "export_checkpoint", "plan", "worst"]

SEVERITY = ("pass", "incomplete", "fail")


def build(recipe: str, profiles: list[str], out: Path | None, force: bool, progress: Progress) -> str:
    """`edgestill build`: everything, resumable. Returns the worst verdict.

    Raises:
        BadInput: anything in the words, the texts or the output folder that cannot be used as given.
    """
    found = load_all(recipe, profiles)
    loaded, teachers = found.loaded, found.given.teachers
    root = out or default_folder(recipe)
    with Workspace(root, progress, force=force).locked() as space:
        made = distill.run(loaded, found.given, space)
        origin = Origin(
            name=loaded.name,
            student=made.student,
            student_key=made.student_key,
            reference=made.reference,
            limits=dict(loaded.recipe.limits),
            provenance={"recipe": {"name": loaded.name, "text": loaded.text}, **made.facts},
            teachers=made.facts["teachers"],
            teacher_paths={t.name: (t.path, t.precision) for t in teachers},
            training_log=made.training_log,
            calibration=made.calibration,
            validation=made.validation,
        )
        verdicts = [ship(origin, target, space, progress) for target in found.targets]
        for stage in space.done:
            spent = "kept" if stage.reused else f"{stage.seconds:.1f} s"
            progress.say(f"stage {stage.name}: {spent}")
    return worst(verdicts)


def default_folder(recipe: str) -> Path:
    """Where `build` writes without --out: build/<recipe name>."""
    return Path("build") / load_recipe(recipe).name


def worst(verdicts: list[str]) -> str:
    """fail before incomplete before pass."""
    return max(verdicts, key=SEVERITY.index)


# the second half ----------------------------------------------------------------------------------------------------


def export_checkpoint(
    checkpoint: Path, profile: str, out: Path, held_out: Path | None, limits: Path | None, progress: Progress
) -> str:
    """`edgestill export`: a checkpoint that somebody already has, judged against itself in float; returns the verdict.

    Rows that need a teacher are null. Without `held_out` text there is nothing to judge quality on, and its rows are null.

    Raises:
        BadInput: no usable checkpoint, text or limits.
    """
    target = load_profile(profile)
    require_builder(target.profile)
    refuse_impossible(size_of_config(load_config(checkpoint)), target.profile, target.name)
    wanted = load_limits(limits) if limits is not None else {}
    if wanted and held_out is None:
        raise BadInput(f"limits on {', '.join(wanted)} need text to judge on; give --held-out TEXT")
    if held_out is not None:
        if not held_out.exists():
            raise BadInput(f"--held-out {held_out}: there is no such file or folder; give text to judge on")
        source_files(_text(held_out), Path)
    tokenizer_files(checkpoint)
    weights = weights_hash(checkpoint)
    with Workspace(out, progress).locked() as space:
        reference = _float_answers(checkpoint, weights, held_out, space, progress) if held_out is not None else None
        origin = Origin(
            name=checkpoint.resolve().name,
            student=checkpoint,
            student_key=weights,
            reference=reference,
            limits=wanted,
            provenance={"checkpoint": {"name": checkpoint.resolve().name, "weights_sha256": weights}},
            teachers=[],
            teacher_paths={},
            training_log=[],
        )
        return ship(origin, target, space, progress)


def _float_answers(checkpoint: Path, weights: str, text: Path, space: Workspace, progress: Progress) -> Path:
    """The reference of a student without teachers, on the text in `text`."""
    spec = ReferenceSpec()

    def answer(folder: Path) -> dict[str, Any]:
        longest = size_of_config(load_config(checkpoint)).max_tokens
        part = held_out_part(text, checkpoint, min(256, longest), folder / "reading")
        student = load_student(checkpoint, torch.float32)
        with progress.task("held-out answers", len(choose_windows(part, spec.tokens)), "windows") as task:
            made = make_reference(part, ["text"], spec, [], [], None, student, batch_size=8, task=task)
        save_reference(made, folder)
        return {"tokens": int(made.token_ids.size)}

    content = source_hash(_text(text), Path)
    inputs = {"weights": weights, "text": content, "reference": spec.model_dump(mode="json"), "code": 1}
    return space.stage("reference", "reference: the float checkpoint on held-out text", inputs, answer).folder


def _text(path: Path) -> SourceSpec:
    return SourceSpec(path=str(path))


def weights_hash(checkpoint: Path) -> str:
    """sha256 over names and bytes of the checkpoint's safetensors files and configuration.

    Raises:
        BadInput: there are none, or one is cut short.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise BadInput(f"{checkpoint}: holds no *.safetensors; save the checkpoint with save_pretrained")
    count_parameters(files)
    digest = hashlib.sha256()
    for file in [*files, *filter(Path.is_file, [checkpoint / FILE]), checkpoint / "config.json"]:
        with file.open("rb") as handle:
            digest.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
