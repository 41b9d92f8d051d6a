"""Every error a user can meet, in one tree.

    EdgestillError                exit 2: one line that names the value, the limit and the repair
    ├── BadInput                  a recipe, profile, argument or file that cannot be used as given
    │   ├── PromptTooLong         prompt + new tokens exceed the model's or the engine's length
    │   └── OutputRefused         the output folder is not ours, is locked, or cannot be written
    ├── BundleError               a bundle that is damaged, undeclared, unsafe or too new (exit 1 from `verify`)
    └── MissingPart               an extra, an engine or a device that is not there; carries the command that installs it

Anything else that escapes is a bug and exits 70. `runtime` is the ground floor (ARCHITECTURE.md), so the other packages
raise these too.
"""

from __future__ import annotations


class EdgestillError(Exception):
    """A known error. `str(error)` is one line: what was given, what the limit is, what to do."""

    exit_code = 2


class BadInput(EdgestillError):
    """Input that cannot be used as given."""


class PromptTooLong(BadInput):
    """The prompt, or the prompt with the new tokens, does not fit. Nothing is truncated silently."""


class OutputRefused(BadInput):
    """The output folder is not a build of ours, is locked by another process, or cannot be written."""


class BundleError(EdgestillError):
    """A bundle that must not be used: wrong hash or digest, missing or undeclared file, unsafe path, newer schema."""


class MissingPart(EdgestillError):
    """Something that has to be installed or connected first."""

    def __init__(self, what: str, repair: str) -> None:
        super().__init__(f"{what}; {repair}")
        self.repair = repair
