"""`Operator`: what is applied along depth, and the two that a user fills."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gradsmooth_optax._calls import reduce_by_name, shown_call, shown_value
from gradsmooth_optax._checks import Matrix, is_traced, real_matrix

if TYPE_CHECKING:
    from gradsmooth_optax._coupling.layers import Layers


class Operator:
    """What is applied along depth: it says what every layer receives.

    Made by `window`, `dense`, `compose` and their likes. Frozen, hashable, equal by
    value and not callable (`optax.inject_hyperparams` takes a callable for a schedule).

    Subclass it for an operator of your own: a frozen dataclass (`eq=False`, equality is
    by value here) with the names of fields that may be schedules in `strengths`, and
    with a `matrix`, or, where the weights depend on the updates, with a `couple`. For a
    matrix without fields `operator_fn` is shorter.

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

    # The function that makes it, in `gs`; "" for a user's own.
    made_by: ClassVar[str] = ""

    def couple(self, layers: Layers) -> Layers:
        """S u of all layers: by `matrix`, unless a subclass says otherwise.

        Schedules are resolved. `layers` is the only thing that it may look at.
        """
        return layers.matmul(self.matrix, self.offsets)

    def matrix(self, num_layers: int) -> Matrix:
        """S of shape (L, L) for a run of L = `num_layers`; [[1.]] for one layer.

        Row l holds the weights with which layer l receives. NumPy float64 where every
        strength is a Python or NumPy number, else a jax array. Schedules must be
        resolved first, by `at(count)`.
        """
        raise TypeError(
            f"{self!r} has no matrix: what a layer receives depends on the updates. "
            f"Apply it to updates, by `smooth_over_depth(depth, operator)`."
        )

    def radius(self, num_layers: int) -> int:
        """How many layers to each side it looks at, in a run of `num_layers`.

        All of them, unless a subclass says otherwise: needed where layers couple across
        the stages of a mesh axis.
        """
        return num_layers - 1

    def offsets(self, num_layers: int) -> range:
        """The offsets d at which S[l, l+d] may be other than 0: up to the radius."""
        radius = min(self.radius(num_layers), num_layers - 1)
        return range(-radius, radius + 1)

    @property
    def has_matrix(self) -> bool:
        """Whether it has a matrix; else it depends on the updates."""
        return type(self).matrix is not Operator.matrix

    @property
    def scales_single_layers(self) -> bool:
        """Whether it also changes a layer that is alone: `matrix(1)` is not [[1.]]."""
        return False

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
            name: _resolved_at(name, value, count)
            for name, value in strengths.items()
            if _is_scheduled(value)
        }
        return dataclasses.replace(self, **resolved)  # pyright: ignore[reportArgumentType] # subclasses are dataclasses

    def __repr__(self) -> str:
        args, options = [], {}
        for i, field in enumerate(dataclasses.fields(self)):  # pyright: ignore[reportArgumentType] # as above
            value = getattr(self, field.name)
            if _by_value(value) == _by_value(field.default):
                continue
            if i == 0:
                args.append(value)
            else:
                options[field.metadata.get("argument", field.name)] = value
        if self.made_by:
            return shown_call(self.made_by, args, options)
        own = type(self).__qualname__
        return shown_call(own, args, options).removeprefix("gs.")

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
      An operator for `smooth_over_depth`.

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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dense(Operator):
    made_by: ClassVar[str] = "dense"

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
      An operator for `smooth_over_depth`.

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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class OperatorFn(Operator):
    made_by: ClassVar[str] = "operator_fn"

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
    if isinstance(value, tuple):
        return any(map(_is_scheduled, value))
    return value.scheduled if isinstance(value, Operator) else callable(value)


def _resolved_at(name: str, value: Any, count: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_resolved_at(name, one, count) for one in value)
    if isinstance(value, Operator):
        return value.at(count)
    if not callable(value):
        return value
    hint = (
        f"Raised by {shown_value(value)}, the schedule of `{name}`, for a step count. "
        f"A function in the place of a strength is always a schedule; wrap one of the "
        f"number of layers: `operator_fn(function)`."
    )
    try:
        strength: Any = value(count)
    except Exception as error:
        error.add_note(hint)
        raise
    if np.ndim(strength) > 1:
        raise TypeError(f"A matrix, where a number is needed. {hint}")
    if isinstance(strength, Operator) or callable(strength):
        raise TypeError(
            f"{shown_value(value)}, the schedule of `{name}`, returned {strength!r}, "
            f"where a number is needed. Call the function that makes an operator, as "
            f"in `window(0.1)`, and pass what it returns."
        )
    return strength


def resolved(value: Any) -> Any:
    """A float where the value is concrete, else an array of the widest float."""
    if callable(value):
        raise TypeError(
            "a strength of this operator is a schedule, which has no value before it "
            "is resolved at a step: write `operator.at(count).matrix(num_layers)`. A "
            "function of the number of layers is no schedule: wrap it in `operator_fn`."
        )
    if isinstance(value, jax.Array):
        # Rounded once, to the dtype of each leaf, which may be float64.
        return value.astype(jnp.result_type(float))
    return float(value)


def resolved_factors(value: Any) -> Any:
    """One number, or one for each layer of a run."""
    if isinstance(value, np.ndarray):
        return value
    return resolved(value)


def _by_value(value: Any) -> Hashable:
    """What a field is equal by: numbers and arrays of the same values are equal."""
    if is_traced(value):
        return id(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        return array.item() if array.ndim == 0 else (array.shape, array.tobytes())
    return value
