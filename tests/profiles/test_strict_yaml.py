"""YAML without its traps: what is data, what is a problem, and at which line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.profiles.locate import FOLDERS
from edgestill.profiles.strict_yaml import Problem, read_yaml

PACKAGED = sorted([*FOLDERS["profiles"].glob("*.yaml"), *FOLDERS["recipes"].glob("*.yaml")])


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.stem)
def test_packaged_files_mean_what_plain_yaml_reads(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    ours, theirs = read_yaml(text), yaml.safe_load(text)
    assert ours.problems == []
    assert ours.data == theirs


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1_000_000", 1_000_000),
        ("-3", -3),
        ("1.0e-5", 1e-5),
        (".5", 0.5),
        ("true", True),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ("1e-5", "1e-5"),
        ("010", "010"),
        ("12:30", "12:30"),
        ("no", "no"),
        ("on", "on"),
        (".inf", ".inf"),
        ("2024-01-01", "2024-01-01"),
        ("0x1F", "0x1F"),
    ],
)
def test_only_plain_numbers_and_true_false_are_not_text(text: str, value: object) -> None:
    found = read_yaml(f"a: {text}\n").data["a"]
    assert found == value
    assert type(found) is type(value)


def test_lines_of_keys_and_items() -> None:
    document = read_yaml("a:\n  b: 1\n\nlist:\n  - x\n  -\n    y: 2\n")
    assert document.data == {"a": {"b": 1}, "list": ["x", {"y": 2}]}
    assert document.lines[("a", "b")] == 2
    assert document.lines["list", 0] == 5
    assert document.lines["list", 1, "y"] == 7
    assert document.line_of(("list", 1, "missing")) == 7
    assert document.line_of(("nothing",)) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", Problem(1, (), "holds no words; start from a packaged file (edgestill profiles)")),
        ("# a comment\n", Problem(1, (), "holds no words; start from a packaged file (edgestill profiles)")),
        ("a: 1\nb: 2\na: 3\n", Problem(3, ("a",), "is written twice (first in line 1); remove one")),
        ("a: &x 1\n", Problem(1, ("a",), "anchor &x is not allowed; remove it")),
        ("a: !!str 1\n", Problem(1, ("a",), "tag !!str is not allowed; remove it")),
        ("a: !own 1\n", Problem(1, ("a",), "tag !own is not allowed; remove it")),
        ("a: {<<: 1}\n", Problem(1, ("a", "<<"), "merge keys are not allowed; write the keys out")),
        ("1: 2\n", Problem(1, ("1",), "is not text; put the key in quotes")),
        ("? [a]\n: 1\n", Problem(1, (), "a key is a list or a section; write a word before the colon")),
        ("a: 1234567890123456789\n", Problem(1, ("a",), "has 19 digits (limit 18); write a smaller number")),
        ("a: 1.0e+999\n", Problem(1, ("a",), "1.0e+999 is too large for a number; write a smaller one")),
        ('a: "\\0"\n', Problem(1, ("a",), "holds a control character or half a character; remove it")),
        ('"\\ud800": 1\n', Problem(1, ("\ud800",), "holds a control character or half a character; remove it")),
        ("a:\n\tb: 1\n", Problem(2, (), "a tab is used for indentation; use spaces")),
        ("a: 1\n\tb: 1\n", Problem(2, (), "a tab is used for indentation; use spaces")),
        ("a: 1\n---\nb: 1\n", Problem(2, (), "a second document starts here (---); keep one per file")),
        ("a: b\x00\n", Problem(1, (), "character U+0000 is not allowed; remove it")),
        ('a: "\\UFFFFFFFF"\n', Problem(1, (), "a number in an escape or directive is out of range; correct it")),
        ("[" * 40, Problem(1, (), "sections are nested deeper than 32; flatten them")),
        ("a: 'b\n", Problem(2, (), "not YAML: found unexpected end of stream; close the quote")),
        (
            "a: [1\n",
            Problem(2, (), "not YAML: expected ',' or ']', but got '<stream end>'; close the bracket or put a comma"),
        ),
        (
            "a: b: c\n",
            Problem(
                1,
                (),
                "not YAML: mapping values are not allowed here; indent with the lines around it, "
                "or quote a text that holds ': '",
            ),
        ),
        ("a: @b\n", Problem(1, (), "not YAML: found character '@' that cannot start any token; correct the line")),
    ],
)
def test_each_problem_has_its_line_and_words(text: str, problem: Problem) -> None:
    assert read_yaml(text).problems == [problem]


def test_an_alias_is_refused_beside_its_anchor() -> None:
    assert [p.what for p in read_yaml("a: &x [1]\nb: *x\n").problems] == [
        "anchor &x is not allowed; remove it",
        "alias *x is not allowed; write the value out",
    ]


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet=st.sampled_from(list("ab:-[]{}&*!|>'\"%@#?,.~ \n\t\\0xU19e_<\x00\ufeff")), max_size=40))
def test_any_text_gives_data_or_problems(text: str) -> None:
    document = read_yaml(text)
    assert document.problems or document.data is not None or text.strip(" \n\ufeff")
    assert all("\n" not in problem.what and problem.line >= 1 for problem in document.problems)
