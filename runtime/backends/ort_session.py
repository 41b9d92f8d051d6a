"""Opening a graph in onnxruntime, on the CPU or on the GPU by its CUDA provider.

On the GPU nothing may run on the CPU unasked, where onnxruntime would put what its provider has no kernel for, or all of it when
CUDA does not start: that is an error here. A CUDA graph of the decode step is asked for, and done without where it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from edgestill.runtime.errors import BundleError, MissingPart

Place = Literal["cpu", "cuda"]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
NO_CPU = {"session.disable_cpu_ep_fallback": "1"}
NOT_ALL_ON_GPU = "fallback to CPU EP has been explicitly disabled"
NO_CAPTURE = "graph capture feature"
"""Words of onnxruntime's refusals."""
NO_CUDA = "CUDA failure"


@dataclass(frozen=True)
class Opened:
    """A session, and what became of recording its decode step."""

    session: Any
    captures: bool
    why_not: str = ""


@cache
def refusals() -> tuple[type[Exception], ...]:
    """What onnxruntime raises, none of which derives from another."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.EPFail,
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NoSuchFile,
        state.NotImplemented,
        state.RuntimeException,
        RuntimeError,
    )


def open_session(
    graph_path: Path, threads: int, entries: Mapping[str, str], place: Place, *, capture: bool = True
) -> Opened:
    """The graph in a session. `capture`: on the GPU, one whose decode step can be recorded, where onnxruntime lets it.

    Raises:
        MissingPart: this onnxruntime has no CUDA provider, or it does not start.
        BundleError: onnxruntime can't open the graph, or not all of it on the GPU.
    """
    import onnxruntime

    provider = PROVIDERS[place]
    if provider not in onnxruntime.get_available_providers():
        raise MissingPart(
            f"this onnxruntime has no {provider}",
            "pip uninstall onnxruntime, then pip install 'edgestill[cuda]', on a machine with an NVIDIA driver",
        )
    if place == "cpu":
        return Opened(_open(graph_path, threads, entries, provider), captures=False)
    strict, why_not = {**entries, **NO_CPU}, ""
    if capture:
        try:
            session = _open(graph_path, threads, strict, (provider, {"enable_cuda_graph": "1"}))
        except BundleError as refusal:
            if NO_CAPTURE not in str(refusal):
                raise
            why_not = "refused by onnxruntime: not all of the graph is on the GPU"
        else:
            return Opened(_on_gpu(session, provider), captures=True)
    return Opened(_on_gpu(_open(graph_path, threads, strict, provider), provider), captures=False, why_not=why_not)


def _open(graph_path: Path, threads: int, entries: Mapping[str, str], provider: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = (
        False  # it keeps a plan per input shape, and every step of a growing cache is a new shape
    )
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    try:
        # without enable_fallback=0 the Python wrapper tries again on the CPU, by itself
        return onnxruntime.InferenceSession(str(graph_path), options, providers=[provider], enable_fallback=0)
    except refusals() as refusal:
        raise _named(graph_path, " ".join(str(refusal).split())) from refusal


def _named(graph_path: Path, why: str) -> BundleError | MissingPart:
    """A refusal of onnxruntime in our words."""
    import onnxruntime

    ours = f"onnxruntime {onnxruntime.__version__}"
    if NO_CUDA in why:
        return MissingPart(
            f"CUDA does not start in {ours} ({why[:200]})", "run this on the target, or update its driver"
        )
    if NOT_ALL_ON_GPU in why:
        return BundleError(
            f"{graph_path}: {ours} has no CUDA kernel for some of the graph and would run that on the CPU; "
            "upgrade onnxruntime-gpu, or build the bundle for engine tensorrt"
        )
    return BundleError(f"{graph_path}: {ours} can't open it ({why}); upgrade onnxruntime or build the bundle again")


def _on_gpu(session: Any, provider: str) -> Any:
    """The session, whose provider is there: where its libraries do not load, onnxruntime goes on without it."""
    if provider not in session.get_providers():
        raise MissingPart(
            f"onnxruntime's {provider} does not load: libraries of CUDA or cuDNN are missing",
            "pip install 'onnxruntime-gpu[cuda,cudnn]'",
        )
    return session
