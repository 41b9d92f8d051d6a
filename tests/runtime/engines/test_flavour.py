"""What a TensorRT is told, by one that writes it down, and by the one that is installed."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from edgestill.runtime.engines.builder import EngineBuilder
from edgestill.runtime.engines.flavour import FLAVOURS, Library, open_library
from edgestill.runtime.errors import MissingPart


def library(name: str, **words: Any) -> Library:
    """A flavour whose module has `words`."""
    severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)
    module = ModuleType(name)
    logger = type("ILogger", (), {"Severity": severity})
    module.__dict__.update({"__version__": "11.4", "ILogger": logger, **words})
    return Library(FLAVOURS[name], module)


@pytest.mark.parametrize("kind", ["runtime", "builder"])
def test_tensorrt_without_cuda_is_one_line(kind: str) -> None:
    def nothing(logger: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(
        MissingPart, match=r"^tensorrt 11.4 does not start: CUDA finds no GPU.*; run this on the target"
    ):
        getattr(library("tensorrt", Runtime=nothing, Builder=nothing), kind)(print)


def test_a_mistake_of_ours_is_not_called_a_missing_gpu() -> None:
    def wrong(logger: Any) -> None:
        raise TypeError("__init__(): incompatible constructor arguments")

    with pytest.raises(TypeError, match="incompatible"):
        library("tensorrt", Runtime=wrong).runtime(print)


def test_kernels_are_compiled_beside_a_text_and_before_a_measurement() -> None:
    caches = iter(("cache", "another"))
    engine = SimpleNamespace(
        create_runtime_config=lambda: SimpleNamespace(
            create_runtime_cache=lambda: next(caches), set_runtime_cache=lambda cache: None
        )
    )
    ours = library(
        "tensorrt-rtx",
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(LAZY="lazy", EAGER="eager"),
    )
    first = ours.running(engine, b"")
    assert (first.config.dynamic_shapes_kernel_specialization_strategy, first.cache) == ("lazy", "cache")
    second = ours.running(engine, b"", first)
    assert (second.config.dynamic_shapes_kernel_specialization_strategy, second.cache) == ("eager", "cache")


@pytest.mark.parametrize("known", [b"of another card", b"damaged", b""])
def test_a_timing_cache_that_is_refused_gives_way_to_an_empty_one(known: bytes) -> None:
    taken: list[bytes] = []
    config = SimpleNamespace(
        create_timing_cache=lambda content: None if content == b"damaged" else content,
        set_timing_cache=lambda cache, ignore_mismatch: cache == b"" and taken.append(cache) is None,
        get_timing_cache=lambda: "cache",
    )
    assert EngineBuilder(library("tensorrt"), print)._timing_cache(config, known) == "cache"
    assert taken == [b""]


def test_the_words_that_are_used_exist_in_the_installed_tensorrt() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs pip install 'edgestill[rtx]'")
    trt = open_library("tensorrt-rtx").trt
    kinds = trt.DynamicShapesKernelSpecializationStrategy
    assert {"LAZY", "EAGER"} <= kinds.__members__.keys()
    assert hasattr(trt.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
    ours = open_library("tensorrt-rtx")
    config = EngineBuilder(ours, lambda _: None).config(ours.builder(lambda _: None), "8.9")
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
