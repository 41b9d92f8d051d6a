"""What an engine is asked to be: taken from a bundle's manifest, checked against the network before the build, and named.

The fingerprint holds all that decides whether an engine fits: another one is refused by name, and built anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from dataclasses import dataclass
from typing import Any

from edgestill.runtime.backends import PREFILL_CHUNK, chunk_tokens
from edgestill.runtime.backends.fixed_cache import capacity_of
from edgestill.runtime.engines.capabilities import engine_problem
from edgestill.runtime.engines.flavour import FLAVOURS
from edgestill.runtime.errors import BadInput, BundleError
from edgestill.runtime.manifest import Graph, Manifest, ModelFacts, canonical_json

REVISION = 2
"""Of how engines are built here; raise it when the same graph would give another engine."""
PREFILL, DECODE = 0, 1
"""The two optimization profiles, by number."""
Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""(smallest, best served, largest) shape of an input."""


@dataclass(frozen=True)
class EnginePlan:
    """One engine: flavour, graph, and the shapes it serves."""

    flavour: str
    precision: str
    graph_file: str
    graph_sha256: str
    capacity: int
    """Slots of the cache."""
    max_batch: int
    prefill_tokens: int
    """Most tokens of one row in one step."""
    best_batch: int
    best_prompt: int
    best_attended: int
    kept_tokens: int = PREFILL_CHUNK
    """Most logits of one row in one step: those of a large vocabulary would take more memory than the model."""

    def shapes(self, name: str, shape: tuple[int | str, ...]) -> tuple[Range, Range]:
        """(prefill, decode) ranges of the graph input `name` of the declared `shape`."""
        sizes = {
            PREFILL: {
                "batch_size": (1, self.best_batch, self.max_batch),
                "new": (1, self.best_prompt, self.prefill_tokens),
                "kept": (1, 1, self.kept_tokens),
                "attended": (1, self.best_attended, self.capacity),
            },
            DECODE: {
                "batch_size": (1, self.best_batch, self.max_batch),
                "new": (1, 1, 1),
                "kept": (1, 1, 1),
                "attended": (1, self.best_attended, self.capacity),
            },
        }
        found = []
        for profile in (PREFILL, DECODE):
            symbols = sizes[profile]
            for symbol in (dim for dim in shape if isinstance(dim, str)):
                if symbol not in symbols:
                    raise BundleError(f"graph input {name} has an unknown size {symbol!r}; build the bundle again")
            found.append(
                tuple(tuple(dim if isinstance(dim, int) else symbols[dim][i] for dim in shape) for i in range(3))
            )
        return found[0], found[1]  # type: ignore[return-value]


def plan_of(manifest: Manifest) -> EnginePlan:
    """The engine that a bundle's profile asks for.

    Raises:
        BundleError: the bundle was not made for an engine.
    """
    work, graph, flavour = manifest.profile.get("workload", {}), manifest.graph, manifest.engine
    if graph.cache != "fixed":
        raise BundleError(f"{manifest.name}: its graph has a {graph.cache} cache, no engine can be built of it")
    capacity = capacity_of(graph)
    prompt, new = int(work.get("prompt_tokens", 128)), int(work.get("new_tokens", 64))
    batch = int(work.get("batch_size", 1))
    prefill = min(capacity, max(PREFILL_CHUNK, prompt))
    return EnginePlan(
        flavour=flavour,
        precision=manifest.precision.weights,
        graph_file=graph.file,
        graph_sha256=_graph_hash(manifest),
        capacity=capacity,
        max_batch=batch,
        prefill_tokens=prefill,
        best_batch=batch,
        best_prompt=min(prompt, prefill),
        best_attended=min(capacity, prompt + new),
        kept_tokens=min(prefill, chunk_tokens(manifest.model.vocab_size, batch)),
    )


def _graph_hash(manifest: Manifest) -> str:
    """Of the graph file and the files with its weights."""
    name = manifest.graph.file
    found = {file: entry.sha256 for file, entry in manifest.files.items() if file in (name, f"{name}.data")}
    return hashlib.sha256(canonical_json(found)).hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """All that decides whether an engine fits."""

    flavour: str
    version: str
    compute_capability: str
    system: str
    """Operating system and processor architecture; for an engine that is finished by its builder the system's version too."""
    driver: str | None
    """None for an engine built ahead, whose flavour is finished by the driver at hand."""
    gpu: str | None
    """The card's name where kernels were chosen on it; None where they are compiled on the card."""
    plan: EnginePlan
    revision: int = REVISION

    @property
    def digest(self) -> str:
        """16 hex digits, the name of the engine's folder."""
        return hashlib.sha256(canonical_json(dataclasses.asdict(self))).hexdigest()[:16]

    def differences(self, other: Fingerprint) -> list[str]:
        """What separates `other` from this one, each as `name: theirs, here ours`."""
        ours, theirs = _flat(self), _flat(other)
        return [
            f"{name}: {theirs.get(name)}, here {ours.get(name)}"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]


def _flat(fingerprint: Fingerprint) -> dict[str, Any]:
    fields = dataclasses.asdict(fingerprint)
    return {**fields.pop("plan"), **fields}


def fingerprint_of(
    plan: EnginePlan, version: str, compute_capability: str, driver: str | None, gpu: str | None = None
) -> Fingerprint:
    """The fingerprint of `plan` on a card; `gpu`: its name, which tells where the builder chose kernels by timing them there."""
    system = f"{platform.system().lower()} {platform.machine().lower()}"
    if not FLAVOURS[plan.flavour].times_kernels:
        return Fingerprint(plan.flavour, version, compute_capability, system, driver, None, plan)
    return Fingerprint(plan.flavour, version, compute_capability, f"{system} {_system_version()}", driver, gpu, plan)


def _system_version() -> str:
    """Of the operating system: `ubuntu 24.04`, or the release where it has no such file."""
    try:
        found = platform.freedesktop_os_release()
    except OSError:
        return platform.release()
    return f"{found['ID']} {found.get('VERSION_ID', '')}".strip()


def fingerprint_from(fields: dict[str, Any]) -> Fingerprint:
    """What `dataclasses.asdict` gave.

    Raises:
        TypeError, KeyError: it is another layout.
    """
    return Fingerprint(**{**fields, "plan": EnginePlan(**fields["plan"])})


def refuse_card(plan: EnginePlan, compute_capability: str, gpu: str | None) -> None:
    """Raise when the card at hand can't run the planned engine.

    Raises:
        BadInput: with the reason.
    """
    problem = engine_problem(plan.flavour, compute_capability, plan.precision, gpu)
    if problem is not None:
        raise BadInput(problem.line)


def check_network(network: Any, graph: Graph, facts: ModelFacts, numpy_name: Any) -> None:
    """Compare the parsed network with what the bundle declares: names, types and shapes of inputs and outputs.

    Raises:
        BundleError: anything that differs.
    """
    for kind, specs, count, get in (
        ("input", graph.inputs, network.num_inputs, network.get_input),
        ("output", graph.outputs, network.num_outputs, network.get_output),
    ):
        found = {tensor.name: tensor for tensor in map(get, range(count))}
        if found.keys() != {spec.name for spec in specs}:
            odd = sorted(found.keys() ^ {spec.name for spec in specs})
            raise BundleError(
                f"{graph.file}: the network and the manifest differ in {kind} {', '.join(odd)}; build the bundle again"
            )
        for spec in specs:
            tensor = found[spec.name]
            shape = tuple(tensor.shape)
            fits = len(shape) == len(spec.shape) and all(
                ours == -1 if isinstance(theirs, str) else ours in (theirs, -1)
                for ours, theirs in zip(shape, spec.shape, strict=True)
            )
            kind_found = numpy_name(tensor.dtype)
            if kind_found != spec.dtype or (kind == "input" and not fits):
                raise BundleError(
                    f"{graph.file}: {kind} {spec.name} is {kind_found} {shape} in the network and {spec.dtype} {spec.shape} in the "
                    "manifest; build the bundle again"
                )
    caches = [spec for spec in graph.inputs if spec.name.startswith("past_key_values.")]
    if len(caches) != 2 * facts.n_layers:
        raise BadInput(f"{graph.file}: {len(caches)} cache inputs for {facts.n_layers} layers; build the bundle again")
