"""The variants of the paper: an operator applied at the norms that the layers had."""

from __future__ import annotations

from typing import Literal, TypeAlias

from gradsmooth_optax._coupling.layers import Layers
from gradsmooth_optax._coupling.norms import (
    inverse_norm,
    marked_ratio_to_directions,
    norm_ratio,
)
from gradsmooth_optax._operators.operator import Operator

Variant: TypeAlias = Literal["standard", "norm_preserving", "directional"]


def coupled(
    operator: Operator, layers: Layers, variant: Variant = "standard"
) -> Layers:
    """S u, S u at the norm of u, or S of u/‖u‖ at the norm of u.

    Args:
      operator: with its schedules resolved.
      layers: u.
      variant: "standard", "norm_preserving" or "directional".
    """
    layers = layers.reaching(operator.radius)
    if variant == "standard":
        return _couple(operator, layers)
    before = layers.squared_norms()
    if variant == "norm_preserving":
        # A zero layer may receive its neighbors' update.
        smooth = _couple(operator, layers)
        return smooth.scaled(before.map(norm_ratio, smooth.squared_norms()))
    directions = layers.scaled(before.map(inverse_norm)).reaching(operator.radius)
    smooth = _couple(operator, directions)
    ratios = before.map(marked_ratio_to_directions, smooth.squared_norms())
    return layers.where(ratios < 0, smooth.scaled(ratios))


def _couple(operator: Operator, layers: Layers) -> Layers:
    found = operator.couple(layers)
    if not isinstance(found, Layers):
        raise TypeError(
            f"`couple` of {operator!r} must return the Layers that it makes of those "
            f"that it gets, but returned {type(found).__name__}. Write "
            f"`return layers.scaled(0.5)` or the like."
        )
    return found
