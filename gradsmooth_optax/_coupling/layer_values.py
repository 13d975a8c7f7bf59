"""`LayerValues`: a number for every layer, such as its norm."""

from __future__ import annotations

import dataclasses
import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradsmooth_optax._arrays import in_dtype, num_bits, replicated
from gradsmooth_optax._checks import check_one_number
from gradsmooth_optax._coupling.halos import with_halos
from gradsmooth_optax._coupling.neighbors import at_offset
from gradsmooth_optax._depth.stages import DepthGroup

Arrays: TypeAlias = Sequence[Sequence[Any]]  # one per member, per group
IsIn: TypeAlias = Callable[[DepthGroup, int], Any]  # a mask over the slots of a member
Names: TypeAlias = tuple[Hashable | None, ...]  # one per slot of a member, in order


def _elementwise(operation: Callable[[Any, Any], Any]) -> Any:
    """A method that takes other values of the same layers, or one number for all."""

    def method(self: LayerValues, other: Any) -> LayerValues:
        if isinstance(other, LayerValues):
            return self.map(operation, other)
        check_one_number("a number", other)
        return self.map(lambda x: operation(x, in_dtype(other, x.dtype)))

    return method


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class LayerValues:
    """One number for every layer of every role, as `Layers.norms` gives it.

    With scope "param" each role has its own; with scope "block" all roles of a stack
    have the same. Numbers are of the dtype of the arithmetic: float32, float64 for
    float64 updates. `+`, `-`, `*`, `/`, `**` and `<`, `<=`, `>`, `>=` take numbers,
    scalar arrays and other values of the same layers; a comparison is 1 where it holds,
    else 0. A pytree.

    Example:
      >>> import dataclasses
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> @dataclasses.dataclass(frozen=True, eq=False)
      ... class AtMost(gs.Operator):  # clips the norm of every layer
      ...     norm: float
      ...     def couple(self, layers):
      ...         clip = lambda norm: jnp.minimum(1.0, self.norm / norm)
      ...         return layers.scaled(layers.norms().map(clip))
      >>> tx = gs.smooth_over_depth(gs.scanned("blocks/"), AtMost(1.0))
      >>> updates = {"blocks": {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}}
      >>> tx.update(updates, tx.init(updates))[0]["blocks"]["w"].round(3).tolist()
      [[0.6000000238418579, 0.800000011920929], [0.0, 1.0]]
    """

    _groups: tuple[DepthGroup, ...]
    _arrays: Arrays  # of size 1 on all axes but those over depth; () of lone layers

    def map(self, function: Callable[..., Any], *others: LayerValues) -> LayerValues:
        """`function` of these numbers and of the `others`, layer by layer.

        Args:
          function: of arrays of equal shape, elementwise, to an array of that shape.
          *others: further values of the same layers, for its further arguments.
        """
        # Once where the arrays are the same ones: all roles of a block share theirs.
        found: dict[tuple[int, ...], Any] = {}

        def once(*member_arrays: Any) -> Any:
            key = tuple(map(id, member_arrays))
            if key not in found:
                found[key] = function(*member_arrays)
            return found[key]

        arrays = [values._arrays for values in (self, *others)]
        return LayerValues(
            self._groups,
            tuple(
                tuple(
                    once(*member_arrays)
                    for member_arrays in zip(*group_arrays, strict=True)
                )
                for group_arrays in zip(*arrays, strict=True)
            ),
        )

    def shifted(self, offset: int) -> LayerValues:
        """The number of the layer at `offset`; 0 where the run has no such layer.

        Args:
          offset: how many layers on, negative for layers before.
        """
        beside = {
            group: with_halos(group, abs(offset), list(map(jnp.asarray, group_arrays)))
            for group, group_arrays in zip(self._groups, self._arrays, strict=True)
        }

        def there(group: DepthGroup, m: int) -> jax.Array:
            source, (held,) = beside[group]
            return at_offset(source, m, offset, held)

        return values_of(self._groups, there)

    __add__ = __radd__ = _elementwise(operator.add)
    __mul__ = __rmul__ = _elementwise(operator.mul)
    __sub__ = _elementwise(operator.sub)
    __rsub__ = _elementwise(lambda x, y: y - x)
    __truediv__ = _elementwise(operator.truediv)
    __rtruediv__ = _elementwise(lambda x, y: y / x)
    __pow__ = _elementwise(operator.pow)
    __lt__ = _elementwise(lambda x, y: (x < y).astype(x.dtype))
    __le__ = _elementwise(lambda x, y: (x <= y).astype(x.dtype))
    __gt__ = _elementwise(lambda x, y: (x > y).astype(x.dtype))
    __ge__ = _elementwise(lambda x, y: (x >= y).astype(x.dtype))

    def __neg__(self) -> LayerValues:
        return self.map(operator.neg)

    # NumPy's and jax's scalars would else take the values for an object to broadcast.
    __array_priority__ = 1000
    __array_ufunc__ = None

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """For `jax.tree_util`."""
        return (self._arrays,), (self._groups,)

    @classmethod
    def tree_unflatten(cls, static: tuple, arrays: tuple) -> LayerValues:
        """For `jax.tree_util`."""
        return cls(*static, *arrays)


def real_dtype(group: DepthGroup) -> Any:
    """The dtype of norms and of other numbers of a group's layers."""
    return jnp.float64 if num_bits(group.dtype) > 32 else jnp.float32


def along_depth(group: DepthGroup, m: int, values: Any) -> Any:
    """An array over the slots of member m as `LayerValues` has it."""
    member = group.members[m]
    rank = len(group.shape) + len(member.axes)
    return member.along(values, rank if group.is_stacked else 0)


def values_of(
    groups: Sequence[DepthGroup], function: Callable[[DepthGroup, int], Any]
) -> LayerValues:
    """The arrays that `function(group, m)` gives for every member."""
    return LayerValues(
        tuple(groups),
        tuple(
            tuple(function(group, m) for m in range(len(group.members)))
            for group in groups
        ),
    )


def slot_values(
    groups: Sequence[DepthGroup], slot_numbers: Callable[[DepthGroup, int], Any]
) -> LayerValues:
    """Values that follow from where a layer is.

    Args:
      groups: that they are of.
      slot_numbers: (group, m) -> an array over the slots of member m.
    """

    def along(group: DepthGroup, m: int) -> Any:
        values = along_depth(group, m, slot_numbers(group, m))
        return values.astype(real_dtype(group))

    return values_of(groups, along)


def masked(values: LayerValues, is_in: IsIn | None, other: float = 0.0) -> LayerValues:
    """The values, with another number for the layers that are not in; None for all."""
    if is_in is None:
        return values
    arrays = dict(zip(values._groups, values._arrays, strict=True))

    def chosen(group: DepthGroup, m: int) -> Any:
        mask, array = is_in(group, m), arrays[group][m]
        if not isinstance(mask, jax.Array) and mask.all():
            return array
        fill = jnp.full_like(array, other)
        return jnp.where(along_depth(group, m, mask), array, fill)

    return values_of(values._groups, chosen)


# -- Sums over the roles of a block ----------------------------------------------------


def summed_by_name(
    values: LayerValues, names_of: Callable[[DepthGroup, int], Names]
) -> LayerValues:
    """Sums over the slots of all roles of a stack that have the same name.

    Two roles of a stack, of which the second is not in layer 2, by the number of the
    layer:

        role   names     arrays       sums
        w      (0, 1, 2) [a, b, c]    [a + d, b + e, c]
        b      (0, 1)    [d, e]       [a + d, b + e]

    Args:
      values: what is summed.
      names_of: (group, m) -> the names of the slots of a member in order, such as the
        layer; None for a slot that is in no sum.
    """
    groups, arrays = values._groups, values._arrays
    names = values_of(groups, names_of)._arrays
    widest = max((array.dtype for row in arrays for array in row), key=num_bits)
    totals: dict[tuple[Hashable, Names], jax.Array] = {}
    for group, group_arrays, named in zip(groups, arrays, names, strict=True):
        for array, member_names in zip(group_arrays, named, strict=True):
            vector = replicated(array).astype(widest)
            if vector.ndim:
                vector = vector.reshape(len(member_names))
            is_in = np.array([name is not None for name in member_names])
            if not is_in.all():
                vector = jnp.where(is_in, vector, jnp.zeros_like(vector))
            key = (group.stack, member_names)
            totals[key] = totals[key] + vector if key in totals else vector
    totals = _with_overlaps(totals)
    placed: dict[tuple, jax.Array] = {}

    def place(key: tuple[Hashable, Names], like: jax.Array) -> jax.Array:
        # Before and after the sum, and for each stacked leaf anew: or all leaves would
        # be split as one of them is.
        kind = (*key, like.shape, like.dtype) if like.size == 1 else (id(like),)
        if kind not in placed:
            spread = replicated(totals[key].reshape(like.shape))
            placed[kind] = spread.astype(like.dtype)
        return placed[kind]

    return LayerValues(
        groups,
        tuple(
            tuple(
                place((group.stack, member_names), array)
                for array, member_names in zip(group_arrays, named, strict=True)
            )
            for group, group_arrays, named in zip(groups, arrays, names, strict=True)
        ),
    )


def _with_overlaps(
    totals: dict[tuple[Hashable, Names], jax.Array],
) -> dict[tuple[Hashable, Names], jax.Array]:
    """Adds to each vector what others of the stack hold under the same names.

    Nothing to do where all roles are laid out alike, the usual case.
    """
    holders: dict[tuple[Hashable, Hashable], list] = defaultdict(list)
    for stack, names in totals:
        for i, name in enumerate(names):
            if name is not None:
                holders[stack, name].append((names, i))
    joined = {}
    for (stack, names), total in totals.items():
        shared: dict[Names, list[tuple[int, int]]] = defaultdict(list)
        for i, name in enumerate(names):
            for other, j in holders[stack, name]:
                if other != names:
                    shared[other].append((i, j))
        for other, pairs in shared.items():
            here, there = np.array(pairs).T
            added = totals[stack, other].reshape(len(other))[there]
            total = total.reshape(len(names)).at[here].add(added)
        joined[stack, names] = total
    return joined
