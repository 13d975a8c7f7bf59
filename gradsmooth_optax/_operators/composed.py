"""Operators made of operators: one matrix, where all of these have one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradsmooth_optax._arrays import num_bits
from gradsmooth_optax._calls import shown_call
from gradsmooth_optax._checks import Matrix, positive_int
from gradsmooth_optax._operators.operator import Operator
from gradsmooth_optax._operators.smoothers import as_operator

if TYPE_CHECKING:
    from gradsmooth_optax._coupling.layers import Layers


def compose(*operators: Any) -> Operator:
    """One operator after another: the first argument is applied first.

    Where all have a matrix, these are multiplied, S = S_last ⋯ S_first, and the product
    is applied once. Else one is applied to what the one before it returned.

    Args:
      *operators: operators, or strengths of the paper's window.

    Returns:
      An operator for `smooth_over_depth`.

    Raises:
      TypeError: at construction, without an operator, or for something else.

    Example:
      >>> import gradsmooth_optax as gs
      >>> gs.compose(gs.ema(0.5), gs.ema(0.5, reverse=True)).matrix(2)
      array([[0.75, 0.25],
             [0.5 , 0.5 ]])
    """
    if not operators:
        raise TypeError(
            "`compose` needs at least one operator: `compose(ema(0.5), window(0.1))`."
        )
    return Composed(tuple(map(as_operator, operators)))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Composed(Operator):
    made_by: ClassVar[str] = "compose"
    strengths: ClassVar[tuple[str, ...]] = ("operators",)

    operators: tuple[Operator, ...]

    def couple(self, layers: Layers) -> Layers:
        if self.has_matrix:
            return super().couple(layers)
        for operator in self.operators:
            layers = operator.couple(layers.reaching(operator.radius))
        return layers

    def __repr__(self) -> str:
        return shown_call(self.made_by, self.operators)

    def matrix(self, num_layers: int) -> Matrix:
        check_have_matrices(self, self.operators)
        matrices = [operator.matrix(num_layers) for operator in self.operators]
        return functools.reduce(lambda product, after: matmul(after, product), matrices)

    @property
    def has_matrix(self) -> bool:
        return all(operator.has_matrix for operator in self.operators)

    def radius(self, num_layers: int) -> int:
        radius = sum(operator.radius(num_layers) for operator in self.operators)
        return min(radius, num_layers - 1)

    def offsets(self, num_layers: int) -> range:
        bands = [operator.offsets(num_layers) for operator in self.operators]
        return clipped_band(
            sum(band[0] for band in bands), sum(band[-1] for band in bands), num_layers
        )

    @property
    def is_identity(self) -> bool:
        return all(operator.is_identity for operator in self.operators)

    @property
    def scales_single_layers(self) -> bool:
        return any(operator.scales_single_layers for operator in self.operators)


def repeat(operator: Any, times: int) -> Operator:
    """The same operator several times: S to the power of `times`, applied once.

    One that depends on the updates and so has no matrix is applied again and again.

    Args:
      operator: an operator, or a strength of the paper's window.
      times: how often, an int ≥ 1.

    Returns:
      An operator for `smooth_over_depth`.

    Raises:
      TypeError: at construction, for an argument of the wrong kind.
      ValueError: at construction, for `times` < 1.

    Example:
      >>> import gradsmooth_optax as gs
      >>> gs.repeat(gs.window(0.5), 2).matrix(2)
      array([[0.625, 0.375],
             [0.375, 0.625]])
    """
    return Repeated(as_operator(operator), positive_int("times", times))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Repeated(Operator):
    made_by: ClassVar[str] = "repeat"
    strengths: ClassVar[tuple[str, ...]] = ("operator",)

    operator: Operator
    times: int

    def couple(self, layers: Layers) -> Layers:
        if self.has_matrix:
            return super().couple(layers)
        for _ in range(self.times):
            layers = self.operator.couple(layers.reaching(self.operator.radius))
        return layers

    @property
    def has_matrix(self) -> bool:
        return self.operator.has_matrix

    def radius(self, num_layers: int) -> int:
        return min(self.times * self.operator.radius(num_layers), num_layers - 1)

    def matrix(self, num_layers: int) -> Matrix:
        check_have_matrices(self, (self.operator,))
        square, power, left = self.operator.matrix(num_layers), None, self.times
        while left:
            if left % 2:
                power = square if power is None else matmul(square, power)
            left //= 2
            square = matmul(square, square) if left else square
        assert power is not None
        return power

    def offsets(self, num_layers: int) -> range:
        band = self.operator.offsets(num_layers)
        return clipped_band(self.times * band[0], self.times * band[-1], num_layers)

    @property
    def is_identity(self) -> bool:
        return self.operator.is_identity

    @property
    def scales_single_layers(self) -> bool:
        return self.operator.scales_single_layers


def with_matrix(value: Any, caller: str) -> Operator:
    """The operator, or an error if it has no matrix."""
    operator = as_operator(value)
    if not operator.has_matrix:
        raise TypeError(
            f"`{caller}` needs an operator with a matrix, but what a layer receives "
            f"from {operator!r} depends on the updates. `compose`, `repeat` and "
            f"`smooth_over_depth` take it."
        )
    return operator


def check_have_matrices(whole: Operator, parts: Sequence[Operator]) -> None:
    """Raises if a part of a composed operator has no matrix."""
    for part in parts:
        if not part.has_matrix:
            raise TypeError(
                f"{whole!r} has no matrix, since what a layer receives from {part!r} "
                f"depends on the updates. Apply it to updates, by "
                f"`smooth_over_depth(depth, operator)`."
            )


def matmul(a: Matrix, b: Matrix) -> Matrix:
    """a @ b, in float64 where both are NumPy arrays."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a @ b
    # In float32 at least, also where a user's traced matrix is of bfloat16 or ints.
    dtypes = [m.dtype for m in (a, b) if isinstance(m, jax.Array)]
    wide = [d for d in dtypes if jnp.issubdtype(d, jnp.floating) and num_bits(d) > 32]
    dtype = wide[0] if wide else jnp.float32
    a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def clipped_band(low: int, high: int, num_layers: int) -> range:
    """The offsets low..high that a run of this many layers has."""
    return range(max(low, 1 - num_layers), min(high, num_layers - 1) + 1)
