"""The command `edgestill`: the table of its subcommands, and what an error becomes.

A subcommand imports the module that does the work by name, when it runs: `--help` and `profiles` need no training stack, and
where an extra is missing the line that installs it is printed.

Exit codes: 0 pass, 1 fail, 3 incomplete; 2 for input that cannot be used; 70 for a bug; 130 for Ctrl-C, 141 for a reader
that went away.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgestill.runtime import (
    commands_ablate,
    commands_build,
    commands_bundle,
    commands_engine,
    commands_profiles,
    commands_text,
)
from edgestill.runtime.errors import EdgestillError

EX_SOFTWARE = 70
BROKEN_PIPE = 128 + 13
DEBUG = "EDGESTILL_DEBUG"

EXTRAS = {
    "report": ("matplotlib",),
    "build": (
        "torch",
        "transformers",
        "optimum",
        "onnx",
        "onnx_ir",
        "ml_dtypes",
        "onnxscript",
        "bitsandbytes",
        "datasets",
        "accelerate",
        "pydantic",
        "pydantic_core",
        "yaml",
    ),
}
"""Extra of pyproject.toml -> the modules that come with it and that a command may miss."""

DISK_ERRORS = {
    errno.ENOSPC: "no space is left on the device; free some or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "permission denied; change its mode or owner, or use another place",
    errno.EPERM: "not permitted; change its mode or owner, or use another place",
    errno.EFBIG: "the file would be larger than this process may write; raise the limit (ulimit -f) or write elsewhere",
    errno.ENAMETOOLONG: "the name is too long; use a shorter one",
}
"""What the machine refuses, in words with the repair; any other OSError is a bug of ours."""


class Subcommands(TyperGroup):
    """Ends quietly when the reader of our output goes away (`edgestill profiles | head -1`)."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # the interpreter flushes once more when it ends; give it somewhere to flush to
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        return result


app = typer.Typer(
    cls=Subcommands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for name, command, summary in (
    ("build", commands_build.build, "Run every stage: distil, export, judge"),
    ("plan", commands_build.plan, "Resolve a recipe and print what would run"),
    ("distill", commands_build.distill, "Train the student only"),
    ("ablate", commands_ablate.ablate, "Compare a recipe with its baselines"),
    ("export", commands_build.export, "Turn a checkpoint into a judged bundle"),
    ("check", commands_bundle.check, "Judge a bundle on this machine"),
    ("bench", commands_bundle.bench, "Measure speed and memory, without a verdict"),
    ("engine", commands_engine.engine, "Build a bundle's TensorRT engine"),
    ("tune", commands_bundle.tune, "Find the fastest session settings on this machine"),
    ("report", commands_bundle.report, "Write report.html from the stored JSON"),
    ("verify", commands_bundle.verify, "Check structure and checksums only"),
    ("generate", commands_text.generate, "Continue a text, token by token"),
    ("chat", commands_text.chat, "Talk with a model that has a chat template"),
    ("profiles", commands_profiles.profiles, "List devices and recipes, or describe this machine"),
):
    app.command(name, short_help=summary)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"edgestill {version('edgestill')}")
        raise typer.Exit


@app.callback()
def edgestill(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Distil several teacher language models into one small student, and ship it with proof of its quality, latency
    and memory on the device it is for.

    \b
    Example:
        edgestill plan quickstart --profile cpu-x86
        edgestill build quickstart --profile cpu-x86
        edgestill generate build/quickstart/cpu-x86 "It was a bright cold day"
    """


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code. Known errors become one line each on stderr."""
    try:
        app(args=arguments, prog_name="edgestill")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 (the outermost boundary: what is not known here is a bug, and exits 70)
        if _interrupted(error):
            return 130
        code, lines = describe(error)
        if os.environ.get(DEBUG) == "1":
            traceback.print_exception(error)
        for line in lines:
            typer.echo(f"edgestill: {line}", err=True)
        return code
    return 0


def _interrupted(error: BaseException | None) -> bool:
    """Whether a Ctrl-C is behind `error`: one that lands in a C extension comes out as the extension's own error."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe(error: Exception) -> tuple[int, list[str]]:
    """(exit code, lines to print) for an error that ended a command."""
    if isinstance(error, EdgestillError):
        return error.exit_code, str(error).split("\n")
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").split(".")[0]
        for extra, modules in EXTRAS.items():
            if missing in modules:
                return 2, [f"{missing} is not installed; pip install 'edgestill[{extra}]'"]
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        place = error.filename2 or error.filename or "the output"  # of a copy, the file that could not be written
        return 2, [f"{place}: {DISK_ERRORS[error.errno]}"]
    words = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return 2, [f"memory is used up{f' ({words})' if words else ''}; free some, or ask for less"]
    what = type(error).__name__ + (f": {words}" if words else "")
    return EX_SOFTWARE, [f"unexpected {what}; this is a bug: set {DEBUG}=1 for the traceback"]


def _interrupt_again(lost: Any) -> None:
    """A Ctrl-C that landed in a finalizer is ignored by Python: raise it once more, where it counts."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        main_thread = threading.main_thread().ident or 0
        threading.Timer(0.1, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(lost)


def main() -> None:
    """The console entry point."""
    if hasattr(signal, "pthread_kill"):  # Windows has none
        sys.unraisablehook = _interrupt_again
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
