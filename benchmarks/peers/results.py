"""From raw values to medians, ratios per round, a table and a plot. Pure functions of what the JSON holds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = "ours"
"""What the names of our variants begin with."""
MIB = 1 << 20
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("file_mib", "model files, MiB", ".1f"),
    ("load_ms", "load, ms", ".0f"),
    ("first_token_ms", "first token, ms", ".1f"),
    ("first_prompt_ratio", "first prompt / second", ".2f"),
    ("peak_rss_mib", "peak RSS, MiB", ".0f"),
    ("bandwidth_fraction", "bandwidth fraction", ".2f"),
)
"""Name of a median, heading, format."""
SPEEDS = ("decode_tokens_per_s", "prefill_tokens_per_s")


def cell_name(batch: int, depth: int) -> str:
    """`b4 d512`: batch 4, 512 tokens in the cache."""
    return f"b{batch} d{depth}"


def round_values(
    turns: Mapping[str, Mapping[str, Any]], fresh: Mapping[str, float], file_bytes: int
) -> dict[str, float]:
    """The values of one round of one peer. `turns`: cell name (or `first token`) -> what the worker said."""
    out = {"file_mib": file_bytes / MIB, "load_ms": 1e3 * fresh["load_s"], "peak_rss_mib": fresh["peak_rss_mib"]}
    out["first_prompt_ratio"] = fresh["first_token_of_first_prompt_s"] / fresh["first_token_of_second_prompt_s"]
    for name, turn in turns.items():
        if name == "first token":
            out["first_token_ms"] = 1e3 * turn["prefill_s"]
            continue
        batch, depth = (int(word[1:]) for word in name.split())
        out[f"prefill_tokens_per_s {name}"] = batch * depth / turn["prefill_s"]
        out[f"decode_tokens_per_s {name}"] = batch * turn["new_tokens"] / turn["decode_s"]
    return out


def medians(rounds: Sequence[Mapping[str, float]], bandwidth_gb_per_s: float) -> dict[str, float]:
    """Of every value, and the share of the memory's bandwidth that decoding one row reads its files with."""
    out = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    single = [key for key in out if key.startswith("decode_tokens_per_s b1 ")]
    if single:  # the shallowest: there the weights are nearly all that is read
        least = min(single, key=lambda key: int(key.rpartition(" d")[2]))
        out["bandwidth_fraction"] = out["file_mib"] * MIB * out[least] / (bandwidth_gb_per_s * 1e9)
    return out


def ratios(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """ours / peer per round and the median of that. Speeds: above 1 is better; times and sizes: below."""
    return {key: _ratio([mine[key] / other[key] for mine, other in zip(ours, theirs, strict=True)]) for key in ours[0]}


def _ratio(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "rounds": values}


def leading_agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Mean number of leading tokens that two sets of rows share."""
    shared = []
    for mine, other in zip(ours, theirs, strict=True):
        shared.append(next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(mine)))
    return statistics.fmean(shared)


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """`found` (raw rounds of every peer) with medians and ratios."""
    bandwidth = found["environment"]["memory_bandwidth_gb_per_s"]
    for peer in found["peers"].values():
        peer["medians"] = medians(peer["rounds"], bandwidth)
    others = {name: peer for name, peer in found["peers"].items() if not name.startswith(OURS)}
    found["ratios"] = {
        mine: {name: ratios(facts["rounds"], peer["rounds"]) for name, peer in others.items()}
        for mine, facts in found["peers"].items()
        if mine.startswith(OURS)
    }
    return found


def table(found: Mapping[str, Any]) -> str:
    """Markdown: what one process costs, speeds by batch and depth, ours over each peer, who is left out."""
    settings, peers = found["settings"], found["peers"]
    checkpoint, machine = settings["checkpoint"], found["environment"]
    cells = [cell_name(batch, depth) for batch in settings["batches"] for depth in settings["depths"]]
    parts = [
        f"{checkpoint['model_type']}, {checkpoint['num_hidden_layers']} layers of {checkpoint['hidden_size']}, vocabulary "
        f"{checkpoint['vocab_size']:,}; {machine['cpu']}, {settings['threads']} threads, "
        f"{machine['memory_bandwidth_gb_per_s']} GB/s; medians of {settings['rounds']} rounds in turn; "
        f"b: batch, d: tokens in the cache; {machine['start']['utc']}\n",
        _grid("", [heading for _, heading, _ in COLUMNS], {name: _costs(peer) for name, peer in peers.items()}),
    ]
    for speed in SPEEDS:
        rows = {n: [f"{peer['medians'][f'{speed} {cell}']:.0f}" for cell in cells] for n, peer in peers.items()}
        parts.append(_grid(_words(speed), cells, rows))
    for mine, over in found["ratios"].items():
        for speed in SPEEDS if over else ():
            rows = {n: [f"{ratio[f'{speed} {cell}']['median']:.2f}" for cell in cells] for n, ratio in over.items()}
            parts.append(_grid(f"{_words(speed)}, {mine} / peer", cells, rows))
    if found["left_out"]:
        parts.append("Left out: " + "; ".join(f"{name} ({why})" for name, why in found["left_out"].items()) + "\n")
    return "\n".join(parts)


def _words(speed: str) -> str:
    return speed.replace("_tokens_per_s", ", tokens/s")


def _costs(peer: Mapping[str, Any]) -> list[str]:
    found = peer["medians"]
    return [format(found[name], form) if name in found else "" for name, _, form in COLUMNS]


def _grid(title: str, headings: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [f"| {title} | " + " | ".join(headings) + " |", "|---|" + "---:|" * len(headings)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def plot(found: Mapping[str, Any], stem: Path) -> list[Path]:
    """Bars of decode and prefill by batch and depth, as `stem`.png and `stem`.svg.

    Raises:
        MissingPart: matplotlib is not installed.
    """
    from edgestill.runtime.plots import COLOURS, clean, new_figure, style

    settings, peers = found["settings"], found["peers"]
    cells = [(batch, depth) for batch in settings["batches"] for depth in settings["depths"]]
    with style():
        figure, axes = new_figure((10.5, 6.4), columns=1, rows=2)
        width = 0.84 / len(peers)
        for row, speed in enumerate(SPEEDS):
            panel = axes[row][0]
            for i, (name, peer) in enumerate(peers.items()):
                heights = [peer["medians"][f"{speed} {cell_name(*cell)}"] for cell in cells]
                places = [place + (i - (len(peers) - 1) / 2) * width for place in range(len(cells))]
                panel.bar(places, heights, width, color=COLOURS[i % len(COLOURS)], label=clean(name))
            panel.set_xticks(range(len(cells)), [f"batch {batch}, {depth} tokens" for batch, depth in cells])
            panel.set_ylabel(_words(speed))
            panel.grid(visible=False, axis="x")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        out = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
        figure.savefig(out[0], dpi=144)
        figure.savefig(out[1], metadata={"Date": None})
    return out
