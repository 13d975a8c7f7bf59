"""Pickling of a value that a decorator put in the place of a function."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


def reduce_by_name(value: Any, function: Callable) -> tuple[Callable, tuple]:
    """What `__reduce__` of `value`, made by `type(value)(function)`, returns.

    Pickle finds a function by its name. After decoration that name leads to `value`
    and the function behind it cannot be found, so `value` is pickled by the name.
    """
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", "")
    try:
        decorated = _named(module, name) is value
    except (ImportError, AttributeError, TypeError, ValueError):
        decorated = False
    if decorated:
        return _named, (module, name)
    return type(value), (function,)


def _named(module: Any, qualname: str) -> Any:
    return functools.reduce(
        getattr, qualname.split("."), importlib.import_module(module)
    )
