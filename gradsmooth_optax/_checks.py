"""Every check of an argument. Concrete values are looked at, traced ones never."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Hashable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

NormScope: TypeAlias = Literal["param", "block"]
Matrix: TypeAlias = np.ndarray | jax.Array

LARGEST_LAYER = _LARGEST_INT = 2**31 - 1
_LARGEST = float(np.finfo(np.float64).max)


def is_traced(x: Any) -> bool:
    """Whether it is an array without a value, while a program is being traced."""
    if not isinstance(x, jax.Array):
        return False
    try:  # the class of tracers is outside of jax's promise of compatibility
        _ = x.is_fully_addressable
    except (AttributeError, jax.errors.ConcretizationTypeError):
        return True
    return False


def shown(value: Any) -> str:
    """The value as an error shows it: in one line, and not at any length."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of thousands of digits, or somebody's `__repr__`
        return f"an object of type {type(value).__name__}"
    return text if len(text) <= 160 else f"{text[:120]} … {text[-30:]}"


# -- Words, flags and names ------------------------------------------------------------


def check_choice(argument: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises for a value that is not one of the `allowed` words."""
    if not isinstance(value, str) or value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(
            f"`{argument}` must be one of {choices}, but is {shown(value)}."
        )


def check_flag(argument: str, value: Any) -> None:
    """Raises for a value that is no bool."""
    if not isinstance(value, bool):
        raise TypeError(
            f"`{argument}` must be True or False, but is {shown(value)} of type "
            f"{type(value).__name__}."
        )


def hashable(argument: str, value: Any) -> Hashable:
    """The value, if it can be the name of something."""
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"`{argument}` must be hashable, such as a string or a tuple of strings, "
            f"but is {shown(value)}."
        ) from None
    return value


def axis_names(argument: str, value: Any) -> tuple[Hashable, ...]:
    """The names, if they are those of different mesh axes."""
    if not isinstance(value, tuple | list):
        raise TypeError(
            f"`{argument}` must be a tuple of names of mesh axes, but is "
            f"{shown(value)}. Write `{argument}=({shown(value)},)`."
        )
    for name in value:
        check_axis_name(argument, name)
    if len(set(value)) < len(value):
        raise ValueError(f"`{argument}` names an axis twice: {value!r}.")
    return tuple(value)


def check_axis_name(argument: str, value: Any) -> None:
    """Raises for what is no name of a mesh axis: jax takes an int for an array's."""
    hashable(argument, value)
    if value is None or isinstance(value, int):
        raise TypeError(
            f"`{argument}` must name a mesh axis, but holds {shown(value)}. Write its "
            f"name, as in `jax.make_mesh((4,), ('stage',))`: `'stage'`."
        )


# -- Whole numbers ---------------------------------------------------------------------


def integer(argument: str, value: Any) -> int:
    """The value, if it is an int and no array of jax."""
    try:
        if not isinstance(value, bool | jax.Array):
            return operator.index(value)
    except TypeError:  # not even of a NumPy array, but for one int
        pass
    raise TypeError(
        f"`{argument}` must be an int, but is {shown(value)} of type "
        f"{type(value).__name__}."
    )


def integers(argument: str, value: Any) -> int | tuple[int, ...]:
    """One int, or a tuple of them."""
    if isinstance(value, list | tuple | range):
        return tuple(integer(argument, item) for item in value)
    return integer(argument, value)


def positive_int(argument: str, value: Any, hint: str = "") -> int:
    """The value, if it is a Python int of at least 1."""
    if isinstance(value, np.ndarray | jax.Array):
        raise TypeError(
            f"`{argument}` must be a Python int, since it decides what is compiled, "
            f"but is an array: {shown(value)}. Inside `optax.inject_hyperparams` write "
            f'`inject_hyperparams(..., static_args=("{argument}",))`.'
        )
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"`{argument}` must be an int >= 1, but is {shown(value)} of type "
            f"{type(value).__name__}."
        )
    if operator.index(value) < 1:
        raise ValueError(
            f"`{argument}` must be an int >= 1, but is {shown(value)}.{hint}"
        )
    return operator.index(value)


# -- Strengths: numbers, arrays and schedules ------------------------------------------


def is_function(value: Any) -> bool:
    """Whether it can be called, and is no class."""
    return callable(value) and not isinstance(value, type)


def strength_in(argument: str, value: Any, high: float = math.inf) -> Any:
    """The value, if it is a schedule, a scalar array or a number in range."""
    allowed = ">= 0 and finite" if high == math.inf else f"between 0 and {high:g}"
    if is_function(value):
        return value
    if isinstance(value, bool | np.bool_) or not _is_real(value):
        raise TypeError(
            f"`{argument}` must be a number {allowed}, a scalar array or an optax "
            f"schedule, but is {shown(value)} of type {type(value).__name__}."
        )
    if np.shape(value) != ():
        raise ValueError(
            f"`{argument}` must be one scalar, but has shape {np.shape(value)}. For a "
            f"strength per layer pass the whole matrix: `dense(matrix)`."
        )
    if isinstance(value, jax.Array):
        return value  # maybe traced: never looked at
    if not 0 <= _number(value) <= min(high, _LARGEST):
        hint = ""
        if high == 1 and 1 < value <= 100:
            hint = f" It is a fraction: write {value / 100:g} for {value} %."
        found = shown(value) if isinstance(value, int) else value
        raise ValueError(f"`{argument}` must be {allowed}, but is {found}.{hint}")
    # A NumPy array could be written to later.
    return float(value) if isinstance(value, np.ndarray) else value


def scalar_or_schedule(argument: str, value: Any) -> Any:
    """The value, if it is a schedule, or a real number or scalar array of any size."""
    return value if is_function(value) else scalar(argument, value, " or a schedule")


def scalar(argument: str, value: Any, more: str = "") -> Any:
    """The value, if it is a real number or a scalar array, of any size."""
    if isinstance(value, bool | np.bool_) or not _is_real(value):
        raise TypeError(
            f"`{argument}` must be a number, a scalar array{more}, but is "
            f"{shown(value)} of type {type(value).__name__}."
        )
    if np.shape(value) != ():
        raise ValueError(
            f"`{argument}` must be one scalar, but has shape {np.shape(value)}."
        )
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        raise ValueError(
            f"`{argument}` is an int of more than 32 bits, {shown(value)}. Write a "
            f"float."
        )
    return value


def floating_dtype(argument: str, value: Any) -> Any:
    """The dtype, if it is a floating or complex one, or None."""
    is_floating = value is None
    if not is_floating and not isinstance(value, np.ndarray | np.generic | jax.Array):
        with contextlib.suppress(Exception):  # of what is no dtype at all
            is_floating = jnp.issubdtype(jnp.dtype(value), jnp.inexact)
    if not is_floating:
        raise TypeError(
            f"`{argument}` must be a floating dtype or None, but is {shown(value)}."
        )
    return value


def factors_in(argument: str, value: Any) -> Any:
    """The value, if it is a schedule, one finite number or a vector of them."""
    if is_function(value):
        return value
    is_key = isinstance(value, jax.Array) and not _is_real(value)
    if is_key or isinstance(value, bool | np.bool_ | str):
        raise TypeError(
            f"`{argument}` must be a number, an array (L,) with one number per layer, "
            f"or a schedule of either, but is {shown(value)}."
        )
    if np.ndim(value) > 1:
        raise ValueError(
            f"`{argument}` must be one number or an array (L,), but has shape "
            f"{np.shape(value)}. For a whole matrix write `dense(matrix)`."
        )
    if isinstance(value, jax.Array):
        return value  # maybe traced: never looked at
    factors = real_matrix(value, f"`{argument}`")
    return factors if factors.ndim else float(factors)


def check_one_number(argument: str, value: Any) -> None:
    """Raises for an array: numbers per layer are `LayerValues`."""
    if not hasattr(value, "dtype") and not isinstance(value, int | float):
        raise TypeError(
            f"`{argument}` must be a number, a scalar array or LayerValues, but is "
            f"{shown(value)} of type {type(value).__name__}."
        )
    if np.shape(value) != ():
        raise ValueError(
            f"`{argument}` must be one number for all layers, but has shape "
            f"{np.shape(value)}. For a number of its own for each layer of a run write "
            f"`layers.scaled(lambda num_layers: ...)`, or use LayerValues."
        )


def number_in(argument: str, value: Any, high: Any = math.inf) -> Any:
    """The value, if it is an array or a number from 0 to `high`, and no schedule."""
    if isinstance(high, jax.Array):
        high = math.inf  # maybe traced: never looked at
    if callable(value):
        raise TypeError(
            f"`{argument}` must be a number, but is the schedule {value!r}. For a "
            f"schedule of α write `with_depth_smoothing(inner, "
            f"smooth_over_depth(depth, schedule))`."
        )
    value = strength_in(argument, value, high)
    return value if isinstance(value, jax.Array) else float(value)


def number_below_one(argument: str, value: Any) -> Any:
    """The value, if it is an array or a number in [0, 1)."""
    value = number_in(argument, value, high=1.0)
    if not isinstance(value, jax.Array) and value == 1:
        raise ValueError(f"`{argument}` must be below 1, or nothing is ever learned.")
    return value


def real_matrix(value: Any, source: str) -> Matrix:
    """A read-only float64 copy, or the array itself where it is traced."""
    if jnp.issubdtype(getattr(value, "dtype", np.float64), jnp.complexfloating):
        raise TypeError(f"{source} must hold real numbers, but is complex.")
    if is_traced(value):
        return value
    try:
        matrix = np.array(value, dtype=np.float64)
    except (OverflowError, TypeError, ValueError) as error:
        raise TypeError(
            f"{source} must be an (L, L) array of real numbers: {error}."
        ) from None
    if not np.isfinite(matrix).all():
        raise ValueError(f"{source} holds NaN or infinite weights:\n{matrix}")
    matrix.flags.writeable = False
    return matrix


def _number(value: Any) -> float:
    """As a float; an int that is too large for one is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _is_real(value: Any) -> bool:
    if isinstance(value, int | float):
        return True
    if not isinstance(value, np.generic | np.ndarray | jax.Array):
        return False
    kinds = (jnp.floating, jnp.integer)
    return any(jnp.issubdtype(value.dtype, kind) for kind in kinds)


# -- Transformations -------------------------------------------------------------------


def transformation(
    argument: str, value: Any, call: str
) -> optax.GradientTransformationExtraArgs:
    """The transformation with support for extra arguments, or an error.

    Args:
      call: how to write it right.
    """
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"`{argument}` must be an optax.GradientTransformation, but is "
            f"{shown(value)} of type {type(value).__name__}. Write `{call}`."
        )
    return optax.with_extra_args_support(value)
