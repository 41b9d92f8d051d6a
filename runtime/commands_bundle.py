"""`check`, `bench`, `report`, `verify`: on the target, with a bundle."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Annotated, Any

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
from edgestill.runtime.errors import BadInput
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
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Latency over batch, prompt length and cache depth instead.")
    ] = False,
    beside: Annotated[
        list[Path] | None, typer.Option("--beside", metavar="BUNDLE", help="With --sweep: measure this one too.")
    ] = None,
    torch: Annotated[
        Path | None, typer.Option("--torch", metavar="CHECKPOINT", help="With --sweep: and this student in torch.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="With --sweep: draw it (.png, .svg).")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Measure speed and memory on this machine, without a verdict. What is left out comes from the bundle's profile.

    With --sweep the options take their values as grids: --batch is the largest batch (1 is measured too), --prompt-tokens the
    longest prompt, --new-tokens is not used.

    \b
    Example:
        edgestill bench build/quickstart/cpu-x86 --prompt-tokens 64 --batch 4
        edgestill bench build/quickstart/cpu-x86 --sweep --plot sweep.png
    """
    require_bundle(bundle)
    if sweep:
        _sweep([bundle, *(beside or [])], batch, prompt_tokens, torch, plot, json)
        return
    if beside or torch is not None or plot is not None:
        raise BadInput("--beside, --torch and --plot go with --sweep")
    from edgestill.runtime.measure import bench_bundle

    result = bench_bundle(bundle, prompt_tokens, new_tokens, batch, Progress())
    if json is not None:
        save_json(result, json)
    print_report(result)


def _sweep(
    bundles: list[Path],
    batch: int | None,
    longest: int | None,
    torch: Path | None,
    plot: Path | None,
    json: Path | None,
) -> None:
    """`bench --sweep`."""
    from edgestill.runtime import sweep as sweeping

    for bundle in bundles[1:]:
        require_bundle(bundle)
    if plot is not None and (plot.suffix not in (".png", ".svg") or not plot.parent.is_dir()):
        raise BadInput(f"{plot}: give a .png or .svg in a folder that exists")
    prompts = tuple(n for n in sweeping.PROMPTS if longest is None or n < longest) + ((longest,) if longest else ())
    grid = sweeping.Grid(tuple(sorted({1, batch or 1})), prompts if longest else ())
    progress = Progress()
    result = sweeping.sweep_bundles(bundles, grid, progress)
    if torch is not None:
        result["rows"] += _torch_rows(torch, bundles[0], grid)
    if json is not None:
        save_json(result, json)
    for line in sweeping.table_lines(result):
        typer.echo(line)
    if plot is not None:
        with writing(plot):
            sweeping.save_plot(result, plot)


def _torch_rows(checkpoint: Path, bundle: Path, grid: Any) -> list[dict[str, Any]]:
    """The student in torch at the prompts of the sweep, batch 1; needs the build extra.

    As it is, in float32; on a CUDA device also in float16, compiled with CUDA graphs: what an engine has to beat.
    """
    from edgestill.runtime.bundle import read_manifest
    from edgestill.runtime.sweep import torch_rows

    manifest = read_manifest(bundle)
    threads = int(manifest.profile.get("device", {}).get("threads", 1))
    prompts = [n for kind, batch, n in grid.cells(manifest.model) if (kind, batch) == ("prompt", 1)]
    speed = importlib.import_module("edgestill.compress.torch_speed")
    ways = [("float32", False)] + ([("float16", True)] if speed.on_cuda() else [])
    found = []
    for precision, compiled in ways:
        for prompt in prompts:
            if prompt + 16 <= manifest.model.max_tokens:
                found += speed.measure_apart(
                    [(checkpoint, precision)], prompt_tokens=prompt, new_tokens=16, threads=threads, compiled=compiled
                )
    return torch_rows([dataclasses.asdict(row) for row in found], checkpoint.name)


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
