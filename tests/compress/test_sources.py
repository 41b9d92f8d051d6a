"""What the readers of text, rows and exchanges yield, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgestill.compress.sources import Document, Exchange, read_source, source_files, source_hash, source_name
from edgestill.profiles.schema import SourceSpec
from edgestill.runtime.errors import BadInput


def read(tmp_path: Path, **words: str) -> list[Document | Exchange]:
    spec = SourceSpec(**words)  # type: ignore[arg-type]
    return list(read_source(spec, lambda path: tmp_path / path, tmp_path / "cache"))


def write_rows(path: Path, *rows: dict[str, object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_text_file_is_one_document_with_its_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n  two\n\n".encode())
    assert read(tmp_path, path="a.txt") == [Document("one\n\n  two\n\n")]


def test_a_separator_line_ends_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\nstill one\n***\n\n***\n***two\n*** \nthree\n")
    expected = ["one\n\nstill one", "***two", "three"]
    assert read(tmp_path, path="a.txt", separator="***") == [Document(text) for text in expected]


def test_a_folder_is_all_known_files_below_it_in_order(tmp_path: Path) -> None:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "b.txt").write_text("second")
    (tmp_path / "d" / "a.md").write_text("first")
    (tmp_path / "d" / "picture.png").write_bytes(b"\xff\xff")
    write_rows(tmp_path / "d" / "sub" / "c.jsonl", {"text": "third"}, {"text": " \n"})
    assert read(tmp_path, path="d") == [Document("first"), Document("second"), Document("third")]


def test_parquet_columns(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["x", "y"], "n": [1, 2]}), tmp_path / "a.parquet")
    assert read(tmp_path, path="a.parquet", text_column="body") == [Document("x"), Document("y")]


def test_prompts_are_text_or_messages(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    write_rows(tmp_path / "a.jsonl", {"q": messages, "a": "hello"})
    write_rows(tmp_path / "b.jsonl", {"q": "hi", "a": "hello"})
    (ours,) = read(tmp_path, path="a.jsonl", prompt_column="q", response_column="a")
    assert isinstance(ours, Exchange)
    assert (list(ours.prompt), ours.response) == (messages, "hello")
    (ours,) = read(tmp_path, path="b.jsonl", prompt_column="q", response_column="a")
    assert isinstance(ours, Exchange)
    assert ours.prompt == ({"role": "user", "content": "hi"},)


def test_a_column_names_the_domain_of_each_row(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": "x", "of": "law"}, {"text": " ", "of": "law"}, {"text": "y", "of": "en.news-2"}]
    write_rows(tmp_path / "a.jsonl", *rows)
    (tmp_path / "set").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set" / "a.parquet")
    expected = [Document("x", domain="law"), Document("y", domain="en.news-2")]
    assert read(tmp_path, path="a.jsonl", domain_column="of", domain="other") == expected
    assert read(tmp_path, path="set", domain_column="of") == expected
    assert read(tmp_path, hub=str(tmp_path / "set"), revision="main", domain_column="of") == expected
    assert read(tmp_path, path="a.jsonl") == [Document("x"), Document("y")]
    (ours, _, theirs) = read(tmp_path, path="a.jsonl", prompt_column="text", response_column="text", domain_column="of")
    assert (ours.domain, theirs.domain) == ("law", "en.news-2")


def test_domains_that_cannot_be_used(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", {"text": "x", "of": "law"}, {"text": "y", "of": None}, {"text": "z", "of": "law"})
    write_rows(tmp_path / "b.jsonl", {"text": "x", "of": "law"}, {"text": "y", "of": "tax law"})
    write_rows(tmp_path / "c.jsonl", {"text": "x", "of": 3, "long": "a" * 65, "list": ["law"]})
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "b.txt").write_text("text")
    write_rows(tmp_path / "mixed" / "a.jsonl", {"text": "x", "of": "law"})
    (tmp_path / "a.txt").write_text("text")
    for path, column, message in (
        ("a.jsonl", "of", "a.jsonl, row 2: column 'of' holds None, which names no domain"),
        ("b.jsonl", "of", "b.jsonl, row 2: column 'of' holds 'tax law', which names no domain .*; correct the row"),
        ("c.jsonl", "of", "row 1: column 'of' holds 3, which names no domain"),
        ("c.jsonl", "long", "row 1: column 'long' holds 'aaa"),
        ("c.jsonl", "list", r"row 1: column 'list' holds .'law'., which"),
        ("c.jsonl", "domain", "row 1: no column 'domain', there are 'text', 'of', 'long', 'list'"),
        ("a.txt", "of", "a.txt: domain_column needs rows, this is plain text; use .jsonl or .parquet"),
        ("mixed", "of", "b.txt: domain_column needs rows"),
    ):
        with pytest.raises(BadInput, match=message) as caught:
            read(tmp_path, path=path, domain_column=column)
        assert "\n" not in str(caught.value)
        if "needs rows" in message:  # known before anything is read
            with pytest.raises(BadInput, match=message):
                source_files(SourceSpec(path=path, domain_column=column), lambda given: tmp_path / given)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_the_first_byte_that_is_not_utf8_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("ä fine ".encode() + b"\xe4 wrong")
    with pytest.raises(BadInput, match=r"byte 8 \(0xe4\) is not UTF-8.*iconv"):
        read(tmp_path, path=name)


def test_missing_things_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", {"body": "x"})
    write_rows(tmp_path / "null.jsonl", {"text": "x"}, {"text": None})
    write_rows(tmp_path / "numbers.jsonl", {"text": 3})
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\nnot json\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("text")
    for words, message in (
        ({"path": "none.txt"}, "there is no .*none.txt"),
        ({"path": "folder"}, "holds no .txt"),
        ({"path": "a.jsonl"}, "row 1: no column 'text', there are 'body'"),
        ({"path": "null.jsonl"}, "row 2: column 'text' holds NoneType"),
        ({"path": "numbers.jsonl"}, "row 1: column 'text' holds int"),
        ({"path": "broken.jsonl"}, "broken.jsonl: cannot be read as rows"),
        ({"path": "empty.jsonl"}, "empty.jsonl: cannot be read as rows"),
        ({"path": "a.txt", "prompt_column": "q", "response_column": "a"}, "prompt_column needs rows"),
        ({"path": "a.jsonl", "prompt_column": "body", "response_column": "a"}, "no column 'a'"),
        ({"hub": "nobody/nothing", "revision": "abc"}, "nobody/nothing:train@abc: cannot be read"),
    ):
        with pytest.raises(BadInput, match=message) as caught:
            read(tmp_path, **words)
        assert "\n" not in str(caught.value)


def test_a_source_is_known_by_its_bytes_or_its_revision(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")

    def hashed(**words: str) -> str:
        return source_hash(SourceSpec(**words), lambda path: tmp_path / path)  # type: ignore[arg-type]

    before = hashed(path="a.txt")
    (tmp_path / "a.txt").write_text("two")
    assert hashed(path="a.txt") != before
    assert hashed(hub="x/y", revision="r", subset="s") == "x/y/s:train@r"
    assert source_name(SourceSpec(path="a.txt")) == "a.txt"
    with pytest.raises(BadInput, match="there is no"):
        hashed(path="b.txt")
