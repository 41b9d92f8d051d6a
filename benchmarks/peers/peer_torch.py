"""transformers on torch: the loop that most people run first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from engine import I64, files_in


def imports() -> None:
    """What is not counted as opening the model."""
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, DynamicCache  # noqa: F401


def convert(checkpoint: Path, folder: Path, variant: str) -> None:
    """The checkpoint in `variant`."""
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, variant)).save_pretrained(folder)


def model_files(folder: Path) -> list[Path]:
    """The weights."""
    return files_in(folder, "*.safetensors")


class Torch:
    """A cache that grows, logits of the last position only."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def prefill(self, ids: I64, new_tokens: int) -> I64:
        """See `Engine.prefill`."""
        import torch
        from transformers import DynamicCache

        self._cache = DynamicCache()
        self._token = self._step(torch.from_numpy(ids))
        first: I64 = self._token[:, 0].numpy()
        return first

    def decode(self, n: int) -> I64:
        """See `Engine.decode`."""
        tokens = np.empty((self._token.shape[0], n), np.int64)
        for i in range(n):
            self._token = self._step(self._token)
            tokens[:, i] = self._token[:, 0].numpy()
        return tokens

    def _step(self, ids: Any) -> Any:
        """int64 [B, n] to the next token [B, 1]."""
        import torch

        with torch.inference_mode():
            out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].argmax(-1, keepdim=True)


def load(folder: Path, threads: int, batch: int, tokens: int, variant: str) -> Torch:
    """In the type the weights are stored in."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    return Torch(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, variant)).eval())
