"""Bundle in, tokens and measurements out: numpy, onnxruntime and tokenizers, no training stack.

    from edgestill.runtime import load

    model = load("build/quickstart/cpu-x86")
    for piece in model.stream("It was a bright cold day", max_new_tokens=64):
        print(piece.text, end="", flush=True)

Names are loaded when they are first used, so that the import costs nothing an application does not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgestill.runtime.bundle import Bundle, open_bundle, verify_bundle
    from edgestill.runtime.errors import BadInput, BundleError, EdgestillError, MissingPart, PromptTooLong
    from edgestill.runtime.generate import Generation, GenerationStatistics, Piece
    from edgestill.runtime.model import Model, load
    from edgestill.runtime.sampling import SamplingOptions

__all__ = [
    "BadInput",
    "Bundle",
    "BundleError",
    "EdgestillError",
    "Generation",
    "GenerationStatistics",
    "MissingPart",
    "Model",
    "Piece",
    "PromptTooLong",
    "SamplingOptions",
    "load",
    "open_bundle",
    "verify_bundle",
]

_HOMES = {
    "bundle": ("Bundle", "open_bundle", "verify_bundle"),
    "errors": ("BadInput", "BundleError", "EdgestillError", "MissingPart", "PromptTooLong"),
    "generate": ("Generation", "GenerationStatistics", "Piece"),
    "model": ("Model", "load"),
    "sampling": ("SamplingOptions",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
