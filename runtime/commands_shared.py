"""What the subcommands share: arguments, verdicts, tables, and writing a result without leaving half of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from edgestill.runtime.errors import BadInput
from edgestill.runtime.files import write_atomically

EXIT_CODES = {"pass": 0, "fail": 1, "incomplete": 3}
"""Verdict -> exit code."""

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.", show_default=False)]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]


def require_bundle(bundle: Path) -> None:
    """Raise BadInput when there is no such folder."""
    if not bundle.is_dir():
        kind = "is a file" if bundle.exists() else "no such folder"
        raise BadInput(f"{bundle}: {kind}; give the folder of a bundle, such as build/quickstart/cpu-x86")


def print_report(report: Mapping[str, Any]) -> None:
    """The verdict table on stdout."""
    from edgestill.runtime.report import print_table

    print_table(report)


def print_rows(rows: list[tuple[str, str]]) -> None:
    """Label and value in two columns; long values wrap under themselves."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(label, style="bold"), Text(value))
    Console(highlight=False).print(table)


def finish(verdict: str) -> None:
    """End with the exit code of the verdict, which the tables above have said."""
    if verdict == "incomplete":
        typer.echo(
            "nothing failed, but rows with a limit could not be measured here: run `edgestill check` on the target"
        )
    raise typer.Exit(EXIT_CODES[verdict])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the disk that name no file (a full one does not) name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def save_json(value: Mapping[str, Any], path: Path) -> None:
    """Write `value` to `path`: beside it first, then renamed, so that no reader meets half of it."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with writing(path):
        if not path.parent.is_dir():
            raise BadInput(f"{path}: its folder does not exist; make it or write elsewhere")
        write_atomically(path, text.encode())
