"""Depth operators: the (L, L) matrix S that mixes the layers of a run. No trees."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradsmooth_optax._naming import reduce_by_name

Matrix: TypeAlias = np.ndarray | jax.Array


class Operator:
    """A linear operator along depth: row l of its matrix says what layer l receives.

    Made by `window`, `dense`, `compose` and their likes. Frozen, hashable, equal by
    value and not callable (`optax.inject_hyperparams` takes a callable for a schedule).

    Subclass it for an operator of your own: a frozen dataclass (`eq=False`, equality is
    by value here) with a `matrix`, and the names of fields that may be schedules in
    `strengths`. For one without fields `operator_fn` is shorter.

    Example:
      >>> import dataclasses
      >>> import gradsmooth_optax as gs
      >>> import numpy as np
      >>> @dataclasses.dataclass(frozen=True, eq=False)
      ... class TowardsMean(gs.Operator):
      ...     weight: float
      ...     strengths = ("weight",)
      ...     def matrix(self, num_layers):
      ...         mean = np.full((num_layers, num_layers), 1 / num_layers)
      ...         return (1 - self.weight) * np.eye(num_layers) + self.weight * mean
      >>> TowardsMean(0.5).matrix(2)
      array([[0.75, 0.25],
             [0.25, 0.75]])
    """

    # Names of the fields that may be schedules or traced arrays, or other operators.
    strengths: ClassVar[tuple[str, ...]] = ()

    def matrix(self, num_layers: int) -> Matrix:
        """S of shape (L, L) for a run of L = `num_layers`; [[1.]] for one layer.

        NumPy float64 where every strength is a Python or NumPy number, else a jax
        array. Schedules must be resolved first, by `at(count)`.
        """
        raise NotImplementedError

    def side_weights(self) -> tuple[Any, ...] | None:
        """Weights w_1, w_2, … of S u = u + Σ_j w_j (u_{l-j} - u_l + u_{l+j} - u_l).

        None for an operator that has no such form.
        """
        return None

    def offsets(self, num_layers: int) -> range:
        """The offsets d at which S[l, l+d] may be other than 0."""
        return range(1 - num_layers, num_layers)

    @property
    def is_linear(self) -> bool:
        """Whether it has a matrix; else it depends on the updates."""
        return True

    @property
    def is_identity(self) -> bool:
        """Whether it is known, without looking at an array, to change nothing."""
        return False

    @property
    def scheduled(self) -> bool:
        """Whether a strength is a schedule, so that a step count must be kept."""
        return any(_is_scheduled(getattr(self, name)) for name in self.strengths)

    def at(self, count: Any) -> Operator:
        """The operator with every schedule resolved at step `count`."""
        if not self.scheduled:
            return self
        strengths = {name: getattr(self, name) for name in self.strengths}
        resolved = {
            name: value.at(count) if isinstance(value, Operator) else value(count)
            for name, value in strengths.items()
            if _is_scheduled(value)
        }
        return dataclasses.replace(self, **resolved)  # pyright: ignore[reportArgumentType] # subclasses are dataclasses

    def _key(self) -> tuple[Hashable, ...]:
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType] # as above
        return type(self), *(_by_value(getattr(self, f.name)) for f in fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operator) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def dense(matrix: Any) -> Operator:
    """A given S. It fits runs of its own size only, and every run of one layer.

    Args:
      matrix: (L, L) array-like of real numbers, held as a read-only copy; or a traced
        array.

    Returns:
      An operator for `apply_over_depth`.

    Raises:
      ValueError: at construction, for a matrix that is not square or not finite; at
        trace of `update`, for a run of another size.

    Example:
      >>> import gradsmooth_optax as gs
      >>> gs.dense([[0.5, 0.5], [0.5, 0.5]]).matrix(2)
      array([[0.5, 0.5],
             [0.5, 0.5]])
    """
    return Dense(matrix)


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Operator):
    values: Matrix

    def __post_init__(self):
        values = real_matrix(self.values, "`matrix` of `dense`")
        if values.ndim != 2 or values.shape[0] != values.shape[1]:
            raise ValueError(
                f"`matrix` of `dense` must be square, one row and one column per "
                f"layer, but has shape {values.shape}."
            )
        object.__setattr__(self, "values", values)

    def __reduce__(self):
        return Dense, (self.values,)  # through __post_init__: read-only again

    def matrix(self, num_layers: int) -> Matrix:
        if num_layers == 1:
            return np.ones((1, 1))
        size = self.values.shape[0]
        if num_layers != size:
            raise ValueError(
                f"`dense` holds a matrix for {size} layers, but is applied to a run of "
                f"{num_layers}. Pass a function of the number of layers instead: "
                f"`operator_fn(lambda num_layers: ...)`, or restrict `depth` to the "
                f"stack of {size} layers with `.only(...)`."
            )
        return self.values


def operator_fn(function: Callable[[int], Any]) -> Operator:
    """A user's own S, as a function of the number of layers.

    Args:
      function: num_layers -> (L, L) array-like of real numbers. Called at trace time,
        for runs of at least two layers.

    Returns:
      An operator for `apply_over_depth`, which takes the bare function as well; wrap
      it inside `optax.inject_hyperparams`.

    Raises:
      TypeError: at construction, for something that is not a function.
      ValueError: at trace of `update`, for a result of the wrong shape.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import numpy as np
      >>> mean = gs.operator_fn(lambda n: np.full((n, n), 1 / n))
      >>> mean.matrix(2)
      array([[0.5, 0.5],
             [0.5, 0.5]])
    """
    if isinstance(function, Operator) or not callable(function):
        raise TypeError(
            f"`operator_fn` wraps a function num_layers -> (L, L) matrix, but got "
            f"{function!r} of type {type(function).__name__}. An operator can be "
            f"passed as it is, a matrix as `dense(matrix)`."
        )
    return OperatorFn(function)


@dataclasses.dataclass(frozen=True, eq=False)
class OperatorFn(Operator):
    function: Callable[[int], Any]

    def __reduce__(self):
        return reduce_by_name(self, self.function)

    def matrix(self, num_layers: int) -> Matrix:
        if num_layers == 1:
            return np.ones((1, 1))
        source = f"the function {getattr(self.function, '__qualname__', self.function)}"
        matrix = real_matrix(self.function(num_layers), source)
        if matrix.shape != (num_layers, num_layers):
            raise ValueError(
                f"{source} given to `operator_fn` returned shape {matrix.shape} for "
                f"num_layers={num_layers}, where ({num_layers}, {num_layers}) is "
                f"needed: row l holds the weights with which layer l receives."
            )
        return matrix


def _is_scheduled(value: Any) -> bool:
    return value.scheduled if isinstance(value, Operator) else callable(value)


def as_operator(value: Any) -> Operator:
    """The operator that `value`, an operator or a bare function, stands for."""
    if isinstance(value, Operator):
        return value
    if callable(value) and not isinstance(value, type):
        return OperatorFn(value)
    hint = "`window(0.1)`"
    if isinstance(value, int | float):
        hint = f"`window({value})`, or `smooth_over_depth(depth, alpha={value})`"
    elif hasattr(value, "shape"):
        hint = (
            "`dense(matrix)` for a matrix, `window(0.1)` for the paper's window; "
            "inside `optax.inject_hyperparams` wrap a function in `operator_fn`"
        )
    raise TypeError(
        f"`operator` must be a depth operator or a function num_layers -> (L, L) "
        f"matrix, but is {value!r} of type {type(value).__name__}. Write {hint}."
    )


# -- Small checks ----------------------------------------------------------------------


def strength_in(name: str, value: Any, high: float = math.inf) -> Any:
    """The value, if it is a schedule, a scalar array or a number in range."""
    allowed = ">= 0 and finite" if high == math.inf else f"between 0 and {high:g}"
    if callable(value):
        return value
    if isinstance(value, bool | np.bool_) or not _is_real(value):
        raise TypeError(
            f"`{name}` must be a number {allowed}, a scalar array or an optax "
            f"schedule, but is {value!r} of type {type(value).__name__}."
        )
    if np.shape(value) != ():
        raise ValueError(
            f"`{name}` must be one scalar, but has shape {np.shape(value)}. For a "
            f"strength per layer pass the whole matrix: `dense(matrix)`."
        )
    if isinstance(value, jax.Array):
        return value  # maybe traced: never looked at
    if not (0 <= float(value) <= high and math.isfinite(value)):
        hint = ""
        if high == 1 and 1 < value <= 100:
            hint = f" It is a fraction: write {value / 100:g} for {value} %."
        raise ValueError(f"`{name}` must be {allowed}, but is {value}.{hint}")
    # A NumPy array could be written to later.
    return float(value) if isinstance(value, np.ndarray) else value


def _is_real(value: Any) -> bool:
    if isinstance(value, int | float):
        return True
    if not isinstance(value, np.generic | np.ndarray | jax.Array):
        return False
    kinds = (jnp.floating, jnp.integer)
    return any(jnp.issubdtype(value.dtype, kind) for kind in kinds)


def check_choice(argument: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises for a value that is not one of the `allowed` words."""
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"`{argument}` must be one of {choices}, but is {value!r}.")


def check_flag(argument: str, value: Any) -> None:
    """Raises for a value that is no bool."""
    if not isinstance(value, bool):
        raise TypeError(
            f"`{argument}` must be True or False, but is {value!r} of type "
            f"{type(value).__name__}."
        )


def positive_int(name: str, value: Any, hint: str = "") -> int:
    """The value, if it is a Python int of at least 1."""
    if isinstance(value, np.ndarray | jax.Array):
        raise TypeError(
            f"`{name}` must be a Python int, since it decides what is compiled, but is "
            f"an array: {value!r}. Inside `optax.inject_hyperparams` write "
            f'`inject_hyperparams(..., static_args=("{name}",))`.'
        )
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"`{name}` must be an int >= 1, but is {value!r} of type "
            f"{type(value).__name__}."
        )
    if operator.index(value) < 1:
        raise ValueError(f"`{name}` must be an int >= 1, but is {value}.{hint}")
    return operator.index(value)


def real_matrix(value: Any, source: str) -> Matrix:
    """A read-only float64 copy, or the array itself where it is traced."""
    if jnp.issubdtype(getattr(value, "dtype", np.float64), jnp.complexfloating):
        raise TypeError(f"{source} must hold real numbers, but is complex.")
    if isinstance(value, Tracer):
        return value
    try:
        matrix = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{source} must be an (L, L) array of real numbers: {error}."
        ) from None
    if not np.isfinite(matrix).all():
        raise ValueError(f"{source} holds NaN or infinite weights:\n{matrix}")
    matrix.flags.writeable = False
    return matrix


def resolved(value: Any) -> Any:
    """A float where the value is concrete, else an array of the widest float."""
    if callable(value):
        raise TypeError(
            "a strength of this operator is a schedule, which has no value before it "
            "is resolved at a step: write `operator.at(count).matrix(num_layers)`."
        )
    if isinstance(value, jax.Array):
        # Rounded once, to the dtype of each leaf, which may be float64.
        return value.astype(jnp.result_type(float))
    return float(value)


def _by_value(value: Any) -> Hashable:
    if isinstance(value, Tracer):
        return id(value)
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        return array.shape, array.dtype.str, array.tobytes()
    return value
