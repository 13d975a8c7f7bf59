"""Reads the docstrings as they are meant: sections of our own names, bare examples."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
OWN = re.compile(
    r"^(References|Differs from the authors' code):\n((?:[ ]+.*\n?|\n)+)", re.MULTILINE
)
ERRORS = re.compile(r"^ +\w+Error(?:, \w+Error)+:", re.MULTILINE)
# At the margin; those of an example section are indented.
SESSION = re.compile(r"^>>> (?:.+\n?)+", re.MULTILINE)


class Sections(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = SESSION.sub(_fenced, obj.docstring.value)
            text = EXAMPLE.sub("Examples:", text)
            text = ERRORS.sub(lambda names: names[0].replace(",", " |"), text)
            obj.docstring.value = OWN.sub(_section, text)
        if isinstance(obj, griffe.Function):
            for parameter in obj.parameters:
                if parameter.kind is griffe.ParameterKind.var_positional:
                    parameter.default = None  # Not "()", which nobody passes.


def _fenced(session: re.Match[str]) -> str:
    return f"```pycon\n{session[0].rstrip()}\n```\n"


def _section(section: re.Match[str]) -> str:
    """Looks like the sections that griffe knows."""
    lines = (line.strip() for line in section[2].strip().splitlines())
    title = f'<span class="doc-section-title">{section[1]}:</span>'
    return f"{title}\n\n- {' '.join(lines)}\n\n"
