"""`build`, `plan`, `distill`, `export`: on the build machine, with the training stack."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from edgestill.runtime.commands_shared import finish, print_report, print_rows, writing
from edgestill.runtime.progress import Progress

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a packaged recipe, or a YAML file.", show_default=False)
]
ProfilesOption = Annotated[
    list[str], typer.Option("--profile", metavar="NAME", help="Device profile or YAML file; may be repeated.")
]


def upper(module: str) -> ModuleType:
    """A module of a floor above: by name, because `runtime` imports none of them (ARCHITECTURE.md)."""
    return importlib.import_module(f"edgestill.{module}")


def build(
    recipe: RecipeArgument,
    profile: ProfilesOption,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to build; build/<recipe> when left out.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run finished stages again.")] = False,
) -> None:
    """Run every stage: distil, export, judge. The exit code is the worst verdict.

    A finished stage whose inputs are unchanged is not run again, and a build that was killed goes on from where it
    stopped.

    \b
    Example:
        edgestill build quickstart --profile cpu-x86 --profile cpu-arm64
    """
    upper("compress.processes").refuse_several("build")
    progress = Progress()
    locate = upper("profiles.locate")
    folder = out if out is not None else Path("build") / locate.name_of(recipe)
    try:
        with writing(folder):
            verdict = upper("export.build").build(
                recipe=recipe, profiles=profile, out=out, force=force, progress=progress
            )
    except KeyboardInterrupt:
        progress.say("stopped; the same command goes on from here")
        raise
    for name in profile:
        _print_stored(folder / locate.name_of(name))
    finish(verdict)


def plan(recipe: RecipeArgument, profile: ProfilesOption) -> None:
    """Resolve everything and print it: sizes, tokens, predicted memory and speed, what will run. Touches nothing.

    \b
    Example:
        edgestill plan my/recipe.yaml --profile my/device.yaml
    """
    print_rows(upper("export.build").plan(recipe=recipe, profiles=profile))


def distill(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the student's checkpoint goes.")],
) -> None:
    """Train the student only: a normal Hugging Face checkpoint, and the reference to judge it by.

    Started by torchrun, all processes train; `build` with the same --out then takes the student up.

    \b
    Example:
        edgestill distill quickstart --out build/student
        torchrun --nproc_per_node 2 --no-python \\
            edgestill distill quickstart --out build/student
    """
    progress = Progress()
    try:
        with writing(out):
            upper("compress.distill").distill(recipe=recipe, out=out, progress=progress)
    except KeyboardInterrupt:
        progress.say("stopped; the same command goes on from here")
        raise


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a Hugging Face causal LM.", show_default=False)
    ],
    profile: Annotated[str, typer.Option(metavar="NAME", help="Device profile or YAML file.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the bundle goes.")],
    held_out: Annotated[
        Path | None, typer.Option("--held-out", metavar="TEXT", help="Text to judge on; without it quality is null.")
    ] = None,
    limits: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML of quality limits, as in a recipe's `limits`.")
    ] = None,
) -> None:
    """Turn a checkpoint that you already have into a bundle, judged against the float checkpoint.

    Rows that need a teacher are null, for there is none.

    \b
    Example:
        edgestill export my/checkpoint --profile cpu-x86 --out build/mine \\
            --held-out my/held_out.txt
    """
    with writing(out):
        verdict = upper("export.build").export_checkpoint(
            checkpoint=checkpoint, profile=profile, out=out, held_out=held_out, limits=limits, progress=Progress()
        )
    name = upper("profiles.locate").name_of(profile)
    _print_stored(out / name if (out / name).is_dir() else out)
    finish(verdict)


def _print_stored(bundle: Path) -> None:
    """The verdict table of the newest report of `bundle`: its own, or that of a build which stopped at parity."""
    typer.echo(f"\n{bundle}")
    places = (bundle / "report" / "report.json", bundle.with_name(f"{bundle.name}.failed") / "report.json")
    stored = sorted((place for place in places if place.is_file()), key=lambda place: place.stat().st_mtime_ns)
    if stored:
        print_report(json.loads(stored[-1].read_text(encoding="utf-8")))
    else:
        typer.echo("no report was written")
