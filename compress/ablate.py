"""The recipe beside its baselines and without each of its parts, as one story: what is each part worth?

    1. rows        those that the recipe suggests, or those of a file; every one checked before any work
    2. shared      one corpus and one split for all; calibrations; per seed the teachers' answers and untrained students
    3. students    a row and a seed each, in worker processes, from the same tokens in the same order
    4. targets     the fused teachers themselves, on the windows that judge the students
    5. table       perplexities, and differences to the first row paired by seed and document

A row's JSON is written when it finishes, and a row whose student and windows are unchanged is not run again. All choices are
made on validation text. `held_out` judges the finished students on held-out text, once, at the end; without it nothing is judged
on that text. `seal` judges each student on it when it is trained and keeps the result unread until `held_out`, so that a study can
go on where the students no longer are: on another machine, from its JSON files.
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
    MIXED,
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
from edgestill.compress.distill_teachers import calibrations_of, with_offsets
from edgestill.compress.inputs import Inputs, check_inputs
from edgestill.compress.setting import Setting
from edgestill.compress.stages import Workspace
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
    sealed_sha256: str | None
    """Identity of the held-out windows, when students are judged on them unseen."""
    given: dict[str, Inputs]
    """By row."""
    calibrations: dict[str, tuple[float, ...]]
    """By row; like the offsets they come from validation text, so they are the same for every seed."""
    offsets: dict[str, tuple[float, ...]]
    """By row."""


@dataclass(frozen=True)
class Planned:
    """A run that has no result yet, the key of its student, and whether that is there."""

    run: Run
    student: str
    there: bool


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
    seal: bool = False,
    first_seed: int | None = None,
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
    with Workspace(out if out is not None else Path("build") / loaded.name, progress, brief=True).locked() as space:
        stage, corpus = corpus_of(loaded, space, given[chosen.rows[0].name].teachers[0])
        if MIXED in corpus.domains:
            raise BadInput(f"data: a domain is called {MIXED!r}, as the table calls all of them; rename it")
        part: PartName = "held_out" if held_out else "validation"
        judged = identity(part_of(corpus, part))
        sealed = identity(part_of(corpus, "held_out")) if seal and not held_out else None
        shared = Shared(space, corpus, stage.key, part, judged, sealed, given, {}, {})
        _calibrate(shared, chosen.rows)
        first = loaded.recipe.train.seed if first_seed is None else first_seed
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


def _planned(shared: Shared, rows: list[Row], seeds: range) -> tuple[list[Result], list[Planned]]:
    """Results that are kept, and what is to be done, seed by seed, so that early results are of whole tables.

    Raises:
        BadInput: held-out text, and students that are not there: nothing has been judged on it yet.
    """
    kept, planned, missing = [], [], []
    for seed in seeds:
        for row in rows:
            run = _run_of(shared, row, seed)
            student, there = run.student()
            result = finished(run, student)
            if result is not None:
                kept.append(result)
            elif shared.part == "held_out" and not there:
                missing.append(run.label)
            else:
                planned.append(Planned(run, student, there))
    if missing:
        raise BadInput(
            f"--held-out judges finished students, and {len(missing)} are not ({missing[0]}); run without it first"
        )
    return kept, planned


def _students(shared: Shared, rows: list[Row], seeds: range, jobs: int) -> tuple[list[Result], dict[str, str]]:
    """Results of all rows and seeds, and why those that have none failed."""
    progress = shared.space.progress
    results, planned = _planned(shared, rows, seeds)
    failures: dict[str, str] = {}
    with (
        Workers(jobs, train_and_judge, progress, threads=max(1, torch.get_num_threads() // jobs)) as workers,
        progress.task("ablation", len(rows) * len(seeds), "students") as task,
    ):
        if results:
            task.advance(len(results), f"{len(results)} kept")
        for seed in seeds:
            alike: dict[str, list[Run]] = {}
            for plan in planned:
                if plan.run.seed == seed:
                    run = plan.run if plan.there else plan.run.prepare(shared.space)
                    alike.setdefault(plan.student, []).append(run)
            by_label = {runs[0].label: runs for runs in alike.values()}
            for outcome in workers.run([(label, runs[0]) for label, runs in by_label.items()]):
                same = by_label[outcome.label]
                if outcome.error is not None:
                    failures |= {run.label: _failure(run, outcome.error, outcome.trace) for run in same}
                    progress.say(f"{outcome.label}: failed: {failures[outcome.label]}")
                else:
                    results += [outcome.value, *(_same_student(outcome.value, run) for run in same[1:])]
                    progress.say(f"{outcome.label}: mixed perplexity {outcome.value['perplexity'][MIXED]:.1f}")
                task.advance(len(same), outcome.label)
    return results, failures


def _calibrate(shared: Shared, rows: list[Row]) -> None:
    """Fill in the calibrations of every row."""
    for row in rows:
        at = Setting(
            loaded=row.loaded,
            space=shared.space,
            teachers=shared.given[row.name].teachers,
            vocabulary=shared.given[row.name].vocabulary,
            corpus=shared.corpus,
            corpus_key=shared.corpus_key,
            device=best_device(),
        )
        shared.calibrations[row.name] = tuple(calibrations_of(at))
        unsaid = dataclasses.replace(at, space=Workspace(shared.space.root, QuietProgress()))
        shared.offsets[row.name] = with_offsets(unsaid).offsets  # a row's own: its JSON has them


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
        offsets=shared.offsets[row.name],
        caches=None,
        part=shared.part,
        part_sha256=shared.part_sha256,
        sealed_sha256=shared.sealed_sha256,
    )
    return run.with_caches(Workspace(shared.space.root, QuietProgress(), asking=True))


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
    part = part_of(shared.corpus, shared.part)
    teachers = [load_teacher(facts, at.device) for facts in at.teachers]
    rules = [rule for run in runs.values() if (rule := run.fused()) is not None]
    with progress.task(f"{len(rules)} fused targets", part.n_windows, "windows") as task:
        sums = judge_targets(teachers, rules, part, task)
    found = {}
    for key, nll in zip(runs, sums, strict=True):
        found[key] = {"perplexity": means(nll, part, at.domains), "tokens": int(scored_tokens(part).sum())}
        save_json(folder / f"{key}.json", found[key])
    return found
