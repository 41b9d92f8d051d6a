"""What a recipe and its profiles come to, before anything is run: sizes, tokens, and what the arithmetic rules out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from edgestill.compress.inputs import Inputs, check_inputs
from edgestill.compress.teachers import fit_together
from edgestill.export.model_facts import size_of_config
from edgestill.profiles.arithmetic import ModelSize, predict, refuse_impossible
from edgestill.profiles.load import LoadedProfile, LoadedRecipe, load_profile, load_recipe
from edgestill.profiles.schema import Profile, Recipe
from edgestill.runtime.engines.flavour import open_library
from edgestill.runtime.errors import BadInput


@dataclass(frozen=True)
class Plan:
    """The words of a build and what they stand for on this machine, checked."""

    loaded: LoadedRecipe
    targets: list[LoadedProfile]
    given: Inputs
    size: ModelSize
    """Of the student."""


def load_all(recipe: str, profiles: list[str]) -> Plan:
    """Everything the words refer to, checked: the recipe, the profiles, teachers, texts and the student.

    Raises:
        BadInput: any of it cannot be used, or a profile's budget is beyond what the arithmetic allows.
    """
    loaded = load_recipe(recipe)
    targets = _targets(profiles)
    given = check_inputs(loaded)
    size = size_of_config(given.student)
    for target in targets:
        refuse_impossible(size, target.profile, target.name)
    return Plan(loaded, targets, given, size)


def _targets(profiles: list[str]) -> list[LoadedProfile]:
    targets = [load_profile(name) for name in dict.fromkeys(profiles)]
    names = [target.name for target in targets]
    for target in targets:
        require_builder(target.profile)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadInput(f"two profiles are called {twice}, and each names the folder of its bundle; rename one file")
    return targets


def require_builder(profile: Profile) -> None:
    """Raise where an engine is to be shipped and what builds it is not installed.

    Raises:
        MissingPart: with the line that installs it.
    """
    if profile.ship_engine:
        open_library(profile.device.engine)


def plan(recipe: str, profiles: list[str]) -> list[tuple[str, str]]:
    """Label and value rows of `edgestill plan`; touches nothing.

    Raises:
        BadInput: as `load_all`.
    """
    import psutil

    found = load_all(recipe, profiles)
    loaded, words, teachers, size = found.loaded, found.loaded.recipe, found.given.teachers, found.size
    train, length = words.train, words.data.sequence_length
    steps = math.ceil(train.tokens / (train.batch_size * train.gradient_accumulation * length))
    rows = [("recipe", f"{loaded.name} ({_short(loaded.path)})")]
    rows += [
        (
            f"teacher {t.name}",
            f"{t.parameters:,} parameters, {t.hidden_size} wide, {t.n_layers} layers, {t.precision}, "
            f"{t.memory_bytes / 2**20:.0f} MiB",
        )
        for t in teachers
    ]
    together = fit_together(teachers, psutil.virtual_memory().available)
    rows += [
        ("teachers in memory", "together" if together else "one at a time, by way of the cache"),
        ("fusion", f"{words.fusion.weights} weights per {words.fusion.granularity}, {words.fusion.mix} mix"),
        ("student", f"{size.parameters:,} parameters, {size.hidden_size} wide, {size.n_layers} layers"),
        ("of its smallest teacher", f"{size.parameters / min(t.parameters for t in teachers):.0%}"),
        ("training", f"{steps:,} steps of {train.batch_size} x {length} tokens x {train.gradient_accumulation}"),
        ("on its grid", _grid(words, steps)),
        ("held-out tokens", f"{words.reference.tokens:,}, top {words.reference.top_k} stored"),
        ("quality limits", ", ".join(f"{name} {limit:g}" for name, limit in words.limits.items()) or "none"),
    ]
    for target in found.targets:
        rows += _target_rows(target, size)
    return rows


def _grid(words: Recipe, steps: int) -> str:
    """Which steps the student learns with the weights that ship."""
    spec = words.quantize
    if spec is None:
        return "never: trained in float, quantized afterwards"
    block = "" if spec.scheme == "int8" else f" in blocks of {spec.block_size}"
    reached = spec.from_step + spec.ramp_steps
    return f"{spec.scheme}{block}, from step {reached:,} of {steps:,}"


def _target_rows(target: LoadedProfile, size: ModelSize) -> list[tuple[str, str]]:
    found = predict(size, target.profile)
    device, work = target.profile.device, target.profile.workload
    bound = found.decode_tokens_per_s_bound
    fast = f"at most {bound:,.0f} tokens/s" if bound is not None else "weights fit in the cache: not bound by memory"
    return [
        (f"profile {target.name}", f"{device.arch}, {device.engine}, {device.threads} threads"),
        ("  workload", f"{work.prompt_tokens} + {work.new_tokens} tokens, batch {work.batch_size}"),
        ("  weights", f"{target.profile.precision.weights}, {found.graph_mib:.2f} MiB of graph"),
        ("  cache", f"{found.cache_mib:.2f} MiB"),
        ("  memory", f"at least {found.peak_rss_mib_floor:.1f} MiB"),
        ("  decode", fast),
        ("  budget", ", ".join(f"{name} {limit:g}" for name, limit in target.profile.budget.items()) or "none"),
    ]


def _short(path: Path) -> str:
    """The path as seen from the current folder, where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
