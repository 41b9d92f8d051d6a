"""Chat templates run in a sandbox and give what transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bundles import checkpoint, make_bundle
from transformers import AutoTokenizer

from edgestill.runtime.chat import render_chat
from edgestill.runtime.errors import BadInput, BundleError
from edgestill.runtime.model import load

TEMPLATE = """{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('role ' + message.role + ' is unknown') }}
    {%- endif %}
    {%- if loop.first %}{{ bos_token }}{% endif %}
<{{ message.role }}>{{ message.content | trim }}
    {% if message.role == 'assistant' %}
{{ eos_token }}
    {% endif %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
{%- endfor %}
{{ {'é': '<&>'} | tojson }}
{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}
{% if add_generation_prompt %}<assistant>{% endif %}
"""
MESSAGES = [
    {"role": "user", "content": " Who? "},
    {"role": "assistant", "content": "I."},
    {"role": "user", "content": "Où <b>?"},
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_chat_renders_as_in_transformers(tmp_path: Path, add_generation_prompt: bool) -> None:
    template = TEMPLATE.replace("strftime_now is defined", "false")
    model = load(make_bundle(tmp_path / "b", template=template))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(template=template))
    theirs = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt)
    ours = model.render_chat(MESSAGES, add_generation_prompt=add_generation_prompt)
    assert ours == theirs
    assert "<&>" in ours
    assert model.tokenize(ours, add_special_tokens=False) == tokenizer(theirs, add_special_tokens=False).input_ids


def test_a_bundle_without_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has no chat_template"):
        load(make_bundle(tmp_path / "b")).render_chat(MESSAGES)


def render(template: str, messages: Any = MESSAGES) -> str:
    return render_chat(template, messages, bos_token="<s>", eos_token="</s>")


def test_the_clock_is_not_there() -> None:
    assert "20" not in render(TEMPLATE)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ (lambda: 0) }}",
        "{% for %}",
    ],
)
def test_a_template_that_is_invalid_or_leaves_the_sandbox_is_refused(template: str) -> None:
    with pytest.raises(BundleError, match=r"chat_template\.jinja"):
        render(template)


def test_messages_the_template_refuses_are_bad_input() -> None:
    with pytest.raises(BadInput, match="role tool is unknown"):
        render(TEMPLATE, [{"role": "tool", "content": "x"}])
    with pytest.raises(BadInput, match="does not take these messages"):
        render("{{ messages[0].missing.deeper }}")


@pytest.mark.parametrize("messages", [[], "hello", {"role": "user", "content": "x"}, [{"role": "user"}], ["hello"]])
def test_messages_of_another_shape_are_refused(messages: Any) -> None:
    with pytest.raises(BadInput, match="messages"):
        render("x", messages)
