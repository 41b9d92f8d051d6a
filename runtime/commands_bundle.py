"""`check`, `bench`, `report`, `verify`: on the target, with a bundle."""

from __future__ import annotations

from typing import Annotated

import typer

from edgestill.runtime.commands_shared import (
    BundleArgument,
    JsonOption,
    finish,
    print_report,
    require_bundle,
    save_json,
    writing,
)
from edgestill.runtime.progress import Progress


def check(bundle: BundleArgument, json: JsonOption = None) -> None:
    """Judge a bundle on this machine: integrity, quality against its reference, latency, memory, energy.

    Exit code 0: every limit holds. 1: one does not. 3: one could not be measured here.

    \b
    Example:
        edgestill check build/quickstart/cpu-x86 --json check.json
    """
    require_bundle(bundle)
    from edgestill.runtime.gate import check_bundle

    with writing(bundle):
        report = check_bundle(bundle, Progress())
    if json is not None:
        save_json(report.to_json(), json)
    print_report(report.to_json())
    finish(report.verdict)


def bench(
    bundle: BundleArgument,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", min=1, metavar="N", help="Length of the prompt.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", min=2, metavar="N", help="Tokens to decode.")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, metavar="N", help="Sequences at a time.")] = None,
    json: JsonOption = None,
) -> None:
    """Measure speed and memory on this machine, without a verdict. What is left out comes from the bundle's profile.

    \b
    Example:
        edgestill bench build/quickstart/cpu-x86 --prompt-tokens 64 --batch 4
    """
    require_bundle(bundle)
    from edgestill.runtime.measure import bench_bundle

    result = bench_bundle(bundle, prompt_tokens, new_tokens, batch, Progress())
    if json is not None:
        save_json(result, json)
    print_report(result)


def tune(bundle: BundleArgument, json: JsonOption = None) -> None:
    """Find the fastest session settings for a bundle's workload on this machine; load, check and bench use them from then on.

    \b
    Example:
        edgestill tune build/quickstart/cpu-x86
    """
    require_bundle(bundle)
    from edgestill.runtime.tune import tune_bundle

    with writing(bundle):
        found = tune_bundle(bundle, Progress())
    if json is not None:
        save_json(found, json)
    for row in found["measured"]:
        word = row["word"]
        typer.echo(f"{word} {row[word]}: {row['workload_ms']:.1f} ms")
    chosen = ", ".join(f"{word} {value}" for word, value in found["settings"].items())
    typer.echo(f"kept in {bundle / 'local' / 'tuned.json'}: {chosen}")


def report(bundle: BundleArgument) -> None:
    """Write report.html from the stored JSON of the build and of the checks on this machine.

    \b
    Example:
        edgestill report build/quickstart/cpu-x86
    """
    require_bundle(bundle)
    from edgestill.runtime.report import render

    with writing(bundle):
        typer.echo(str(render(bundle)))


def verify(bundle: BundleArgument) -> None:
    """Check structure and checksums only: every shipped file, nothing undeclared. Exit code 1: something is wrong.

    \b
    Example:
        edgestill verify build/quickstart/cpu-x86
    """
    require_bundle(bundle)
    from edgestill.runtime.bundle import verify_bundle

    problems = verify_bundle(bundle)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{bundle}: whole")
