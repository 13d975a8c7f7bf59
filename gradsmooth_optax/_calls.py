"""Values that show the call that makes them, and functions that are pickled by name."""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradsmooth_optax._checks import is_traced


def shown_call(
    name: str, args: Sequence[Any] = (), options: Mapping[str, Any] | None = None
) -> str:
    """`gs.name(args, option=value)`, which evaluates where only `gs` is defined.

    Arrays are shown as numbers and lists; a function, which no text can make again, as
    `<module.name>`.
    """
    shown = [shown_value(arg) for arg in args]
    shown += [f"{key}={shown_value(value)}" for key, value in (options or {}).items()]
    return f"gs.{name}({', '.join(shown)})"


def shown_value(value: Any) -> str:
    """A literal, a call, or the name of a function."""
    if is_traced(value):
        return repr(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        return repr(value if is_key else np.asarray(value).tolist())
    if isinstance(value, str):
        return raw(value)
    if type(value) is tuple:
        items = ", ".join(map(shown_value, value))
        return f"({items},)" if len(value) == 1 else f"({items})"
    if callable(value):
        name = getattr(value, "__qualname__", None)
        if name is None:
            return f"<{type(value).__module__}.{type(value).__qualname__}>"
        return f"<{getattr(value, '__module__', '')}.{name}>"
    return repr(value)


def raw(text: str) -> str:
    """The text as a literal to paste, without doubled backslashes."""
    literal = f"r{text!r}".replace("\\\\", "\\")
    try:
        same = "\\" in text and ast.literal_eval(literal) == text
    except SyntaxError:
        same = False
    return literal if same else repr(text)


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
