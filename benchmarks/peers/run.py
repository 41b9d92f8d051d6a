"""A checkpoint on every engine that is installed, measured in turn: speed, time to first token, load, memory, size.

    python benchmarks/peers/run.py                                    # random weights, 134.5 M parameters; about an hour
    python benchmarks/peers/run.py my/checkpoint --peers ours,llama.cpp --rounds 3
    python benchmarks/peers/run.py --python peers/bin/python --python onnxruntime-genai=genai/bin/python

Without CHECKPOINT a Llama with seeded random weights is made (hidden 576, 30 layers, 9 heads, 3 of keys and values, MLP 1536,
vocabulary 49,152, tied, 2,048 positions): what a token costs does not depend on what the weights say. It is converted for each
peer by the peer's own tools, and once more only when the checkpoint, the peer's version or the code that converts changes. Peers
often do not fit beside ours or beside each other, so each runs in the interpreter that `--python` names for it, or for all; ours
runs in this one. A peer whose packages are missing, or that can't convert or run the checkpoint, is left out, with the reason.

- Everybody gets the same token ids, other ones at every turn, and the same threads; the choice is greedy, end of text is ignored,
  the number of tokens is checked. Prefix caches are off.
- Each peer stays loaded in a process of its own and waits for its turns. A round is every (batch, depth) once, and at each the
  peers take turns, A B C, A B C, with a pause before each for threads that spin after work. The processor time that a process used
  while it waited stands in the JSON. One round is warm-up and not counted.
- prefill: from an empty cache to the first next token of a prompt of `depth` tokens a row, making room included. decode: 64 further
  tokens after it. first token: the same as prefill, batch 1, 128 tokens.
- load, first prompt / second and peak RSS come from a process that does nothing else, once a round, with the files in the page
  cache: loading (imports excluded; ours hashes its files), two
  first tokens, one generation up to a cache of 512.
- model files: what is read to run the model, without the tokenizer. bandwidth fraction: their bytes x decode tokens/s at batch 1
  and the smallest depth / the read bandwidth measured here.
- agreement: how many leading tokens a peer shares with the first float peer measured, in the warm-up. It shows that all run the
  same model, not how well: with random weights the best tokens lie close together.

Writes every round, medians, and ours / peer per round with its median as JSON; beside it a table (.md) and a plot (.png, .svg).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # turns.py serves all benchmarks

from checkpoint import describe, random_checkpoint
from conversion import ANSWER_S, WORKER, LeftOut, answer, converted, installed, interpreter_of
from registry import PEERS, Peer, chosen
from results import cell_name, leading_agreement, plot, round_values, summarise, table
from turns import Side, write_json

from edgestill.runtime.device import conditions, environment, memory_bandwidth_gb_per_s
from edgestill.runtime.errors import MissingPart

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "peers.json"
WARM_UP, SETTLE_S, SEED = 1, 0.3, 1
FIRST = "first token"
FLOAT = ("torch-float32", "torch-bfloat16", "llama.cpp-q8_0")


class Contestant:
    """A peer, its interpreter and its folder; what was measured of it."""

    def __init__(
        self, peer: Peer, python: str, versions: Mapping[str, str], folder: Path, facts: Mapping[str, Any]
    ) -> None:
        self.peer, self.python, self.versions, self.folder = peer, python, versions, folder
        self.files: dict[str, int] = facts["files"]
        self.conversion_s: float = facts["seconds"]
        self.turns: list[dict[str, dict[str, Any]]] = []
        """Per round: cell -> what the worker said. The warm-up's come first."""
        self.fresh: list[dict[str, Any]] = []

    def facts(self) -> dict[str, Any]:
        """Its part of the JSON."""
        size = sum(self.files.values())
        rounds = zip(self.turns[WARM_UP:], self.fresh, strict=True)
        raw = [
            {name: {k: v for k, v in turn.items() if k != "tokens"} for name, turn in row.items()} for row in self.turns
        ]
        return {
            "about": self.peer.about,
            "versions": dict(self.versions),
            "files": self.files,
            "conversion_s": self.conversion_s,
            "rounds": [round_values(turns, fresh, size) for turns, fresh in rounds],
            "raw": {"warm_up": raw[:WARM_UP], "turns": raw[WARM_UP:], "fresh": self.fresh},
        }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"type": lambda text: [int(word) for word in text.split(",")], "metavar": "N,N"}
    parser.add_argument("checkpoint", nargs="?", type=Path, help="folder of a Hugging Face causal LM")
    parser.add_argument(
        "--peers", default=",".join(peer.name for peer in PEERS), help="names, or families such as torch"
    )
    parser.add_argument(
        "--python", action="append", default=[], metavar="[PEER=]PATH", help="interpreter of the peers, or of one"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="converted models are kept here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depths", default=[128, 512, 1500], **numbers)
    parser.add_argument("--batches", default=[1, 4], **numbers)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of the time to first token")
    parser.add_argument("--json", type=Path, default=RESULT)
    found = parser.parse_args()
    try:
        found.peers = chosen(found.peers.split(","))
    except ValueError as wrong:
        parser.error(str(wrong))
    smallest = (found.threads, found.rounds, found.new_tokens, found.prompt_tokens, *found.depths, *found.batches)
    if min(smallest) < 1:
        parser.error("threads, rounds, depths, batches and tokens are at least 1")
    found.python = {name: path for name, _, path in (word.rpartition("=") for word in found.python)}
    return found


def job_of(options: argparse.Namespace, shape: Mapping[str, Any]) -> dict[str, Any]:
    """What every worker is told.

    Raises:
        SystemExit: the deepest cell does not fit the model.
    """
    longest = max(max(options.depths) + options.new_tokens, options.prompt_tokens) + 1
    limit = shape["max_position_embeddings"]
    if longest > limit:
        raise SystemExit(
            f"{longest} tokens exceed the {limit} positions of this checkpoint; lower --depths or --new-tokens"
        )
    return {
        "threads": options.threads,
        "vocab_size": shape["vocab_size"],
        "max_tokens": limit - 1,
        "seed": SEED,
        "new_tokens": options.new_tokens,
        "first_token_prompt": options.prompt_tokens,
        "cells": [[batch, depth] for batch in options.batches for depth in options.depths],
    }


def enter(
    options: argparse.Namespace, checkpoint: Path, identity: str, job: Mapping[str, Any]
) -> tuple[list[Contestant], dict[str, str]]:
    """Everybody who can take part, and why the others cannot. Each is tried once, which also warms the page cache."""
    ready, left_out = [], {}
    work: Path = options.work / identity[:12]
    work.mkdir(parents=True, exist_ok=True)
    for peer in options.peers:
        python = interpreter_of(peer, options.python)
        say(f"{peer.name}: convert and try")
        try:
            versions = installed(peer, python)
            folder, facts = converted(peer, python, checkpoint, identity, versions, work)
            answer(python, ["fresh", peer.name, str(folder), json.dumps(job)], ANSWER_S)
        except LeftOut as why:
            left_out[peer.name] = str(why)
            say(f"{peer.name}: left out: {why}")
            continue
        ready.append(Contestant(peer, python, versions, folder, facts))
    return ready, left_out


def measure(contestants: Sequence[Contestant], job: Mapping[str, Any], rounds: int) -> None:
    """Every cell of every round by everybody in turn; then, as part of the round, a fresh process each."""
    names = [*(cell_name(batch, depth) for batch, depth in job["cells"]), FIRST]
    words = json.dumps(job)
    with ExitStack() as stack:
        sides = []
        for one in contestants:
            command = [str(WORKER), "turns", one.peer.name, str(one.folder), words]
            sides.append(stack.enter_context(Side(one.peer.name, command, python=one.python)))
        for side in sides:
            side.heard()  # all are ready before the first turn
        for number in range(WARM_UP + rounds):
            say(f"round {number + 1 - WARM_UP} of {rounds}" if number >= WARM_UP else "warm-up")
            for one in contestants:
                one.turns.append({})
            for name in names:
                for one, side in zip(contestants, sides, strict=True):
                    time.sleep(SETTLE_S)
                    turn = side.turn()
                    one.turns[-1][name] = {**turn, "new_tokens": len(turn["tokens"][0]) - 1}
            for one in contestants if number >= WARM_UP else ():
                time.sleep(SETTLE_S)
                one.fresh.append(answer(one.python, ["fresh", one.peer.name, str(one.folder), words], ANSWER_S))


def agreement(contestants: Sequence[Contestant]) -> dict[str, Any]:
    """Leading greedy tokens shared with the first float peer there is, mean over the warm-up's rows."""
    judge = next((one for name in FLOAT for one in contestants if one.peer.name == name), None)
    if judge is None:
        return {"with": None, "reason": f"none of {', '.join(FLOAT)} was measured"}
    rows = {one.peer.name: [row for turn in one.turns[0].values() for row in turn["tokens"]] for one in contestants}
    tokens = {name: leading_agreement(rows[judge.peer.name], found) for name, found in rows.items()}
    return {"with": judge.peer.name, "mean_leading_tokens": tokens}


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def commit() -> str | None:
    """What is checked out, None outside git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def main() -> None:
    """Convert, measure, write."""
    options = arguments()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint = (options.checkpoint or random_checkpoint(options.work / "random-134m")).resolve()
    shape = describe(checkpoint)
    job = job_of(options, shape)
    contestants, left_out = enter(options, checkpoint, shape["sha256"], job)
    if not contestants:
        raise SystemExit("no peer can be measured; the reasons are above")
    machine = {**environment(), "memory_bandwidth_gb_per_s": memory_bandwidth_gb_per_s(), "commit": commit()}
    try:
        measure(contestants, job, options.rounds)
    except LeftOut as why:
        raise SystemExit(f"a peer that had been tried stopped while it was measured: {why}") from why
    settings = {
        "checkpoint": shape,
        "threads": options.threads,
        "rounds": options.rounds,
        "warm_up": f"{WARM_UP} round of every cell, excluded",
        "pause_before_a_turn_s": SETTLE_S,
        "batches": options.batches,
        "depths": options.depths,
        "new_tokens": options.new_tokens,
        "first_token_prompt": options.prompt_tokens,
        "seed": SEED,
    }
    found = summarise(
        {
            "environment": {**machine, "end": conditions()},
            "settings": settings,
            "peers": {one.peer.name: one.facts() for one in contestants},
            "left_out": left_out,
            "agreement": agreement(contestants),
        }
    )
    write_json(options.json, found)
    options.json.with_suffix(".md").write_text(table(found), encoding="utf-8")
    print(table(found))
    try:
        plot(found, options.json)
    except MissingPart as missing:
        say(f"no plot: {missing}")


if __name__ == "__main__":
    main()
