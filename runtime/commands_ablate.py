"""`ablate`: what each part of a recipe is worth, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgestill.runtime.commands_build import RecipeArgument, upper
from edgestill.runtime.commands_shared import writing
from edgestill.runtime.errors import EdgestillError
from edgestill.runtime.progress import Progress


def ablate(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to work; build/<recipe> when left out.")
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Students per row, seeds from the recipe's on.")] = 3,
    first_seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="The first of them; the recipe's when left out.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Train on N tokens instead of the recipe's.")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML of rows; the recipe's baselines when left out.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="ROW", help="Just this row, and the first to compare with; may be repeated."),
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Students trained at the same time.")] = 1,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Judge the finished students on held-out text: once, at the end.")
    ] = False,
    seal: Annotated[
        bool,
        typer.Option("--seal", help="Judge students on held-out text when trained; unread until --held-out."),
    ] = False,
) -> None:
    """Train the recipe beside its baselines and without each of its parts, on the same tokens, and compare.

    Rows: the recipe, cross-entropy only, each single teacher, uniform fusion, and the recipe without each part it
    has. Finished rows are kept; the same command goes on where it stopped. Table, plot and JSON: DIR/ablate.

    \b
    Example:
        edgestill ablate quickstart --seeds 3 --jobs 2
        edgestill ablate my/recipe.yaml --rows my/rows.yaml --tokens 200000
    """
    upper("compress.processes").refuse_several("ablate")
    progress = Progress()
    folder = out if out is not None else Path("build") / upper("profiles.locate").name_of(recipe)
    try:
        with writing(folder):
            table = upper("compress.ablate").ablate(
                recipe,
                out=folder,
                seeds=seeds,
                tokens=tokens,
                rows=rows,
                only=only or [],
                jobs=jobs,
                held_out=held_out,
                seal=seal,
                first_seed=first_seed,
                progress=progress,
            )
    except KeyboardInterrupt:
        progress.say("stopped; the same command goes on from here")
        raise
    _show(table)


def _show(table: dict[str, Any]) -> None:
    """The table, and an error where rows have failed."""
    upper("compress.ablate_table").print_table(table)
    if table["failures"]:
        lines = [f"row {label}: {why}" for label, why in table["failures"].items()]
        raise EdgestillError("\n".join([*lines, "the other rows are finished; the same command tries these again"]))
