"""Sums over stacks, roles or layers, and values of these spread back over layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradsmooth_optax._arrays import num_bits, replicated
from gradsmooth_optax._coupling.layer_values import (
    LayerValues,
    along_depth,
    masked,
    real_dtype,
    values_of,
)
from gradsmooth_optax._coupling.layers import Layers
from gradsmooth_optax._depth.groups import Group, text_of
from gradsmooth_optax._depth.stages import DepthGroup

Per: TypeAlias = Literal["stack", "role", "layer"]


@dataclasses.dataclass(frozen=True, eq=False)
class Units:
    """How the layers of some groups are divided into units.

    Attributes:
      groups: with neighbors.
      names: for every group, the name of its units.
      shapes: (), or (number of layers,) where every layer is a unit of its own.
    """

    groups: tuple[Group, ...]
    names: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    _layers: dict[str, list[int]]

    @classmethod
    def of(cls, groups: Sequence[Group], per: Per) -> Units:
        """The units of these groups."""
        names = tuple(_name(group, per) for group in groups)
        meant: dict[str, tuple] = {}
        for group, name in zip(groups, names, strict=True):
            key = (group.stack, group.role) if per == "role" else (group.stack,)
            if meant.setdefault(name, key) != key:
                raise ValueError(
                    f"`depth` has two units that read {name!r}: {meant[name]!r} and "
                    f"{key!r}. Give one of them another name by `stack=`."
                )
        layers: dict[str, set[int]] = {name: set() for name in names}
        for group, name in zip(groups, names, strict=True):
            for run in group.runs:
                layers[name].update(run if len(run) > 1 else ())
        ordered = {name: sorted(unit_layers) for name, unit_layers in layers.items()}
        shapes: dict[str, tuple[int, ...]] = {
            name: (len(unit_layers),) if per == "layer" else ()
            for name, unit_layers in ordered.items()
        }
        return cls(tuple(groups), names, shapes, ordered)

    def inner_products(self, x: Layers, y: Layers) -> dict[str, jax.Array]:
        """Re⟨x, y⟩ over all parameters of a unit whose layer has a neighbor."""
        return self._totals(x.inner(y, "param"), lambda g, m: g.positions(m)[1] > 1)

    def pair_totals(self, numbers: LayerValues, distance: int) -> dict[str, jax.Array]:
        """Totals over the layers of a unit that have a neighbor at this distance."""
        return self._totals(numbers, lambda g, m: g.has_neighbor(m, distance))

    def _totals(
        self, numbers: LayerValues, is_in: Callable[[DepthGroup, int], Any]
    ) -> dict[str, jax.Array]:
        # In the widest dtype; a sum of its own for each layout of slots.
        arrays = masked(numbers, is_in)._arrays
        dtype = max((x.dtype for row in arrays for x in row), key=num_bits)
        scalars: dict[str, list[jax.Array]] = {name: [] for name in self.shapes}
        vectors = {n: jnp.zeros(s, dtype) for n, s in self.shapes.items() if s}
        for group, name, group_numbers in zip(
            self.groups, self.names, arrays, strict=True
        ):
            for m, number in enumerate(group_numbers):
                slots = replicated(number).astype(dtype)
                if self.shapes[name]:
                    index = self._index(name, group, m)
                    vectors[name] = vectors[name].at[index].add(slots.reshape(-1))
                else:
                    scalars[name].append(jnp.sum(slots))
        return {
            name: vectors[name] if shape else sum(scalars[name][1:], scalars[name][0])
            for name, shape in self.shapes.items()
        }

    def spread(self, values: Mapping[str, jax.Array]) -> LayerValues:
        """The unit's value for every layer."""
        names = dict(zip(self.groups, self.names, strict=True))

        def at(group: Any, m: int) -> jax.Array:
            value = values[names[group]]
            if self.shapes[names[group]]:
                value = value[self._index(names[group], group, m)]
                shape = group.members[m].layers.shape
                value = along_depth(group, m, value.reshape(shape))
            return value.astype(real_dtype(group))

        return values_of(self.groups, at)

    def _index(self, name: str, group: Group, m: int) -> np.ndarray:
        """Positions of a member's slots among the unit's layers."""
        place = {layer: i for i, layer in enumerate(self._layers[name])}
        # A layer without neighbors has no place: what is at 0 is not used there.
        layers = group.members[m].layers.ravel().tolist()
        return np.array([place.get(layer, 0) for layer in layers], int)


def _name(group: Group, per: Per) -> str:
    stack, role = (text_of(name) for name in (group.stack, group.role))
    return f"{stack}/{role}" if per == "role" else stack
