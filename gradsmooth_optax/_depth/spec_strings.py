"""A depth spec as a string, as in a YAML file: `maxtext(cycle=6).only_projections()`.

It is parsed, and never evaluated as code.
"""

from __future__ import annotations

import ast
import difflib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

_METHODS = ("only_projections",)
_PREFIXES = ("gs.layouts.", "layouts.", "gs.")


def called_by_name(text: str, argument: str, calls: Mapping[str, Callable]) -> Any:
    """What a string such as `maxtext(cycle=6).only_projections()` stands for.

    Args:
      text: the name of one of the `calls`, or a call of one with literals or further
        calls as arguments.
      argument: which the string was given as.
      calls: by name.

    Raises:
      ValueError: for another text, with what can be written.
      TypeError, ValueError: of the call itself.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pattern's backslashes
            node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(_no_name(text, argument, calls)) from None
    return _value(node, text, argument, calls)


def _value(node: ast.expr, text: str, argument: str, calls: Mapping) -> Any:
    if isinstance(node, ast.Name | ast.Attribute):
        return _call(node, text, argument, calls)()
    if not isinstance(node, ast.Call):
        raise ValueError(_no_name(text, argument, calls))
    function, found = node.func, None
    if isinstance(function, ast.Attribute) and _name(function) not in calls:
        if isinstance(function.value, ast.Call) and function.attr not in _METHODS:
            raise ValueError(
                f"`{argument}`={text!r} ends in `.{function.attr}`, but a string can "
                f"have `.only_projections()` alone. For another restriction pass a "
                f"spec instead of its name."
            )
        if function.attr not in _METHODS:
            raise ValueError(_no_name(text, argument, calls))
        found = getattr(_value(function.value, text, argument, calls), function.attr)
    call = found or _call(function, text, argument, calls)
    args = [_argument(arg, text, argument, calls) for arg in node.args]
    if any(option.arg is None for option in node.keywords):
        raise ValueError(
            f"`{argument}`={text!r} holds `**`: write every option by its name."
        )
    options = {
        str(option.arg): _argument(option.value, text, argument, calls)
        for option in node.keywords
    }
    try:
        return call(*args, **options)
    except (TypeError, ValueError) as error:
        error.add_note(f"Raised for `{argument}`={text!r}.")
        raise


def _argument(node: ast.expr, text: str, argument: str, calls: Mapping) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        if isinstance(node, ast.Call) and (
            _name(node.func) in calls or _is_restriction(node.func)
        ):
            return _value(node, text, argument, calls)
        raise ValueError(
            f"`{argument}`={text!r} holds {ast.unparse(node)!r}, which is no literal. "
            f"A string is never evaluated as code: write numbers, strings and tuples, "
            f"or pass a spec instead of its name."
        ) from None


def _is_restriction(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and function.attr in _METHODS


def _call(node: ast.expr, text: str, argument: str, calls: Mapping) -> Callable:
    if (name := _name(node)) not in calls:
        raise ValueError(_no_name(text, argument, calls))
    return calls[name]


def _name(node: ast.expr) -> str:
    name = ast.unparse(node)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _no_name(text: str, argument: str, calls: Mapping) -> str:
    word = text.strip().lower()
    for prefix in _PREFIXES:
        word = word.removeprefix(prefix)
    word = re.split(r"[(.]", word)[0]
    close = difflib.get_close_matches(word, calls, n=2)
    meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    pattern = f"r{text!r}" if "\\" in text else repr(text)
    pattern = pattern.replace("\\\\", "\\")
    hint = f"`scanned({pattern}, axis=0)`"
    if "(" in text:
        hint = f"`unrolled({pattern})` or {hint}"
    return (
        f"`{argument}`={text!r} is not the name of a layout.{meant} Names are "
        f"{', '.join(sorted(calls))}, with options as in 'maxtext(cycle=6)' and "
        f"restrictions as in 'maxtext().only_projections()'. If it is a pattern, "
        f"write {hint}."
    )
