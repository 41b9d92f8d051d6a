"""YAML without its traps: text in, plain data with the line of every key out, problems collected instead of raised.

Differences from yaml.safe_load, each of which has bitten someone: a duplicate key is a problem; anchors, aliases, merge
keys and tags are problems; only true/false are booleans (`no`, `on` are text); only plain decimal numbers are numbers
(`010`, `12:30`, `1e-5`, `.inf` and dates are text, and where a number is needed the error says how to write it).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

MAX_DEPTH = 32
MAX_DIGITS = 18
"""Longer integers are typing errors, and Python refuses to read very long ones."""

_UNFIT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Control characters and lone surrogates, which only escapes can bring in."""

_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: line (from 1), the keys that lead to it, and one line of words with the repair."""

    line: int
    path: KeyPath
    what: str


@dataclass
class Document:
    """data: dicts, lists and scalars; lines: key path -> line from 1; broken: the text could not be read to its end."""

    data: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    broken: bool = False

    def line_of(self, path: KeyPath) -> int:
        """The line of `path`, or of the nearest section that holds it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


class _TooDeepError(Exception):
    """Nesting beyond MAX_DEPTH, which no recipe or profile needs."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that keeps nodes and notes what is refused about each, by the node's identity."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.refused: dict[int, str] = {}
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            node: yaml.Node | None = yaml.ScalarNode(_NULL, "", *_marks(event))
            self.refused[id(node)] = f"alias *{event.anchor} is not allowed; write the value out"
            return node
        reasons = []
        if event.anchor is not None:
            reasons.append(f"anchor &{event.anchor} is not allowed; remove it")
            event.anchor = None
        if getattr(event, "tag", None) is not None:
            reasons.append(f"tag {_short_tag(event.tag)} is not allowed; remove it")
            event.tag = None
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _TooDeepError
        node = super().compose_node(parent, index)
        self._depth -= 1
        if reasons:
            self.refused[id(node)] = " and ".join(reasons)
        return node


def _marks(event: yaml.Event) -> tuple[Any, Any]:
    return event.start_mark, event.end_mark


def _short_tag(tag: str) -> str:
    return "!!" + tag.removeprefix("tag:yaml.org,2002:") if tag.startswith("tag:yaml.org,2002:") else tag


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), [*"~nN", ""])
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), [*"-+0123456789"])
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:(?:0|[1-9][0-9_]*)\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]{1,3})?$"),
    [*"-+.0123456789"],
)


class _Walk:
    """Turns nodes into data and notes lines and problems under their key paths."""

    def __init__(self, refused: dict[int, str], document: Document) -> None:
        self.refused = refused
        self.document = document

    def problem(self, node: yaml.Node, path: KeyPath, what: str) -> None:
        self.document.problems.append(Problem(node.start_mark.line + 1, path, what))

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if id(node) in self.refused:
            self.problem(node, path, self.refused[id(node)])
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(key_node, path, "a key is a list or a section; write a word before the colon")
                continue
            key = key_node.value
            here = (*path, key)
            line = key_node.start_mark.line + 1
            if id(key_node) in self.refused:
                self.problem(key_node, here, self.refused[id(key_node)])
            elif _UNFIT.search(key):
                self.problem(key_node, here, "holds a control character or half a character; remove it")
                continue
            elif key in data:
                first = self.document.lines[here]
                self.problem(key_node, here, f"is written twice (first in line {first}); remove one")
                continue
            elif key == "<<":
                self.problem(key_node, here, "merge keys are not allowed; write the keys out")
            elif key_node.tag in (_NULL, _BOOL, _INT, _FLOAT):
                self.problem(key_node, here, "is not text; put the key in quotes")
            self.document.lines[here] = line
            data[key] = self.value(value_node, here)
        return data

    def scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        text: str = node.value
        if node.tag == _NULL:
            return None
        if node.tag == _BOOL:
            return text.lower() == "true"
        digits = text.replace("_", "")
        if node.tag == _INT:
            if len(digits) > MAX_DIGITS:
                self.problem(node, path, f"has {len(digits)} digits (limit {MAX_DIGITS}); write a smaller number")
                return 0
            return int(digits)
        if node.tag == _FLOAT:
            number = float(digits)
            if number in (float("inf"), float("-inf")):
                self.problem(node, path, f"{text[:40]} is too large for a number; write a smaller one")
                return 0.0
            return number
        if _UNFIT.search(text):
            self.problem(node, path, "holds a control character or half a character; remove it")
            return ""
        return text


def read_yaml(text: str) -> Document:
    """The data of `text`, the line of every key, and every problem. Never raises on bad text."""
    document = Document()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except _TooDeepError:
        document.problems.append(Problem(1, (), f"sections are nested deeper than {MAX_DEPTH}; flatten them"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        document.problems.append(Problem(mark.line + 1 if mark else 1, (), _syntax(error)))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.problems.append(Problem(line, (), f"character U+{error.character:04X} is not allowed; remove it"))
    except (ValueError, OverflowError):
        # PyYAML passes numbers of escapes (\UFFFFFFFF) and of %YAML lines to chr() and int() unchecked
        line = loader.line + 1
        document.problems.append(Problem(line, (), "a number in an escape or directive is out of range; correct it"))
    else:
        if node is None:
            document.problems.append(Problem(1, (), "holds no words; start from a packaged file (edgestill profiles)"))
        else:
            document.data = _Walk(loader.refused, document).value(node, ())
            return document
    document.broken = True
    return document


def _syntax(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's complaint as one plain line with a repair."""
    problem = " ".join((error.problem or "it breaks off").split())
    mark = error.problem_mark
    line = (mark.buffer or "").replace("\0", "") if mark else ""
    if "'\\t'" in problem or "\t" in line[: mark.pointer + 1 if mark else 0].rsplit("\n", 1)[-1]:
        return "a tab is used for indentation; use spaces"
    if "expected a single document" in f"{error.context} {problem}":
        return "a second document starts here (---); keep one per file"
    repairs = {
        "mapping values are not allowed": "indent with the lines around it, or quote a text that holds ': '",
        "could not find expected ':'": "write key: value",
        "expected <block end>": "indent it like the lines around it",
        "expected ',' or": "close the bracket or put a comma",
        "unexpected end of stream": "close the quote",
    }
    repair = next((words for start, words in repairs.items() if start in problem), "correct the line")
    return f"not YAML: {problem}; {repair}"
