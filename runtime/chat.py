"""Chat messages to a prompt, by the template that ships with the bundle, in jinja2's sandbox.

The environment is that of transformers' `apply_chat_template` (trimmed blocks, loop controls, unescaped `tojson`,
`raise_exception`), except for `strftime_now`: a prompt that depends on the clock can't be repeated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from edgestill.runtime.errors import BadInput, BundleError

TEMPLATE = "chat_template.jinja"


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt for `messages` (each with `role` and `content`), up to where the assistant begins to answer.

    The result holds the template's own special tokens: tokenize it with `add_special_tokens=False`.

    Raises:
        BadInput: messages of another shape, or the template refuses them.
        BundleError: the template is not valid, or does what the sandbox forbids.
    """
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    _check_messages(messages)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(template).render(
            messages=[dict(m) for m in messages],
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateSyntaxError, SecurityError) as error:
        raise BundleError(f"{TEMPLATE}: {error}; build the bundle with another template") from error
    except (TemplateError, TypeError, ValueError, OverflowError) as error:
        raise BadInput(f"{TEMPLATE} does not take these messages: {error}; change the messages") from error


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | Mapping) or not messages:
        raise BadInput(f"messages is {messages!r}; give a list of at least one {{'role': ..., 'content': ...}}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise BadInput(f"messages[{i}] is {message!r}; give {{'role': ..., 'content': ...}}")


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise BadInput(f"{TEMPLATE} does not take these messages: {message}; change the messages")
