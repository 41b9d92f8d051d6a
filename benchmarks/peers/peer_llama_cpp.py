"""llama.cpp through llama-cpp-python's bindings of its C API: what its own tools call, without the Python class on top."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from engine import I64, files_in

FILE = "model.gguf"


def imports() -> None:
    """What is not counted as opening the model."""
    import llama_cpp

    llama_cpp.llama_log_set(_no_log(), ctypes.c_void_p(0))


@functools.cache
def _no_log() -> Any:
    """Cached to keep it alive: the library calls it to the end."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def convert(checkpoint: Path, folder: Path, variant: str) -> None:
    """float32 GGUF, then llama.cpp's own quantization."""
    import llama_cpp
    from llama_gguf import write_gguf

    folder.mkdir(parents=True)
    whole = folder / "float32.gguf"
    write_gguf(checkpoint, whole)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant}")
    parameters.nthread = 1
    status = llama_cpp.llama_model_quantize(str(whole).encode(), str(folder / FILE).encode(), ctypes.byref(parameters))
    whole.unlink()
    if status != 0:
        raise SystemExit(f"llama_model_quantize ended with status {status}")


def model_files(folder: Path) -> list[Path]:
    """The quantized file."""
    return files_in(folder, FILE)


class Tokens:
    """A `llama_batch` of `size` tokens with its fields as arrays."""

    def __init__(self, size: int) -> None:
        import llama_cpp

        self.size = size
        self.batch = llama_cpp.llama_batch_init(size, 0, 1)
        fields = (self.batch.token, self.batch.pos, self.batch.n_seq_id, self.batch.logits)
        self._token, self._pos, n_seq_id, self._logits = (np.ctypeslib.as_array(field, (size,)) for field in fields)
        n_seq_id[:] = 1

    def fill(self, ids: I64, positions: I64, rows: I64, wanted: npt.NDArray[np.bool_]) -> Any:
        """The batch, of flat `ids` at `positions` of sequences `rows`; logits where `wanted`."""
        n = self.batch.n_tokens = len(ids)
        self._token[:n], self._pos[:n], self._logits[:n] = ids, positions, wanted
        for i, row in enumerate(rows.tolist()):
            self.batch.seq_id[i][0] = row
        return self.batch


class LlamaCpp:
    """A context per number of rows, with a sequence for each row: sequences share a context's cells."""

    def __init__(self, model: Any, threads: int, tokens: int) -> None:
        import llama_cpp

        self._lib, self._model, self._threads, self._tokens = llama_cpp, model, threads, tokens
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._contexts: dict[int, tuple[Any, Tokens, Tokens]] = {}

    def prefill(self, ids: I64, new_tokens: int) -> I64:
        """See `Engine.prefill`."""
        B, T = ids.shape
        self.choose_rows(B)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        flat, positions, rows = ids.reshape(-1), np.tile(np.arange(T), B), np.repeat(np.arange(B), T)
        ends = positions == T - 1
        found = []
        for start in range(0, B * T, self._prompt.size):
            part = slice(start, start + self._prompt.size)
            self._run(self._prompt.fill(flat[part], positions[part], rows[part], ends[part]))
            found += [self._best(i) for i in np.flatnonzero(ends[part]).tolist()]
        self._last, self._length = np.array(found, np.int64), T
        return self._last

    def decode(self, n: int) -> I64:
        """See `Engine.decode`."""
        B = len(self._last)
        rows, wanted = np.arange(B), np.ones(B, np.bool_)
        tokens = np.empty((B, n), np.int64)
        for i in range(n):
            self._run(self._step.fill(self._last, np.full(B, self._length), rows, wanted))
            self._last = np.array([self._best(row) for row in range(B)], np.int64)
            self._length += 1
            tokens[:, i] = self._last
        return tokens

    def choose_rows(self, rows: int) -> None:
        """Go on with the context for `rows` sequences; its defaults but for sizes and threads."""
        if rows not in self._contexts:
            parameters = self._lib.llama_context_default_params()
            parameters.n_seq_max, parameters.n_ctx = rows, rows * self._tokens
            parameters.n_threads = parameters.n_threads_batch = self._threads
            context = self._lib.llama_init_from_model(self._model, parameters)
            if not context:
                raise ValueError(f"no context for {rows} x {self._tokens} tokens")
            self._contexts[rows] = context, Tokens(self._lib.llama_n_batch(context)), Tokens(rows)
        self._context, self._prompt, self._step = self._contexts[rows]

    def _run(self, batch: Any) -> None:
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise ValueError(f"llama_decode returned {status}")

    def _best(self, index: int) -> int:
        """Greedy choice from the logits of the batch's token `index`."""
        logits = self._lib.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())


def load(folder: Path, threads: int, batch: int, tokens: int, variant: str) -> LlamaCpp:
    """Model, and a context for one row: it is part of being ready."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(folder / FILE).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise ValueError(f"{FILE} can't be loaded")
    engine = LlamaCpp(model, threads, tokens)
    engine.choose_rows(1)
    return engine
