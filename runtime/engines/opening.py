"""A bundle's engine on the card at hand: found, or built once in a process of its own, then opened."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from edgestill.runtime.bundle import Bundle, open_bundle
from edgestill.runtime.child import MeasurementFailed, run_child
from edgestill.runtime.engines.cuda import Card, Cuda
from edgestill.runtime.engines.flavour import FLAVOURS, Library, is_engine, open_library
from edgestill.runtime.engines.plan import plan_of
from edgestill.runtime.engines.store import CompiledKernels, StoredEngine, Target, find_engine, others, wanted
from edgestill.runtime.errors import BadInput, MissingPart
from edgestill.runtime.progress import Progress

if TYPE_CHECKING:
    from edgestill.runtime.backends.tensorrt import TensorRTBackend

logger = logging.getLogger(__name__)


def target_here(card: Card) -> Target:
    """The card at hand."""
    return Target(card.compute_capability, card.driver, card.name)


def target_ahead(bundle: Bundle, compute_capability: str | None) -> Target:
    """A card that is not here: the one given, or the profile's.

    Raises:
        BadInput: the flavour builds on the target only, or no card is named.
    """
    device = bundle.manifest.profile.get("device", {})
    flavour = FLAVOURS[bundle.manifest.engine]
    wanted_card = compute_capability or device.get("compute_capability")
    if not flavour.builds_without_gpu:
        raise BadInput(f"{flavour.name} builds engines on the GPU that will run them only; run this on the target")
    if wanted_card is None:
        raise BadInput("the profile names no compute capability; give --compute-capability")
    gpu = device.get("gpu") if wanted_card == device.get("compute_capability") else None
    return Target(str(wanted_card), None, gpu, ahead=True)


def ensure_engine(bundle: Bundle, progress: Progress | None = None, *, target: Target | None = None) -> StoredEngine:
    """The engine for `target` (None: the card at hand), built when it is missing.

    Raises:
        MissingPart: TensorRT, CUDA's bindings, the driver or the GPU are not here.
        BadInput, BundleError: no engine can be had from this bundle; the reason.
    """
    library = open_library(plan_of(bundle.manifest).flavour)
    where = target or target_here(Cuda().card())
    found = find_engine(bundle, library.version, where)
    if found is not None:
        return found
    _, fingerprint = wanted(bundle, library.version, where)
    for line in others(bundle, fingerprint):
        logger.info("engine not used: %s", line)
        if progress is not None:
            progress.say(f"engine not used: {line}")
    if progress is not None:
        progress.say(f"engine: building {fingerprint.digest} for {where.gpu or where.compute_capability}, once")
    logger.info("building engine %s for %s", fingerprint.digest, where.gpu or where.compute_capability)
    request = {"compute_capability": where.compute_capability, "ahead": where.ahead, "verify": bundle.verify}
    try:
        run_child("engine", bundle.folder, request, "engine", progress)
    except MeasurementFailed as failure:
        raise BadInput(f"{bundle.manifest.name}: {failure}") from failure
    built = find_engine(bundle, library.version, where)
    if built is None:
        raise MissingPart("the engine that was just built is gone", "try again; another process may have removed it")
    return StoredEngine(built.data, built.fingerprint, built.record, built_now=True)


def prepare(path: Path, verify: bool, progress: Progress) -> None:
    """Build the engine of the bundle in folder `path` where it needs one and has none, with a bar."""
    bundle = open_bundle(path, verify)
    if is_engine(bundle.manifest.engine):
        ensure_engine(bundle, progress)


def open_engine(bundle: Bundle, progress: Progress | None = None) -> TensorRTBackend:
    """The backend of a bundle for TensorRT.

    Raises:
        As `ensure_engine`.
    """
    from edgestill.runtime.backends.tensorrt import TensorRTBackend

    manifest = bundle.manifest
    plan = plan_of(manifest)
    library: Library = open_library(plan.flavour)
    device = Cuda()
    card = device.card()
    stored = ensure_engine(bundle, progress, target=target_here(card))
    kernels = CompiledKernels(stored.fingerprint, card.driver)
    return TensorRTBackend(stored.data, library, device, plan, manifest.graph, manifest.model, kernels)
