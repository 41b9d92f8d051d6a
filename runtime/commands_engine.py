"""`engine`: build a bundle's TensorRT engine before it is needed, for the card at hand or ahead for another."""

from __future__ import annotations

from typing import Annotated

import typer

from edgestill.runtime.commands_shared import BundleArgument, JsonOption, print_rows, require_bundle, save_json, writing
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import Progress


def engine(
    bundle: BundleArgument,
    ahead: Annotated[
        bool, typer.Option("--ahead", help="Build for the profile's card, which need not be here (tensorrt-rtx).")
    ] = False,
    compute_capability: Annotated[
        str | None,
        typer.Option("--compute-capability", metavar="X.Y", help="Build ahead for this card instead."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Build the TensorRT engine of a bundle, once; load, check and bench use it from then on. They build it too when it is missing.

    \b
    Example:
        edgestill engine build/quickstart/rtx-4090
        edgestill engine build/quickstart/rtx-4090 --ahead
    """
    require_bundle(bundle)
    from edgestill.runtime.bundle import open_bundle
    from edgestill.runtime.engines.flavour import is_engine
    from edgestill.runtime.engines.opening import ensure_engine, target_ahead

    opened = open_bundle(bundle)
    if not is_engine(opened.manifest.engine):
        raise BadInput(
            f"{bundle}: engine {opened.manifest.engine} has nothing to build; give a bundle for tensorrt or tensorrt-rtx"
        )
    target = target_ahead(opened, compute_capability) if ahead or compute_capability is not None else None
    with writing(bundle):
        stored = ensure_engine(opened, Progress(), target=target)
    record, fingerprint = stored.record, stored.fingerprint
    result = {"digest": fingerprint.digest, "built_now": stored.built_now, **record}
    if json is not None:
        save_json(result, json)
    rows = [
        ("engine", f"{fingerprint.digest} ({fingerprint.flavour} {fingerprint.version})"),
        ("for", f"compute capability {fingerprint.compute_capability}, driver {fingerprint.driver or 'any'}"),
        ("size", f"{len(stored.data) / 2**20:.1f} MiB"),
        ("kept in", str(record["folder"])),
    ]
    if "seconds" in record:
        peak = f", {record['peak_rss_mib']:.0f} MiB" if record["peak_rss_mib"] else ""
        if record.get("peak_device_mib"):
            peak += f" and {record['peak_device_mib']:.0f} MiB of the GPU"
        rows.append(("build", f"{record['seconds']:.1f} s{peak}{'' if stored.built_now else ' (done before)'}"))
    print_rows(rows)
