"""The recipe beside its baselines and without each of its parts, as one story: what is each part worth?

    1. rows        those that the recipe suggests, or those of a file; every one checked before any work
    2. shared      one corpus and one split for all; calibrations; the teachers' stored answers of each seed
    3. students    a row and a seed each, in worker processes, from the same tokens in the same order
    4. targets     the fused teachers themselves, on the windows that judge the students
    5. table       perplexities, and differences to the first row paired by seed and document

A row's JSON is written when it finishes, and a row whose student and windows are unchanged is not run again. All choices are
made on validation text. `held_out` judges the finished students on held-out text, once, at the end; without it nothing is judged
on that text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from edgestill.compress.ablate_judge import identity, judge_targets, scored_tokens
from edgestill.compress.ablate_rows import Row, rows_of
from edgestill.compress.ablate_run import (
    FOLDER,
    HELD_OUT,
    PartName,
    Run,
    finished,
    means,
    part_of,
    read_json,
    save_json,
    train_and_judge,
    with_seed,
)
from edgestill.compress.ablate_table import summary, write_tables
from edgestill.compress.ablate_workers import Workers
from edgestill.compress.corpus import Corpus
from edgestill.compress.distill import corpus_of
from edgestill.compress.distill_teachers import calibrations_of
from edgestill.compress.inputs import Inputs, check_inputs
from edgestill.compress.setting import Setting
from edgestill.compress.stages import Keys, Workspace
from edgestill.compress.teachers import best_device, check_same_tokenizer, fit_together, load_teacher
from edgestill.profiles.load import load_recipe
from edgestill.runtime.errors import BadInput
from edgestill.runtime.plots import style
from edgestill.runtime.progress import Progress, QuietProgress

Result = dict[str, Any]


@dataclass(frozen=True)
class Shared:
    """What all rows have in common."""

    space: Workspace
    corpus: Corpus
    corpus_key: str
    part: PartName
    part_sha256: str
    given: dict[str, Inputs]
    """By row."""
    calibrations: dict[str, tuple[float, ...]]
    """By row; they come from validation text, so they are the same for every seed."""


def ablate(
    recipe: str,
    *,
    out: Path | None,
    seeds: int,
    tokens: int | None,
    rows: Path | None,
    only: Sequence[str],
    jobs: int,
    held_out: bool,
    progress: Progress,
) -> Result:
    """`edgestill ablate`: run what is missing, write the tables, and hand back what they hold, `failures` included.

    Raises:
        BadInput: a recipe, row or option that cannot be used; with `held_out`, a student that is not there.
        MissingPart: matplotlib is not installed.
    """
    with style():
        pass  # a plot that cannot be made is found out now, not after hours
    loaded = load_recipe(recipe)
    chosen = rows_of(loaded, rows, tokens=tokens, only=only)
    for note in chosen.notes:
        progress.say(note)
    given = _check(chosen.rows)
    with Workspace(out if out is not None else Path("build") / loaded.name, progress).locked() as space:
        stage, corpus = corpus_of(loaded, space, given[chosen.rows[0].name].teachers[0])
        part: PartName = "held_out" if held_out else "validation"
        judged = identity(corpus.held_out if held_out else corpus.validation)
        shared = Shared(space, corpus, stage.key, part, judged, given, {})
        _calibrate(shared, chosen.rows)
        first = loaded.recipe.train.seed
        results, failures = _students(shared, chosen.rows, range(first, first + seeds), jobs)
        targets = _targets(shared, chosen.rows, first)
        table = summary(loaded.name, chosen, results, targets, failures)
        folder = space.root / FOLDER / HELD_OUT if held_out else space.root / FOLDER
        write_tables(table, folder)
    progress.say(f"table and results: {folder}")
    return table


def _check(rows: list[Row]) -> dict[str, Inputs]:
    """Everything every row refers to; teachers of different rows speak the same tokens, too."""
    given = {}
    for row in rows:
        try:
            given[row.name] = check_inputs(row.loaded)
        except BadInput as error:
            raise BadInput("\n".join(f"row {row.name!r}: {line}" for line in str(error).split("\n"))) from error
    check_same_tokenizer(list({t.path: t for inputs in given.values() for t in inputs.teachers}.values()))
    return given


def _students(shared: Shared, rows: list[Row], seeds: range, jobs: int) -> tuple[list[Result], dict[str, str]]:
    """Results of all rows and seeds, and why those that have none failed. Seed by seed, so that early tables are whole."""
    progress, results = shared.space.progress, []
    failures: dict[str, str] = {}
    missing: list[str] = []
    with (
        Workers(jobs, train_and_judge, progress, threads=max(1, torch.get_num_threads() // jobs)) as workers,
        progress.task("ablation", len(rows) * len(seeds), "students") as task,
    ):
        for seed in seeds:
            by_student: dict[str, list[Run]] = {}
            for row in rows:
                run = _run_of(shared, row, seed)
                student, there = run.student()
                kept = finished(run, student)
                if kept is not None:
                    results.append(kept)
                    task.advance(1, f"{run.label}: kept")
                elif shared.part == "held_out" and not there:
                    missing.append(run.label)
                else:
                    by_student.setdefault(student, []).append(run if there else _with_answers(run, shared.space))
            if missing:
                continue
            alike = {runs[0].label: runs for runs in by_student.values()}
            for outcome in workers.run([(label, runs[0]) for label, runs in alike.items()]):
                same = alike[outcome.label]
                if outcome.error is not None:
                    failures |= {run.label: _failure(run, outcome.error, outcome.trace) for run in same}
                else:
                    results += [outcome.value, *(_same_student(outcome.value, run) for run in same[1:])]
                task.advance(len(same), outcome.label)
    if missing:
        raise BadInput(
            f"--held-out judges finished students, and {len(missing)} are not ({missing[0]}); run without it first"
        )
    return results, failures


def _calibrate(shared: Shared, rows: list[Row]) -> None:
    """Fill in the calibrations of every row; a set of teachers is said to be done once, not for every row."""
    said: set[str] = set()
    for row in rows:
        given = shared.given[row.name]
        teachers = " ".join(t.weights_sha256 for t in given.teachers)
        at = Setting(
            loaded=row.loaded,
            space=Workspace(shared.space.root, QuietProgress()) if teachers in said else shared.space,
            teachers=given.teachers,
            vocabulary=given.vocabulary,
            corpus=shared.corpus,
            corpus_key=shared.corpus_key,
            device=best_device(),
        )
        before = len(shared.space.done)
        shared.calibrations[row.name] = tuple(calibrations_of(at))
        if len(shared.space.done) > before:
            said.add(teachers)


def _with_answers(run: Run, space: Workspace) -> Run:
    """The run with its teachers' answers stored; those that are there are not hashed again for every row (a reader hashes)."""
    if run.caches is None or all(folder.is_dir() for folder in run.caches):
        return run
    return run.with_caches(space)


def _run_of(shared: Shared, row: Row, seed: int) -> Run:
    given = shared.given[row.name]
    run = Run(
        row=dataclasses.replace(row, loaded=with_seed(row.loaded, seed)),
        root=shared.space.root,
        teachers=given.teachers,
        vocabulary=given.vocabulary,
        corpus=shared.corpus.folder,
        corpus_key=shared.corpus_key,
        calibrations=shared.calibrations[row.name],
        caches=None,
        part=shared.part,
        part_sha256=shared.part_sha256,
    )
    return run.with_caches(Keys(shared.space.root, QuietProgress()))


def _failure(run: Run, error: str, trace: str | None) -> str:
    """The line to report; the traceback of a bug is kept beside the results."""
    if trace is None:
        return error
    place = run.file.with_suffix(".traceback.txt")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(trace, encoding="utf-8")
    return f"unexpected {error} (traceback: {place})"


def _same_student(result: Result, run: Run) -> Result:
    """The result of a run whose student is the one of `result`."""
    own = {**result, "row": run.row.name, "changes": run.row.changes}
    save_json(run.file, own)
    return own


def _targets(shared: Shared, rows: list[Row], seed: int) -> dict[str, Result]:
    """Perplexities of each row's fused target, by row; kept, and judged together where the teachers are the same."""
    runs = {row.name: _run_of(shared, row, seed) for row in rows}
    rules = {name: rule for name, run in runs.items() if (rule := run.fused()) is not None}
    keys = {name: runs[name].target_key() for name in rules}
    folder = shared.space.root / FOLDER / "targets"
    found = {key: stored for key in keys.values() if (stored := read_json(folder / f"{key}.json")) is not None}
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for name, key in keys.items():
        if key not in found:
            hashes = tuple(f"{t.weights_sha256} {t.precision}" for t in runs[name].teachers)
            groups.setdefault(hashes, {}).setdefault(key, name)
    for group in groups.values():
        found |= _judge_group({key: runs[name] for key, name in group.items()}, shared, folder)
    return {name: found[key] for name, key in keys.items() if key in found}


def _judge_group(runs: dict[str, Run], shared: Shared, folder: Path) -> dict[str, Result]:
    """Targets of runs with the same teachers, by key; none when these do not fit in memory together."""
    progress = shared.space.progress
    at = next(iter(runs.values())).setting(shared.space)
    memory = torch.cuda.mem_get_info()[0] if at.device.type == "cuda" else psutil.virtual_memory().available
    if not fit_together(at.teachers, memory):
        names = ", ".join(t.name for t in at.teachers)
        progress.say(f"fused targets of {names}: left out, the teachers do not fit in memory together")
        return {}
    part = part_of(at, shared.part)
    teachers = [load_teacher(facts, at.device) for facts in at.teachers]
    rules = [rule for run in runs.values() if (rule := run.fused()) is not None]
    with progress.task(f"{len(rules)} fused targets", part.n_windows, "windows") as task:
        sums = judge_targets(teachers, rules, part, task)
    found = {}
    for key, nll in zip(runs, sums, strict=True):
        found[key] = {"perplexity": means(nll, part, at.domains), "tokens": int(scored_tokens(part).sum())}
        save_json(folder / f"{key}.json", found[key])
    return found
