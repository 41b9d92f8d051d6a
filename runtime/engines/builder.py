"""An engine from a bundle's ONNX: parsed, compared with the manifest, given its two profiles, built.

    prefill   up to `prefill_tokens` new tokens a row
    decode    one new token a row, so that its kernels are chosen for that and its CUDA graph has one shape

Types are those of the graph (strongly typed); attention without a kernel of its own may decompose. Runs in a process of its own
(child.py), for a build takes memory and time that are not the workload's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgestill.runtime.engines.flavour import Library
from edgestill.runtime.engines.plan import DECODE, PREFILL, EnginePlan, check_network
from edgestill.runtime.errors import BadInput
from edgestill.runtime.manifest import Graph, ModelFacts

Step = Callable[[str, int, int], None]
"""Called with (phase, done, total)."""


@dataclass(frozen=True)
class BuiltEngine:
    """An engine's bytes and how they came about."""

    data: bytes
    layers: int
    """Of the network, before the builder fuses them."""
    attention_layers: int
    parse_seconds: float
    build_seconds: float
    timing_cache: bytes | None
    """Measured kernel times, which make the next build of a like engine quick."""


class EngineBuilder:
    """Builds engines with one flavour."""

    def __init__(self, library: Library, log: Callable[[str], None], step: Step | None = None) -> None:
        """`log` receives the builder's lines, `step` its progress."""
        self._library, self._log, self._step = library, log, step
        self._errors: list[str] = []

    def build(
        self,
        graph_path: Path,
        plan: EnginePlan,
        graph: Graph,
        facts: ModelFacts,
        compute_capability: str | None,
        timing_cache: bytes = b"",
    ) -> BuiltEngine:
        """The engine of `plan` for a card of `compute_capability` (None: the one at hand).

        Raises:
            MissingPart: CUDA does not start.
            BadInput: TensorRT refuses the graph or the card; its first error stands in the line.
            BundleError: the graph is not what the manifest says.
        """
        trt = self._library.trt
        started = time.perf_counter()
        builder = self._library.builder(self._line)
        network = self._library.network(builder)
        parser = trt.OnnxParser(network, builder.logger)
        if not parser.parse_from_file(str(graph_path)):  # by name, so that weights in a file beside it are found
            why = " ".join(str(parser.get_error(0).desc()).split())[:300] if parser.num_errors else ""
            raise BadInput(
                f"{self._name} can't read {graph_path.name} ({why or self._why()}); upgrade it or build the bundle again"
            )
        check_network(network, graph, facts, self._library.numpy_name)
        attention = self._library.let_attention_decompose(network)
        parsed = time.perf_counter()
        config = self.config(builder, compute_capability)
        for profile in self.profiles(builder, plan, graph):
            if config.add_optimization_profile(profile) < 0:
                raise BadInput(
                    f"{self._name} refuses the shapes of the workload ({self._why()}); change the profile's workload"
                )
        cache = self._timing_cache(config, timing_cache)
        if self._step is not None:
            config.progress_monitor = self._library.progress_monitor(self._step)
        data = builder.build_serialized_network(network, config)
        if data is None:
            raise BadInput(
                f"{self._name} builds no engine of {graph_path.name} ({self._why()}); see build.log, or use engine onnxruntime-cpu"
            )
        measured = None if cache is None else bytes(cache.serialize())
        return BuiltEngine(
            bytes(data), network.num_layers, attention, parsed - started, time.perf_counter() - parsed, measured
        )

    def config(self, builder: Any, compute_capability: str | None) -> Any:
        """A builder's config for a card.

        Raises:
            BadInput: this flavour does not build for it.
        """
        config = builder.create_builder_config()
        # without this the inspector names layers and no types: whether a product reads integers could not be seen
        config.profiling_verbosity = self._library.trt.ProfilingVerbosity.DETAILED
        self._library.target(config, compute_capability)
        return config

    def profiles(self, builder: Any, plan: EnginePlan, graph: Graph) -> list[Any]:
        """The two optimization profiles, prefill first.

        Raises:
            BadInput: TensorRT refuses a range.
        """
        found = []
        for number in (PREFILL, DECODE):
            profile = builder.create_optimization_profile()
            for spec in graph.inputs:
                least, best, most = plan.shapes(spec.name, spec.shape)[number]
                try:
                    profile.set_shape(spec.name, least, best, most)
                except (RuntimeError, ValueError) as refusal:
                    raise BadInput(f"{self._name} refuses {spec.name} from {least} to {most} ({refusal})") from refusal
            found.append(profile)
        return found

    @property
    def _name(self) -> str:
        return f"{self._library.flavour.name} {self._library.version}"

    def _line(self, line: str) -> None:
        if "error" in line.partition(":")[0]:
            self._errors.append(line.partition(": ")[2])
        self._log(line)

    def _why(self) -> str:
        return " ".join(self._errors[0].split())[:300] if self._errors else "no reason was given"

    def _timing_cache(self, config: Any, known: bytes) -> Any:
        """The config's timing cache, filled with what is known where this card takes it; None where the flavour keeps none."""
        if not self._library.flavour.times_kernels:
            return None
        for content in dict.fromkeys((known, b"")):  # one of another card or version, or damaged, is replaced
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, False):
                return config.get_timing_cache()
        return None
