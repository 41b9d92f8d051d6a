"""CTranslate2. It generates in one call; its callback at every token holds it between the prompt and the further tokens."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from engine import I64, files_in

PATIENCE_S = 60.0
"""A prompt whose further tokens nobody asks for goes on after this."""


def imports() -> None:
    """What is not counted as opening the model."""
    import ctranslate2  # noqa: F401


def convert(checkpoint: Path, folder: Path, variant: str) -> None:
    """Its converter for transformers, weights in `variant`."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(checkpoint), low_cpu_mem_usage=True).convert(str(folder), quantization=variant)


def model_files(folder: Path) -> list[Path]:
    """The weights."""
    return files_in(folder, "model.bin")


class CTranslate2:
    """A generation runs in a thread and waits, once the first token of every row is known, for `decode`."""

    def __init__(self, generator: Any, words: list[str]) -> None:
        self._generator, self._words = generator, words
        self._pool = ThreadPoolExecutor(1)
        self._go_on = Event()
        self._running: Future[Any] | None = None

    def prefill(self, ids: I64, new_tokens: int) -> I64:
        """See `Engine.prefill`."""
        first, known = np.full(len(ids), -1, np.int64), Event()
        self._go_on = go_on = Event()

        def callback(step: Any) -> bool:
            if step.step == 0:
                first[step.batch_id] = step.token_id
                if (first >= 0).all():
                    known.set()
                    go_on.wait(PATIENCE_S)
            return False

        if new_tokens == 0:
            go_on.set()
        prompts = [[self._words[i] for i in row] for row in ids.tolist()]
        self._running = self._pool.submit(
            self._generator.generate_batch,
            prompts,
            include_prompt_in_result=False,  # otherwise the prompt is decoded token by token
            max_length=new_tokens + 1,
            min_length=new_tokens + 1,  # rules out the end of text
            callback=callback,
        )
        self._running.add_done_callback(lambda _: known.set())  # so that a failure is not waited for
        known.wait()
        if new_tokens == 0 or self._running.done():
            self._running.result()
        return first

    def decode(self, n: int) -> I64:
        """See `Engine.decode`."""
        if self._running is None:
            raise ValueError("no prompt was run")
        self._go_on.set()
        return np.array([result.sequences_ids[0][1:] for result in self._running.result()], np.int64)


def load(folder: Path, threads: int, batch: int, tokens: int, variant: str) -> CTranslate2:
    """It takes prompts as words of its vocabulary."""
    import ctranslate2

    generator = ctranslate2.Generator(str(folder), device="cpu", compute_type=variant, intra_threads=threads)
    return CTranslate2(generator, json.loads((folder / "vocabulary.json").read_text(encoding="utf-8")))
