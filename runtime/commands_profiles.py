"""`profiles`: list and show packaged devices and recipes, or describe this machine as one. Needs no YAML library."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from edgestill.runtime.errors import BadInput, MissingPart

DETECT = "detect"


def profiles(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME|detect", help="What to show; detect measures this machine.", show_default=False),
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="With detect: describe the GPU and its engine.")] = False,
) -> None:
    """List the packaged device profiles and recipes, print one, or describe this machine as a profile.

    \b
    Example:
        edgestill profiles
        edgestill profiles cpu-x86
        edgestill profiles detect > my-device.yaml
        edgestill profiles detect --gpu > my-card.yaml
    """
    if gpu and name != DETECT:
        raise BadInput("--gpu goes with detect: edgestill profiles detect --gpu")
    locate = importlib.import_module("edgestill.profiles.locate")
    if name is None:
        _list(locate)
    elif name == DETECT:
        from edgestill.runtime.device import describe_device, describe_gpu

        found = describe_gpu() if gpu else describe_device()
        if found is None:
            raise MissingPart("no NVIDIA GPU is here, or its driver does not answer", "run this on the target")
        typer.echo(profile_text(found), nl=False)
    else:
        kind = "recipes" if name in locate.packaged("recipes") else "profiles"
        typer.echo(locate.find(name, kind).read_text(encoding="utf-8"), nl=False)


def _list(locate: Any) -> None:
    width = min(shutil.get_terminal_size().columns, 100)
    for kind, title in (("profiles", "Device profiles (--profile NAME)"), ("recipes", "Recipes")):
        typer.echo(title)
        names = locate.packaged(kind)
        for name in names:
            words = locate.description(locate.find(name, kind))
            lead = f"  {name:<18}"
            lines = textwrap.wrap(words, width - len(lead), break_on_hyphens=False) or [""]
            typer.echo(lead + f"\n{' ' * len(lead)}".join(lines))
        if not names:
            typer.echo("  none")


def profile_text(device: Mapping[str, Any]) -> str:
    """A profile's YAML for `describe_device()` or `describe_gpu()`: what the machine does not say is left to its default, or to
    the user.

    Raises:
        BadInput: a machine that no profile can name, or whose memory cannot be read.
    """
    from edgestill.runtime.device import ENGINE

    if device["arch"] not in ("x86_64", "aarch64"):
        raise BadInput(f"this machine is {device['arch']}; profiles are for x86_64 and aarch64")
    bandwidth, on_gpu = device["memory_bandwidth_gb_per_s"], device["engine"] != ENGINE
    if not device["memory_mib"] or not (bandwidth or on_gpu):
        raise BadInput(
            "this machine's memory could not be measured; write the profile by hand from cpu-x86 or cpu-arm64"
        )
    cpu = " ".join(str(device["cpu"]).split())
    lines = [
        f"# {cpu}, as `edgestill profiles detect` found it.",
        "format: 1",
        "device:",
        f"  arch: {device['arch']}",
        f"  engine: {device['engine']}",
        f"  threads: {device['threads']}",
        f"  memory_mib: {device['memory_mib']}",
    ]
    if device.get("unified_memory"):
        lines.append("  unified_memory: true")
    if bandwidth:
        lines.append(f"  memory_bandwidth_gb_per_s: {bandwidth:.2f}")
    else:
        lines.append(
            "  # memory_bandwidth_gb_per_s: not known here; add the figure of the data sheet (1 GB = 1e9 bytes)"
        )
    if device["last_level_cache_mib"]:
        lines.append(f"  last_level_cache_mib: {device['last_level_cache_mib']:.2f}")
    if device["gpu"]:
        lines.append(f"  gpu: {json.dumps(device['gpu'], ensure_ascii=False)}")
    if re.fullmatch(r"\d{1,2}\.\d", device["compute_capability"] or ""):
        lines.append(f'  compute_capability: "{device["compute_capability"]}"')
    lines += [
        "budget: {}  # set limits here, such as first_token_ms_p95, inter_token_ms_p95, peak_rss_mib, bundle_mib",
    ]
    return "\n".join(lines) + "\n"
