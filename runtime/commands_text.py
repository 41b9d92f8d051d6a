"""`generate` and `chat`: use a bundle from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from edgestill.runtime.commands_shared import BundleArgument, require_bundle
from edgestill.runtime.progress import Progress

MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", metavar="N", help="Stop after N tokens; else when the model is full.")
]
Temperature = Annotated[
    float | None, typer.Option(metavar="T", help="0: always the most likely token; above: draw, wilder with more.")
]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="K", help="Draw among the K most likely; 0: all.")]
TopP = Annotated[float | None, typer.Option("--top-p", metavar="P", help="Draw among the likeliest that sum to P.")]
MinP = Annotated[
    float | None, typer.Option("--min-p", metavar="P", help="Draw among those P times as likely as the first, or more.")
]
Penalty = Annotated[
    float | None, typer.Option("--repetition-penalty", metavar="F", help="Above 1: tokens seen before get less likely.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Repeat the same draws.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft", metavar="lookup|BUNDLE", help="Guess ahead: from the text itself, or by a smaller student."
    ),
]
Unverified = Annotated[bool, typer.Option("--no-verify", help="Open without hashing the files again.")]


def generate(
    bundle: BundleArgument,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from stdin.", show_default=False)
    ],
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    stop: Stop = None,
    draft: Draft = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show counts and speed on stderr.")] = False,
    no_verify: Unverified = False,
) -> None:
    """Continue a text, token by token. What is left out takes the library's defaults (SamplingOptions).

    \b
    Example:
        edgestill generate build/quickstart/cpu-x86 "It was a bright cold day" \\
            --max-new-tokens 64 --temperature 0.8 --top-p 0.95 --seed 7 --stats
    """
    model = _load(bundle, verify=not no_verify)
    text = sys.stdin.read() if prompt == "-" else prompt
    options = _given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        draft=_drafts(draft, verify=not no_verify),
    )
    _, statistics = _print_stream(model, text, options)
    if stats:
        _print_statistics(statistics)


def chat(
    bundle: BundleArgument,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    draft: Draft = None,
    no_verify: Unverified = False,
) -> None:
    """Talk with a model that has a chat template. An empty line or Ctrl-D ends the talk.

    \b
    Example:
        edgestill chat build/assistant/cpu-x86 --temperature 0.7 \\
            --system "Answer briefly."
    """
    model = _load(bundle, verify=not no_verify)
    options = _given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        draft=_drafts(draft, verify=not no_verify),
    )
    opening = [] if system is None else [{"role": "system", "content": system}]
    model.render_chat(
        [*opening, {"role": "user", "content": ""}]
    )  # refuses now what has no template, before a question
    messages = opening
    while question := _ask():
        messages = [*messages, {"role": "user", "content": question}]
        token_ids = model.tokenize(model.render_chat(messages), add_special_tokens=False)
        answer, _ = _print_stream(model, token_ids, options)
        messages = [*messages, {"role": "assistant", "content": answer}]


def _load(bundle: Path, *, verify: bool) -> Any:
    require_bundle(bundle)
    from edgestill.runtime.engines.opening import prepare
    from edgestill.runtime.model import load

    prepare(bundle, verify, Progress())
    return load(bundle, verify=verify)


def _drafts(draft: str | None, *, verify: bool) -> Any:
    """What `--draft` names: a word of the library, or a bundle to open."""
    return _load(Path(draft), verify=verify) if draft not in (None, "lookup") else draft


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given; the others are left to the library, which owns their defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _ask() -> str:
    """The next line of the user; empty at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _print_stream(model: Any, prompt: str | Sequence[int], options: dict[str, Any]) -> tuple[str, Any]:
    """Print pieces as they come; returns the whole text and the statistics of the last piece."""
    text, statistics = "", None
    for piece in model.stream(prompt, **options):
        typer.echo(piece.text, nl=False)
        sys.stdout.flush()
        text += piece.text
        statistics = piece.statistics
    typer.echo("")
    return text, statistics


def _print_statistics(statistics: Any) -> None:
    rate = statistics.decode_tokens_per_s
    speed = "" if rate is None else f", then {rate:.1f} tokens/s"
    guesses = ""
    if (share := statistics.acceptance_rate) is not None:
        guesses = f"; {statistics.guessed_tokens} guesses, {share:.0%} right"
    typer.echo(
        f"{statistics.prompt_tokens} prompt + {statistics.new_tokens} new tokens ({statistics.finish_reason}); "
        f"first after {statistics.first_token_ms:.1f} ms{speed}{guesses}",
        err=True,
    )
