"""Paths of leaves as plain segments, and what a pattern finds in them."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax

from gradsmooth_optax._calls import raw
from gradsmooth_optax._checks import LARGEST_LAYER
from gradsmooth_optax._depth.boxes import axis_names, is_box

Path: TypeAlias = tuple[str | int, ...]


class Place(NamedTuple):
    """A leaf of a tree, or what stands in the place of leaves that are masked.

    Attributes:
      path: its plain segments.
      leaf: the array, tracer or `jax.ShapeDtypeStruct`; `MASKED` in place of one or
        more leaves that are not there.
      axis_names: the names of its axes, where its box carries them; else ().
    """

    path: Path
    leaf: Any
    axis_names: tuple[Any, ...] = ()


class _Masked:
    def __repr__(self) -> str:
        return "MASKED"


MASKED = _Masked()


def places_of(tree: Any) -> list[Place]:
    """The leaves of a tree in their order, and the places of those that are masked."""
    return list(_places((), tree))


def present(places: Sequence[Place]) -> list[Place]:
    """The places that hold leaves."""
    return [place for place in places if place.leaf is not MASKED]


def _places(path: Path, node: Any, names: tuple[Any, ...] = ()) -> Iterator[Place]:
    flat, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda child: child is not node and _is_special(child)
    )
    # The number of an only child without a name says nothing.
    siblings = Counter(key_path[:-1] for key_path, _ in flat)
    for key_path, child in flat:
        if siblings[key_path[:-1]] == 1 and _is_unnamed(key_path):
            key_path = key_path[:-1]
        here = (*path, *_plain_path(key_path))
        if child is None or isinstance(child, optax.MaskedNode):
            yield Place(here, MASKED)
        elif is_box(child):
            yield from _in_box(here, child, names)
        else:
            known = len(names) == np.ndim(child) > 0
            yield Place(here, child, names if known else ())


def _is_unnamed(key_path: Sequence[Any]) -> bool:
    last = key_path[-1] if key_path else None
    return isinstance(last, jax.tree_util.FlattenedIndexKey)


def _is_special(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode) or is_box(node)


def _in_box(path: Path, box: Any, names: tuple[Any, ...]) -> Iterator[Place]:
    """What a box holds, at the box's own path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        box, is_leaf=lambda child: child is not box
    )
    for _, child in flat:
        yield from _places(path, child, axis_names(box) or names)


def _plain_path(key_path: Sequence[Any]) -> Path:
    """The plain segments of a jax key path, in which no key is one of a box."""
    return tuple(itertools.chain.from_iterable(map(_segments, key_path)))


def show_path(path: Path) -> str:
    """The "/"-joined path, for patterns and messages."""
    return "/".join(map(str, path))


def without_numbers(path: Path) -> str:
    """The "/"-joined path with "#" for every number."""
    return re.sub(r"\d+", "#", show_path(path))


def shortened(text: str, limit: int = 40) -> str:
    """The text, cut where it is long, for messages."""
    return text if len(text) <= limit else f"{text[:limit]}…"


def some(items: Sequence[Any], limit: int = 6) -> str:
    """The first items, and how many more there are, for messages."""
    shown = ", ".join(map(str, items[:limit]))
    more = len(items) - limit
    return f"{shown} and {more} more" if more > 0 else shown


def _segments(key: Any) -> Path:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return (key.name,)
    if isinstance(key, jax.tree_util.SequenceKey):
        return (key.idx,)
    return _segments_of_name(getattr(key, "key", key))  # DictKey and its likes


def _segments_of_name(name: Any) -> Path:
    """Several for "a/b", for a dotted path such as "model.layers.3", for tuples."""
    if isinstance(name, tuple):
        return tuple(itertools.chain.from_iterable(map(_segments_of_name, name)))
    if isinstance(name, int | np.integer) and not isinstance(name, bool):
        return (int(name),)
    parts = str(name).split("/")
    dotted = (p.split(".") if _DOTTED.fullmatch(p) else [p] for p in parts)
    segments = tuple(itertools.chain.from_iterable(dotted))
    return tuple(filter(None, segments)) if len(parts) > 1 else segments


# It starts with a name, and its parts are names or numbers.
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")


# -- Patterns --------------------------------------------------------------------------

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
    if before[-1:].isdecimal() or after[:1].isdecimal():
        raise ValueError(
            f"`pattern` {raw(match.re.pattern)} cuts a number of leaf {text} in two "
            f"and takes {digits!r} for the layer. Match the whole number: write "
            f"`(\\d+)` instead of `(\\d)`, and no `.*` right before it."
        )
    # Python refuses to read numbers of thousands of digits.
    if len(digits) > 100 or abs(int(digits)) > LARGEST_LAYER:
        raise ValueError(
            f"`pattern` {raw(match.re.pattern)} takes {shortened(digits)} for the "
            f"layer number of leaf {shortened(text, 200)}, which is too large for one "
            f"and probably a hash. Let the "
            f"pattern take another number, or none of this leaf."
        )
    return int(digits)
