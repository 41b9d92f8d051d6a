"""The calibration and cache stages on tiny real teachers: one cache serves every fusion, and what changes it makes another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import write_recipe

from edgestill.compress.corpus import build_corpus, open_corpus
from edgestill.compress.distill_teachers import caches_of, calibrations_of, compared_at
from edgestill.compress.inputs import check_inputs
from edgestill.compress.setting import Setting
from edgestill.compress.stages import Workspace
from edgestill.profiles.load import load_recipe
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import QuietProgress

ENTROPY = {"weights": "entropy", "calibration": "temperature"}


@contextmanager
def setting(place: Path, **changes: Any) -> Iterator[Setting]:
    changes["train"] = {"tokens": 256, "teacher_cache": "always"} | changes.get("train", {})
    loaded = load_recipe(str(write_recipe(place, **changes)))
    given = check_inputs(loaded)
    with Workspace(place / "out", QuietProgress()).locked() as space:
        text = place / "corpus"
        if not text.exists():
            data, tokenizer = loaded.recipe.data, given.teachers[0].path
            build_corpus(data, loaded.resolve, tokenizer, text, seed=0, progress=QuietProgress())
        yield Setting(loaded, space, given.teachers, given.vocabulary, open_corpus(text), "text", torch.device("cpu"))


def stages(place: Path, **changes: Any) -> tuple[list[Path] | None, list[float], dict[str, bool]]:
    """Folders of the caches, calibrations, and {stage: reused}."""
    with setting(place, **changes) as at:
        calibrations = calibrations_of(at)
        folders = caches_of(at, calibrations)
        return folders, calibrations, {stage.name: stage.reused for stage in at.space.done}


def test_one_cache_serves_every_fusion(tmp_path: Path) -> None:
    first, fitted, reused = stages(tmp_path, fusion=ENTROPY)
    assert first is not None
    assert not any(reused.values())
    assert all(t != 1.0 for t in fitted)
    for fusion in (
        {"weights": "uniform"},
        {"weights": "entropy", "calibrate": False, "granularity": "token"},
        {"weights": "label", "mix": "geometric"},
    ):
        again, same, reused = stages(tmp_path, fusion=fusion)
        assert (again, same) == (first, fitted)
        assert reused == dict.fromkeys(("calibrate-verse", "calibrate-prose", "cache-verse", "cache-prose"), True)
    manifest = json.loads((first[1] / "cache.json").read_text())
    assert (manifest["calibration"], manifest["mode"], manifest["size"]) == (fitted[1], "top_k", 16)


def test_what_is_stored_makes_another_cache(tmp_path: Path) -> None:
    found = [
        stages(tmp_path, train=words)[0]
        for words in (
            {},
            {"cache_top_k": 8},
            {"cache_mode": "sampling"},
            {"cache_mode": "sampling", "cache_samples": 12},
            {"cache_mode": "sampling", "cache_top_k": 9},  # not read by draws
            {"cache_samples": 9},  # not read by top_k
        )
    ]
    names = [folders[0].name for folders in found if folders is not None]
    assert len(set(names)) == 4
    assert names[4:] == [names[2], names[0]]


def test_the_temperature_is_fitted_where_something_can_read_it(tmp_path: Path) -> None:
    never = {"teacher_cache": "never"}
    for fusion, train, losses, fits in (
        (ENTROPY, never, {}, True),
        ({"weights": "uniform"}, never, {}, False),
        ({"weights": "entropy", "calibrate": False}, never, {}, False),
        ({"weights": "uniform"}, {"teacher_cache": "auto"}, {}, True),
        ({"weights": "uniform"}, {"teacher_cache": "auto"}, {"features": {}}, False),  # needs the teachers at work
        ({"weights": "uniform"}, {}, {"output": {"weight": 0.0}}, False),  # cross-entropy alone
    ):
        with setting(tmp_path, fusion=fusion, train=train, losses=losses) as at:
            calibrations = calibrations_of(at)
            assert ("calibrate-verse" in [stage.name for stage in at.space.done]) == fits
            assert (calibrations != [1.0, 1.0]) == fits


def test_entropies_are_compared_at_the_fitted_temperature_only_where_the_fusion_says_so(tmp_path: Path) -> None:
    fitted = [1.25, 0.75]
    for fusion, expected in (
        (ENTROPY, fitted),
        ({"weights": "reinforced", "calibration": "temperature"}, fitted),
        ({"weights": "entropy"}, fitted),
        ({"weights": "entropy", "calibration": "offset"}, [1.0, 1.0]),
        ({"weights": "entropy", "calibrate": False}, [1.0, 1.0]),
        ({"weights": "uniform"}, [1.0, 1.0]),
    ):
        recipe = load_recipe(str(write_recipe(tmp_path, fusion=fusion))).recipe
        assert compared_at(recipe, fitted) == expected


def test_teachers_that_do_not_fit_and_must_be_at_work_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgestill.compress.distill_teachers.fit_together", lambda teachers, memory: False)
    refused = pytest.raises(BadInput, match=r"losses.attention needs the teachers .*the teachers do not fit together")
    with setting(tmp_path, train={"teacher_cache": "auto"}, losses={"attention": {}}) as at, refused:
        caches_of(at, [1.0, 1.0])
    with setting(tmp_path, train={"teacher_cache": "auto"}) as at:
        assert caches_of(at, [1.0, 1.0]) is not None
