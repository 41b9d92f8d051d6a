"""Recipes and profiles from YAML: what loads, and the exact line of every mistake."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.profiles import load, locate
from edgestill.profiles.explain import PATTERNS, yaml_number
from edgestill.profiles.load import load_profile, load_recipe, packaged
from edgestill.profiles.schema import Profile, Recipe
from edgestill.runtime.errors import BadInput

DEVICE = "device: {arch: x86_64, engine: onnxruntime-cpu, memory_mib: 8192, memory_bandwidth_gb_per_s: 20}\n"
RECIPE = """\
format: 1
teachers: [{name: a, model: models/a}, {name: b, model: /models/b}]
student: {init: 'teacher:a', layers: 1}
data: {sources: [{path: text}]}
train: {tokens: 1_000_000}
"""


def problems(text: str, tmp_path: Path, *, recipe: bool = False) -> list[str]:
    """The lines of the error that `text` causes, without the file's name."""
    path = tmp_path / "given.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        (load_recipe if recipe else load_profile)(str(path))
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"{path}:") for line in lines)
    return [line.removeprefix(f"{path}:") for line in lines]


@pytest.mark.parametrize("name", packaged("profiles"))
def test_packaged_profiles_load(name: str) -> None:
    loaded = load_profile(name)
    assert loaded.name == name
    assert loaded.text.startswith("# ")
    assert loaded.profile.budget
    assert re.search("not (yet )?measured", loaded.text) or name == "cpu-x86", (
        "budgets of a device that was not measured say so"
    )


@pytest.mark.parametrize("name", packaged("recipes"))
def test_packaged_recipes_load(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.name == name
    assert loaded.text.startswith("# ")
    assert (loaded.base / "pyproject.toml").is_file()


def test_the_promised_devices_are_packaged() -> None:
    assert {
        *("cpu-x86", "cpu-arm64", "rtx-4090", "rtx-5090", "jetson-orin-nano", "jetson-agx-orin"),
        *("l4", "a100", "h100", "h200"),
    } == set(packaged("profiles"))


def test_a_recipe_knows_where_its_paths_start(tmp_path: Path) -> None:
    path = tmp_path / "my-recipe.yml"
    path.write_text(RECIPE, encoding="utf-8")
    loaded = load_recipe(str(path))
    assert (loaded.name, loaded.base, loaded.path) == ("my-recipe", tmp_path, path)
    assert loaded.resolve(loaded.recipe.teachers[0].model) == tmp_path / "models" / "a"
    assert loaded.resolve(loaded.recipe.teachers[1].model) == Path("/models/b")
    assert loaded.recipe.train.tokens == 1_000_000
    assert loaded.text == RECIPE


def test_a_relative_path_is_kept_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("r.yaml").base == tmp_path
    assert load_recipe("./r.yaml").path == tmp_path / "r.yaml"


def test_a_packaged_recipe_starts_at_the_checkout_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inside = locate.FOLDERS["recipes"] / "quickstart.yaml"
    assert locate.base_of(inside) == Path(load.__file__).resolve().parent.parent
    monkeypatch.setattr(locate, "HOME", tmp_path / "site-packages" / "edgestill" / "profiles")
    assert locate.base_of(inside) == tmp_path


def test_integers_stand_for_floats_and_pairs_for_tuples(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    extra = "losses: {cross_entropy: 1, features: {layers: [[0, 1], [1, 3]]}}\nlimits: {perplexity/verse: 40}\n"
    path.write_text(RECIPE + extra, encoding="utf-8")
    recipe = load_recipe(str(path)).recipe
    assert recipe.losses.cross_entropy == 1.0
    assert recipe.losses.features is not None
    assert recipe.losses.features.layers == [(0, 1), (1, 3)]
    assert recipe.limits == {"perplexity/verse": 40.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["1: holds no words; start from a packaged file (edgestill profiles)"]),
        ("- a\n- b\n", ["1: holds no section of keys; write `key: value` lines"]),
        ("format: 1\n\tdevice: 2\n", ["2: a tab is used for indentation; use spaces"]),
        ("format: 1\n", ["1: device: is missing; add it"]),
        ("format: 1\ndevice:\n", ["2: device: has no value; write one or remove the line"]),
        ("format: 1\ndevice: 5\n", ["2: device: 5 does not fit; write a section of keys"]),
        ("format: 2\n" + DEVICE, ["1: format: 2 is not allowed; use 1"]),
        ("format: 1\n" + DEVICE + "format: 1\n", ["3: format: is written twice (first in line 1); remove one"]),
        ("format: 1\n" + DEVICE + "precison: {}\n", ["3: precison: unknown key; did you mean 'precision'?"]),
        (
            "format: 1\n" + DEVICE + "precision: {threads: 2}\n",
            ["3: precision.threads: unknown key; it belongs in device"],
        ),
        (
            "format: 1\n" + DEVICE + "zzz: 2\n",
            [
                "3: zzz: unknown key; known: format, device, workload, precision, portable, compare_weights, ship_engine, budget"
            ],
        ),
        (
            "format: 1\n" + DEVICE + "workload: {prompt_tokens: true, new_tokens: 1, batch_size: 1e1}\n",
            [
                "3: workload.prompt_tokens: true is not a whole number; write it in digits",
                "3: workload.new_tokens: 1 is out of range (must be at least 2); raise it",
                "3: workload.batch_size: '1e1' is text to YAML; write 10",
            ],
        ),
        (
            "format: 1\n" + DEVICE + "workload:\n  prompt_tokens: 12.5\n  new_tokens: 8.0\n  batch_size: many\n",
            [
                "4: workload.prompt_tokens: 12.5 is not a whole number; write 12 or 13",
                "5: workload.new_tokens: 8.0 is not a whole number; write 8",
                "6: workload.batch_size: 'many' is text to YAML; write a whole number",
            ],
        ),
        (
            "format: 1\n" + DEVICE + "precision: {weights: int3, block_size: 33, symmetric: yes}\n",
            [
                "3: precision.weights: 'int3' is not allowed; "
                "use 'float32', 'float16', 'bfloat16', 'int8', 'int4', 'nf4', 'fp4' or 'fp8'",
                "3: precision.block_size: 33 is not allowed; use 16, 32, 64, 128 or 256",
                "3: precision.symmetric: 'yes' is neither true nor false; write true or false",
            ],
        ),
        (
            "format: 1\n"
            + DEVICE
            + "budget: {inter_token_ms_p9: 1, kl_nats_per_token: 1, load_ms: 0, peak_rss_mib: 1e3}\n",
            [
                "3: budget.inter_token_ms_p9: unknown metric; did you mean 'inter_token_ms_p95'?",
                "3: budget.kl_nats_per_token: belongs in the limits of a recipe; move it there",
                "3: budget.load_ms: 0 is out of range (must be more than 0); raise it",
                "3: budget.peak_rss_mib: '1e3' is text to YAML; write 1000",
            ],
        ),
        (
            "format: 1\n" + DEVICE + "budget: {parity_max_abs_logit: 1}\n",
            ["3: budget.parity_max_abs_logit: is set by the build itself; remove it"],
        ),
        (
            "format: 1\n" + DEVICE.replace("onnxruntime-cpu", "tensorrt"),
            ["2: device: engine tensorrt needs compute_capability (8.9 for an RTX 4090)"],
        ),
        (
            "format: 1\n" + DEVICE.replace("}", ", compute_capability: 8.9, gpu: [a]}"),
            [
                "2: device.gpu: a list stands where one text is needed; write the text",
                "2: device.compute_capability: 8.9 is not text to YAML; write '8.9' in quotes",
            ],
        ),
        (
            "format: 1\n" + DEVICE.replace("}", ", compute_capability: Ada}"),
            ["2: device.compute_capability: 'Ada' does not fit; write it like '8.9'"],
        ),
        (
            "format: 1\n" + DEVICE + "precision: {weights: fp8}\n",
            ["3: precision.weights: 'fp8' is not built for engine onnxruntime-cpu; use float32, int8, int4, nf4, fp4"],
        ),
        (
            "format: 1\n" + DEVICE + '"two\\nlines": &a 1\n',
            [r"3: 'two\nlines': anchor &a is not allowed; remove it"],
        ),
    ],
)
def test_every_mistake_of_a_profile_in_plain_words(text: str, expected: list[str], tmp_path: Path) -> None:
    assert problems(text, tmp_path) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("tokens: 1_000_000", "tokens: 1e6"), ["5: train.tokens: '1e6' is text to YAML; write 1000000"]),
        (
            ("tokens: 1_000_000", "tokens: 1, learning_rate: 1e-5"),
            ["5: train.learning_rate: '1e-5' is text to YAML; write 1.0e-5"],
        ),
        (("name: b", "name: a"), ["1: teacher names ['a', 'a'] repeat; each must be its own"]),
        (("teacher:a", "teacher:c"), ["1: student.init 'teacher:c' names no teacher; there are a, b"]),
        (("teacher:a", "scratch"), ["3: student.init: 'scratch' does not fit; write config or teacher:NAME"]),
        (
            ("name: b", "name: a b"),
            ["2: teachers[1].name: 'a b' does not fit; use letters, digits, '_', '.' and '-', at most 64"],
        ),
        (("[{path: text}]", "[]"), ["4: data.sources: has 0 items (must have at least 1); add some"]),
        (
            ("[{path: text}]", "[{hub: some/set}]"),
            ["4: data.sources[0]: hub data set 'some/set' needs a revision, so that the build can be repeated"],
        ),
        (
            ("text}]", "text}], validation: {fraction: 2, share: 1}"),
            [
                "4: data.validation.fraction: 2 is out of range (must be less than 0.5); lower it",
                "4: data.validation.share: unknown key; known: fraction",
            ],
        ),
        (
            ("text}]", "text}], validation: 3"),
            [
                "4: data.validation: 3 does not fit; write a section of keys or a list ([a, b] or lines that start with -)"
            ],
        ),
        (
            ("text}]", "text}], held_out: [{path: 3, weigth: 1}]"),
            [
                "4: data.held_out[0].path: 3 is not text to YAML; write '3' in quotes",
                "4: data.held_out[0].weigth: unknown key; did you mean 'weight'?",
            ],
        ),
        (
            ("train:", "losses: {features: {layers: some}}\ntrain:"),
            [
                "5: losses.features.layers: 'some' does not fit; "
                "write 'origin', 'uniform', 'last', 'first_last', 'every' or 'cka' or a list ([a, b] or lines that start with -)"
            ],
        ),
        (
            ("train:", "losses: {features: {layers: [[0, x], [1], [1, 2, 3]]}}\ntrain:"),
            [
                "5: losses.features.layers[0][1]: 'x' is text to YAML; write a whole number",
                "5: losses.features.layers[1][1]: value 2 of the list is missing; add it",
                "5: losses.features.layers[2]: has 3 items (must have at most 2); remove some",
            ],
        ),
        (
            ("train:", "limits: {peak_rss_mib: 9, perplexity_ratio: 1, perplexity/: 2, zzz: 1}\ntrain:"),
            [
                "5: limits.peak_rss_mib: belongs in the budget of a profile; move it there",
                "5: limits.perplexity_ratio: unknown metric; did you mean 'perplexity_ratio_to_teacher'?",
                "5: limits.perplexity/: unknown metric; did you mean 'perplexity'?",
                "5: limits.zzz: unknown metric; known: perplexity, perplexity_ratio_to_teacher, kl_nats_per_token, "
                "top1_agreement, quantization_perplexity_ratio",
            ],
        ),
    ],
)
def test_every_mistake_of_a_recipe_in_plain_words(change: tuple[str, str], expected: list[str], tmp_path: Path) -> None:
    assert change[0] in RECIPE
    assert problems(RECIPE.replace(*change), tmp_path, recipe=True) == expected


def test_all_mistakes_at_once_in_the_order_of_lines(tmp_path: Path) -> None:
    text = "format: 1\nwhat: !x 1\nworkload: {new_tokens: 1}\nformat: 1\nportable: 1\n"
    assert problems(text, tmp_path) == [
        "1: device: is missing; add it",
        "2: what: tag !x is not allowed; remove it",
        "3: workload.new_tokens: 1 is out of range (must be at least 2); raise it",
        "4: format: is written twice (first in line 1); remove one",
        "5: portable: 1 is neither true nor false; write true or false",
    ]


def test_a_name_that_is_not_packaged_lists_the_nearest_and_all() -> None:
    known = ", ".join(packaged("profiles"))
    with pytest.raises(BadInput) as caught:
        load_profile("cpu-x68")
    assert str(caught.value) == (
        f"cpu-x68: unknown profile; did you mean 'cpu-x86'? known: {known}; for a file give a path, such as ./cpu-x68.yaml"
    )
    with pytest.raises(BadInput) as caught:
        load_profile("zzz")
    assert str(caught.value) == f"zzz: unknown profile; known: {known}; for a file give a path, such as ./zzz.yaml"


def test_files_that_are_none(tmp_path: Path) -> None:
    def message(path: Path, content: bytes | None = None) -> str:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BadInput) as caught:
            load_profile(str(path))
        return str(caught.value).replace(str(tmp_path), "DIR")

    known = ", ".join(packaged("profiles"))
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    assert message(tmp_path / "no.yaml") == f"DIR/no.yaml: no such file; give a profile's YAML file or one of {known}"
    assert message(folder) == "DIR/folder.yaml: is a folder; give the YAML file of the profile"
    assert message(tmp_path / "l.yaml", b"format: 1\ndev\xffice: 1\n") == (
        "DIR/l.yaml:2: byte 0xff is not UTF-8; save the file as UTF-8"
    )
    assert message(tmp_path / "big.yaml", b"#" * (load.MAX_BYTES + 1)) == (
        "DIR/big.yaml: is 1048577 bytes (limit 1048576); give the YAML file of a profile"
    )
    assert message(tmp_path / "work.yaml", b"format: 1\n") == (
        "DIR/work.yaml: the file's name 'work' becomes a folder's name; "
        "rename it with letters, digits, '_', '.' and '-' (not work or build.json or student or ablate)"
    )


@pytest.mark.parametrize(
    ("text", "whole", "written"),
    [
        ("1e-5", False, "1.0e-5"),
        ("2.5E3", False, "2500"),
        ("2.5e-3", False, "2.5e-3"),
        ("1e6", True, "1000000"),
        ("010", True, "10"),
        ("1_000", True, "1000"),
        ("1.5", True, None),
        ("0.5", False, "0.5"),
        ("nan", False, None),
        ("1e999", False, None),
        ("ten", False, None),
    ],
)
def test_how_a_number_is_written(text: str, whole: bool, written: str | None) -> None:
    assert yaml_number(text, whole=whole) == written
    if written is not None:
        assert float(written) == float(text)


def test_every_pattern_of_the_schema_has_words() -> None:
    def found(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("pattern"), str):
                yield node["pattern"]
            for inner in node.values():
                yield from found(inner)
        elif isinstance(node, list):
            for inner in node:
                yield from found(inner)

    schemas = [Recipe.model_json_schema(), Profile.model_json_schema()]
    assert set(found(schemas)) == set(PATTERNS)


SCALAR = st.sampled_from(
    ["1", "x", "true", "", "1e5", "[1, a]", "{b: 2}", "'q'", "-1", "9.5", "*a", "&a 1", "!t 1", "[", "#"]
)
KEYS = st.sampled_from(["format", "device", "arch", "budget", "load_ms", "workload", "precision", "x y", "'a\\nb'"])
LINES = st.lists(
    st.tuples(st.sampled_from(["", "  "]), KEYS, SCALAR).map(lambda p: f"{p[0]}{p[1]}: {p[2]}"), max_size=8
)


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(max_size=60).map(str.encode), st.binary(max_size=60), LINES.map("\n".join).map(str.encode)))
def test_arbitrary_bytes_load_or_are_refused_line_by_line(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "given.yaml"
        path.write_bytes(content)
        for read in (load_profile, load_recipe):
            with pytest.raises(BadInput) as caught:
                read(str(path))
            for line in str(caught.value).split("\n"):
                assert re.match(rf"{re.escape(str(path))}:\d+: \S", line)
                assert "pydantic" not in line
