"""The text of a recipe as windows of token ids: built once, opened by memory map.

    corpus.json                    written last: domains, sources, arrays with sha256, overlap, `sha256` of it all
    <part>.<array>.npy             token_ids, domain, block, source, and loss_mask where not every label counts

The three parts (training, validation, held_out) are disjoint: a `SplitSpec` takes the end of every source, validation before
held-out, and `overlap.check_disjoint` refuses text that stands in two of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from edgestill.compress.encoding import WHOLE_DOCUMENTS, EncodedSource, encode_source
from edgestill.compress.overlap import Overlap, check_disjoint
from edgestill.compress.packing import Part, Stream, pack
from edgestill.compress.sources import read_source, source_files, source_hash, source_name
from edgestill.compress.tokenizer_check import load_tokenizer, real_vocabulary
from edgestill.profiles.schema import DataSpec, SourceSpec, SplitSpec
from edgestill.runtime.errors import BadInput
from edgestill.runtime.files import write_atomically
from edgestill.runtime.manifest import canonical_json
from edgestill.runtime.progress import Progress

__all__ = [
    "Corpus",
    "Part",
    "SourceFacts",
    "build_corpus",
    "held_out_part",
    "open_corpus",
    "require_sources",
    "source_hashes",
    "training_order",
]

MANIFEST = "corpus.json"
LAYOUT = 2
PARTS = ("training", "validation", "held_out")
ARRAYS = ("token_ids", "loss_mask", "domain", "block", "source")


class SourceFacts(TypedDict):
    """One source as it was read; plain words, so that it can stand in a manifest."""

    name: str
    part: str
    """training (the ends of which may be validation and held-out), validation or held_out."""
    domains: dict[str, int]
    """Tokens of each domain in it."""
    weight: float
    """Share of the training tokens, not normalised."""
    sha256: str
    """Of its text."""
    documents: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Corpus:
    """A finished corpus folder. Array shapes: see `Part`."""

    folder: Path
    sequence_length: int
    domains: tuple[str, ...]
    sources: list[SourceFacts]
    training: Part
    validation: Part
    held_out: Part
    overlap: Overlap
    dropped_tokens: int
    """Tokens at the ends of sources that do not fill a window."""
    sha256: str
    """Of the text, the tokens, the packing and the split."""


def build_corpus(
    data: DataSpec,
    resolve: Callable[[str], Path],
    tokenizer_folder: Path,
    out: Path,
    *,
    seed: int,
    progress: Progress,
) -> None:
    """Read, tokenise, split, pack, check for overlap and write `out`; `corpus.json` comes last.

    Args:
        resolve: a path as written in the recipe -> a path on this machine.
        seed: of the order in which short training documents (20 and more in a source) are packed.

    Raises:
        BadInput: unreadable or missing text, too little of it, or parts that overlap.
    """
    tokenizer = load_tokenizer(tokenizer_folder, "tokenizer")
    dtype = np.uint16 if real_vocabulary(tokenizer) <= 1 << 16 else np.uint32
    out.mkdir(parents=True, exist_ok=True)
    own = [(name, spec) for name in PARTS[1:] if isinstance(spec := getattr(data, name), list)]
    shares = {name: spec.fraction for name in PARTS[1:] if isinstance(spec := getattr(data, name), SplitSpec)}
    wanted = [("training", s) for s in data.sources] + [(name, s) for name, specs in own for s in specs]
    domains: dict[str, int] = {}
    streams: dict[str, list[tuple[Stream, int, int]]] = {name: [] for name in PARTS}
    facts: list[SourceFacts] = []
    scratch = out / ".reading"
    try:
        with progress.task("reading text", len(wanted), "sources") as task:
            for number, (part, source) in enumerate(wanted):
                items = read_source(source, resolve, scratch)
                taken = shares if part == "training" else {}
                encoded = encode_source(items, taken, tokenizer, dtype, name=source_name(source), domain=source.domain)
                facts.append(_facts(part, source, encoded))
                rng = np.random.default_rng([seed, number])
                for domain, pieces in encoded.streams.items():
                    place = domains.setdefault(domain, len(domains))
                    for name, stream in pieces.items():
                        if part == name == "training" and len(stream.ends) >= WHOLE_DOCUMENTS:
                            stream = stream.shuffled(rng)
                        streams[name if part == "training" else part].append((stream, number, place))
                task.advance(1, note=f"{facts[-1]['tokens']} tokens")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    parts = {name: _pack(name, streams[name], facts, list(domains), data.sequence_length) for name in PARTS}
    overlap = check_disjoint(parts["training"], parts["validation"], parts["held_out"], tokenizer.decode)
    dropped = sum(s["tokens"] for s in facts) - sum(part.token_ids.size for part in parts.values())
    sizes = ", ".join(f"{name.replace('_', '-')} {part.token_ids.size}" for name, part in parts.items())
    progress.say(f"tokens: {sizes}; {dropped} at the ends of sources fill no window of {data.sequence_length}")
    head = {"layout": LAYOUT, "sequence_length": data.sequence_length, "domains": [*domains], "dropped_tokens": dropped}
    _write(out, parts, {**head, "sources": facts, "overlap": asdict(overlap), "seed": seed})


def held_out_part(text: Path, tokenizer_folder: Path, sequence_length: int, scratch: Path) -> Part:
    """All of one local source as held-out windows, for a checkpoint that is judged without having been trained here.

    Args:
        text: plain text, .jsonl, .parquet, or a folder of such.
        scratch: a folder that may be written and deleted while reading.

    Raises:
        BadInput: as `build_corpus`.
    """
    tokenizer = load_tokenizer(tokenizer_folder, "tokenizer")
    dtype = np.uint16 if real_vocabulary(tokenizer) <= 1 << 16 else np.uint32
    source = SourceSpec(path=str(text))
    try:
        items = read_source(source, Path, scratch)
        encoded = encode_source(items, {}, tokenizer, dtype, name=str(text), domain=source.domain)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    streams = [(encoded.streams[source.domain]["training"], 0, 0)]
    return _pack("held_out", streams, [_facts("held_out", source, encoded)], [source.domain], sequence_length)


def open_corpus(folder: Path) -> Corpus:
    """The corpus in `folder`, its arrays memory-mapped.

    Raises:
        BadInput: no or an older `corpus.json`, or an array whose size is not the declared one.
    """
    repair = "delete the folder and build again"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder}: no readable {MANIFEST} ({error}); {repair}") from error
    if manifest.get("layout") != LAYOUT:
        raise BadInput(f"{folder}: layout {manifest.get('layout')}, this version reads {LAYOUT}; {repair}")
    digest = manifest.pop("sha256", None)
    if digest != hashlib.sha256(canonical_json(manifest)).hexdigest():
        raise BadInput(f"{folder}: {MANIFEST} was changed after it was written; {repair}")
    parts = {}
    for name in PARTS:
        arrays: dict[str, npt.NDArray[Any] | None] = dict.fromkeys(ARRAYS)
        for array, entry in manifest["parts"][name].items():
            file = folder / _file(name, array)
            size = file.stat().st_size if file.is_file() else 0
            if size != entry["size"]:
                raise BadInput(f"{file}: {size} bytes where {MANIFEST} declares {entry['size']}; {repair}")
            arrays[array] = np.load(file, mmap_mode="r")
        parts[name] = Part(**arrays)  # type: ignore[arg-type]
    return Corpus(
        folder=folder,
        sequence_length=manifest["sequence_length"],
        domains=tuple(manifest["domains"]),
        sources=manifest["sources"],
        overlap=Overlap(**manifest["overlap"]),
        dropped_tokens=manifest["dropped_tokens"],
        sha256=digest,
        **parts,
    )


def require_sources(data: DataSpec, resolve: Callable[[str], Path]) -> None:
    """Refuse a local source that is not there, without reading any.

    Raises:
        BadInput: one line per missing file or folder.
    """
    missing = []
    for source in _all_sources(data):
        try:
            source_files(source, resolve)
        except BadInput as error:
            missing.append(str(error))
    if missing:
        raise BadInput("\n".join(missing))


def source_hashes(data: DataSpec, resolve: Callable[[str], Path]) -> dict[str, str]:
    """What a corpus depends on, without reading it as text: sha256 of every local source, the revision of every other.

    Raises:
        BadInput: a missing file or folder.
    """
    return {source_name(source): source_hash(source, resolve) for source in _all_sources(data)}


def _all_sources(data: DataSpec) -> list[SourceSpec]:
    own = [source for spec in (data.validation, data.held_out) if isinstance(spec, list) for source in spec]
    return [*data.sources, *own]


def training_order(corpus: Corpus, tokens: int, seed: int) -> npt.NDArray[np.int64]:
    """int64 [ceil(tokens / T)]: which training window is seen when.

    Sources take turns in proportion to their weights (source s is due for the j-th time at (j + 1/2) / w_s); each goes
    through its windows in shuffled epochs of its own. A longer run begins with the order of a shorter one.
    """
    n = -(-tokens // corpus.sequence_length)
    source = np.asarray(corpus.training.source)
    members = [np.flatnonzero(source == s) for s in np.unique(source)]
    weights = np.array([corpus.sources[int(source[m[0]])]["weight"] for m in members])
    weights = weights / weights.sum()
    due, turns = [], []
    for s, (windows, weight) in enumerate(zip(members, weights, strict=True)):
        count = min(n, int(n * weight) + 2)
        epochs = -(-count // len(windows))
        order = [np.random.default_rng([seed, s, e]).permutation(windows) for e in range(epochs)]
        turns.append(np.concatenate(order)[:count] if order else windows[:0])
        due.append((np.arange(count) + 0.5) / weight)
    place = np.argsort(np.concatenate(due), kind="stable")[:n]
    return np.concatenate(turns)[place].astype(np.int64)


def _facts(part: str, source: SourceSpec, encoded: EncodedSource) -> SourceFacts:
    return SourceFacts(
        name=source_name(source),
        part=part,
        domains=encoded.domain_tokens,
        weight=source.weight,
        sha256=encoded.sha256,
        documents=encoded.documents,
        tokens=sum(encoded.domain_tokens.values()),
    )


def _pack(
    name: str, streams: list[tuple[Stream, int, int]], facts: list[SourceFacts], domains: list[str], length: int
) -> Part:
    if name == "training":
        for stream, number, domain in streams:
            if len(stream.token_ids) < length:
                of = f" of domain {domains[domain]!r}" if len(facts[number]["domains"]) > 1 else ""
                raise BadInput(
                    f"data source {facts[number]['name']!r} leaves {len(stream.token_ids)} tokens{of} for training, fewer than "
                    f"data.sequence_length {length}; add text, shorten the windows or remove the {'domain' if of else 'source'}"
                )
    part = pack(streams, length)
    if part.n_windows == 0:
        longest = max(len(stream.token_ids) for stream, _, _ in streams)
        raise BadInput(
            f"data.{name}: {longest} tokens at most from one source do not fill a window of data.sequence_length {length}; "
            "add text, raise the fraction or shorten the windows"
        )
    return part


def _file(part: str, array: str) -> str:
    return f"{part}.{array}.npy"


def _write(out: Path, parts: dict[str, Part], manifest: dict[str, Any]) -> None:
    (out / MANIFEST).unlink(missing_ok=True)  # a folder without it is unfinished, whatever else it holds
    manifest["parts"] = {}
    for name, part in parts.items():
        entries = {}
        for array in ARRAYS:
            values = getattr(part, array)
            if values is None:
                (out / _file(name, array)).unlink(missing_ok=True)
                continue
            file = out / _file(name, array)
            with file.open("wb") as handle:
                np.save(handle, values)
                handle.flush()
                os.fsync(handle.fileno())
            with file.open("rb") as handle:
                entries[array] = {
                    "sha256": hashlib.file_digest(handle, "sha256").hexdigest(),
                    "size": file.stat().st_size,
                }
        manifest["parts"][name] = entries
    manifest = json.loads(canonical_json(manifest))
    manifest["sha256"] = hashlib.sha256(canonical_json(manifest)).hexdigest()
    write_atomically(out / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
