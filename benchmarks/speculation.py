"""Prompt lookup against the plain loop on given texts: tokens per second, guesses, and the share that was right.

    python benchmarks/speculation.py build/quickstart/cpu-x86 examples/quickstart/corpus/prose/persuasion.txt
    python benchmarks/speculation.py BUNDLE TEXT --prompt-tokens 256 --new-tokens 192 --rounds 7 --json FILE

Both sides are the loop of `model.stream`, detokenizer included; only the choice is not the model's: it is the next token of a text,
so that both sides write the same. Two kinds of texts:

- quoting: a document, and a continuation that quotes 16 to 48 tokens of it at a time, 4 to 8 other tokens between two
- plain: a document and its own continuation

Sides alternate, A B A B, text by text; a ratio is per text and round. Greedy continuations of the same documents stand beside:
there the model repeats itself as much as it likes to.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from turns import summary, write_json

from edgestill.runtime import load
from edgestill.runtime.backends import F32, prefill_last
from edgestill.runtime.device import environment
from edgestill.runtime.generate import Ending, GenerationStatistics, generate_pieces
from edgestill.runtime.model import Model
from edgestill.runtime.sampling import Sampler, SamplingOptions
from edgestill.runtime.speculation import MAX_DRAFT, PromptLookup
from edgestill.runtime.text import StopStrings

RESULT = Path(__file__).parent / "results" / "speculation.json"
DOCUMENTS = 4
QUOTED, BETWEEN = (16, 48), (4, 8)
"""Tokens of a quotation, and of the text between two."""


class Given(Sampler):
    """Chooses the tokens of a text, at the cost of choosing greedily."""

    def __init__(self, tokens: Sequence[int], vocab_size: int) -> None:
        super().__init__(SamplingOptions(), vocab_size)
        self._tokens = iter(tokens)

    def choose(self, logits: F32) -> tuple[int, float]:
        """The next token of the text, its log-probability as greedy choice has it."""
        _, logprob = super().choose(logits)
        return next(self._tokens), logprob


def texts(tokens: np.ndarray, prompt: int, new: int, seed: int) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Kind -> (prompt, continuation) of every document, int lists."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[tuple[list[int], list[int]]]] = {"quoting": [], "plain": []}
    for start in rng.choice(len(tokens) - 2 * (prompt + new), DOCUMENTS, replace=False).tolist():
        document = tokens[start : start + prompt].tolist()
        following = tokens[start + prompt : start + prompt + 2 * new].tolist()
        found["plain"].append((document, following[:new]))
        found["quoting"].append((document, list(_quoting(document, following, rng))[:new]))
    return found


def _quoting(document: list[int], other: list[int], rng: np.random.Generator) -> Iterator[int]:
    at = 0
    while at < len(other) - BETWEEN[1]:
        length = int(rng.integers(*QUOTED, endpoint=True))
        begin = int(rng.integers(0, max(1, len(document) - length)))
        yield from document[begin : begin + length]
        between = int(rng.integers(*BETWEEN, endpoint=True))
        yield from other[at : at + between]
        at += between


def run(model: Model, prompt: list[int], sampler: Sampler, new: int, lookup: bool) -> GenerationStatistics:
    """One text."""
    ending = Ending(new, frozenset(), frozenset())
    drafter = PromptLookup() if lookup else None
    pieces = generate_pieces(model.backend, prompt, sampler, model.detokenizer(), StopStrings([]), ending, drafter)
    for piece in pieces:
        if piece.statistics is not None:
            return piece.statistics
    raise RuntimeError("a text without an end")


def pass_costs(model: Model, prompt: np.ndarray, rounds: int = 40) -> dict[int, float]:
    """Median time of a pass over n tokens behind `prompt`, in passes over one, n = 1 .. MAX_DRAFT + 1 in turn."""
    backend = model.backend
    state = backend.new_state(1, len(prompt) + MAX_DRAFT + 1)
    prefill_last(backend, state, prompt[None])
    seconds: dict[int, list[float]] = {n: [] for n in range(1, MAX_DRAFT + 2)}
    for _ in range(rounds):
        for n, seen in seconds.items():
            started = perf_counter()
            backend.step(state, prompt[None, :n])
            seen.append(perf_counter() - started)
            backend.rewind(state, len(prompt))
    one = np.median(seconds[1])
    return {n: round(float(np.median(seen) / one), 2) for n, seen in seconds.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, default=RESULT)
    given = parser.parse_args()
    model = load(given.bundle, threads=given.threads)
    ids = np.array(model.tokenize(given.text.read_text(encoding="utf-8")[:400_000], add_special_tokens=False))
    new, vocab = given.new_tokens, model.facts.vocab_size
    kinds = texts(ids, given.prompt_tokens, new, seed=0)
    found: dict[str, Any] = {}
    for kind in (*kinds, "greedy"):
        rates: dict[bool, list[float]] = {False: [], True: []}
        guessed = accepted = 0
        for number in range(given.rounds + 1):  # the first is warm-up
            for prompt, continuation in kinds.get(kind, kinds["plain"]):
                for lookup in (False, True):
                    sampler = Sampler(SamplingOptions(), vocab) if kind == "greedy" else Given(continuation, vocab)
                    statistics = run(model, prompt, sampler, new, lookup)
                    guessed += statistics.guessed_tokens * (number > 0)
                    accepted += statistics.accepted_tokens * (number > 0)
                    if number:
                        rates[lookup].append(1e3 * (new - 1) / sum(statistics.inter_token_ms))
        ratios = [fast / plain for plain, fast in zip(rates[False], rates[True], strict=True)]
        found[kind] = {
            "plain_tokens_per_s": summary(rates[False]),
            "lookup_tokens_per_s": summary(rates[True]),
            "ratio": summary(ratios),
            "guesses_per_token": round(guessed / (given.rounds * DOCUMENTS * new), 3),
            "acceptance_rate": round(accepted / guessed, 3) if guessed else None,
        }
        print(f"{kind}: {json.dumps(found[kind])}", flush=True)
    costs = pass_costs(model, ids[: given.prompt_tokens])
    print(f"pass cost: {json.dumps(costs)}")
    settings = {name: getattr(given, name) for name in ("prompt_tokens", "new_tokens", "rounds")}
    about = {"model": model.manifest.name, "parameters": model.facts.parameters, "session": model.backend.session}
    write_json(
        given.json, {"settings": settings, **about, "environment": environment(), "kinds": found, "pass_cost": costs}
    )


if __name__ == "__main__":
    main()
