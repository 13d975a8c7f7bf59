"""Paths of leaves as plain segments, and what a pattern finds in them."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from gradsmooth_optax._calls import raw
from gradsmooth_optax._checks import LARGEST_LAYER

Path: TypeAlias = tuple[str | int, ...]

# How Flax's boxes and haliax's named arrays end the path of the array they hold.
_BOX_ATTRIBUTES = ("value", "data_array")


def plain_path(key_path: Sequence[Any]) -> Path:
    """The plain segments of a jax key path, without the trailing keys of boxes."""
    keys = list(key_path)
    while keys and _is_box_key(keys[-1]):
        keys.pop()
    segments: list[str | int] = []
    for key in keys:
        segment = _segment(key)
        if isinstance(segment, str) and "/" in segment:
            segments += [part for part in segment.split("/") if part]
        else:
            segments.append(segment)
    return tuple(segments)


def show_path(path: Path) -> str:
    """The "/"-joined path, for patterns and messages."""
    return "/".join(map(str, path))


def some(items: Sequence[Any], limit: int = 6) -> str:
    """The first items, and how many more there are, for messages."""
    shown = ", ".join(map(str, items[:limit]))
    more = len(items) - limit
    return f"{shown} and {more} more" if more > 0 else shown


def _is_box_key(key: Any) -> bool:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return key.name in _BOX_ATTRIBUTES
    return isinstance(key, jax.tree_util.FlattenedIndexKey)


def _segment(key: Any) -> str | int:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return key.name
    if isinstance(key, jax.tree_util.SequenceKey):
        return key.idx
    name = getattr(key, "key", key)  # DictKey, FlattenedIndexKey and their likes
    if isinstance(name, int | np.integer) and not isinstance(name, bool):
        return int(name)
    return str(name)


# -- Patterns --------------------------------------------------------------------------

FIRST_NUMBERED_SEGMENT = r"(?:^|/)[^/]*?(?P<layer>\d+)(?:/|$)"
_EDGE = "/_."


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The compiled pattern, or an error that says how to write it."""
    if not isinstance(pattern, str):
        raise TypeError(
            f"`pattern` must be a string with a regular expression, but is "
            f"{pattern!r} of type {type(pattern).__name__}."
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`pattern` {raw(pattern)} is not a valid regular expression: {error}. "
            f"Write it as a raw string, as in r'layers_(\\d+)/', and escape characters "
            f"that are meant literally, such as '.' or '('."
        ) from None


def layer_group(expression: re.Pattern[str]) -> int | None:
    """Number of the group with the layer number: `layer`, else the first unnamed."""
    if "layer" in expression.groupindex:
        return expression.groupindex["layer"]
    named = set(expression.groupindex.values())
    return next((n for n in range(1, expression.groups + 1) if n not in named), None)


def search(
    pattern: str, path: Path, stack: Hashable | None
) -> tuple[Hashable, str, int] | None:
    """(stack, role, number in the path) of a path that matches, else None."""
    expression, text = compile_pattern(pattern), show_path(path)
    match = expression.search(text)
    if match is None:
        return None
    group = layer_group(expression)
    if group is None or match[group] is None:
        number, stack_end = 0, match.end()
    else:
        number, stack_end = _number(match, group), match.start(group)
    named = match.groupdict()
    if stack is None:
        stack = named.get("stack")
    if stack is None:
        stack = text[:stack_end].rstrip(_EDGE)
    rest = text[match.end() :].lstrip(_EDGE)
    role = "/".join(part for part in (named.get("role"), rest) if part)
    return stack, role, number


def _number(match: re.Match[str], group: int) -> int:
    digits, text = match[group], match.string
    if not re.fullmatch(r"[+-]?\d+", digits):
        raise ValueError(
            f"`pattern` {raw(match.re.pattern)} takes {digits!r} for the layer number "
            f"of leaf {text}, which is not a number. The first unnamed group is the "
            f"layer number: write other groups as `(?:...)`, or name the right one "
            f"`(?P<layer>\\d+)`."
        )
    before, after = text[: match.start(group)], text[match.end(group) :]
    if before[-1:].isdigit() or after[:1].isdigit():
        raise ValueError(
            f"`pattern` {raw(match.re.pattern)} cuts a number of leaf {text} in two "
            f"and takes {digits!r} for the layer. Match the whole number: write "
            f"`(\\d+)` instead of `(\\d)`, and no `.*` right before it."
        )
    if abs(number := int(digits)) > LARGEST_LAYER:
        raise ValueError(
            f"`pattern` {raw(match.re.pattern)} takes {digits} for the layer number of "
            f"leaf {text}, which is too large for one and probably a hash. Let the "
            f"pattern take another number, or none of this leaf."
        )
    return number
