"""`Layers`: the updates of every group in depth order, as an operator sees them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradsmooth_optax._arrays import in_dtype, summed_over, widened
from gradsmooth_optax._checks import (
    NormScope,
    check_choice,
    check_one_number,
    is_function,
)
from gradsmooth_optax._coupling import norms
from gradsmooth_optax._coupling.halos import width_of, with_halos
from gradsmooth_optax._coupling.layer_values import (
    IsIn,
    LayerValues,
    Names,
    along_depth,
    masked,
    slot_values,
    summed_by_name,
    values_of,
)
from gradsmooth_optax._coupling.matmul import (
    MatrixOf,
    OffsetsOf,
    coupled_by_matrix,
    weights_per_layer,
    widest_shifted_band,
)
from gradsmooth_optax._coupling.neighbors import neighbor
from gradsmooth_optax._depth.groups import Group
from gradsmooth_optax._depth.stages import DepthGroup, Stage


class _Zero(NamedTuple):
    """Known to be 0, and of the shape, dtype and sharding of an array."""

    like: jax.Array


class _Halo(NamedTuple):
    """A group with the layers of the stages beside, and its arrays and their scales."""

    radius: int
    group: Group
    arrays: Sequence[jax.Array]
    scales: Sequence[jax.Array] | None


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
    """The updates of all coupled layers, which know their neighbors in depth.

    An operator's `couple` gets one and returns one. Each layer is that of one role of
    one stack, as `depth` groups them, in whatever leaf and axis it lies; runs end where
    a layer is missing. Values are those of the dtype of the arithmetic: float32,
    float64 for float64 updates. `a + b` and `a - b` add layer by layer, `-a` negates.
    Inside `jax.shard_map` the same calls exchange layers with the stages beside, and
    sum over mesh axes. `norm_scope` is that of the transformation. A pytree.

    Example:
      >>> import dataclasses
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> @dataclasses.dataclass(frozen=True, eq=False)
      ... class Downwards(gs.Operator):  # a half of what the layer above received
      ...     def couple(self, layers):
      ...         return layers + layers.shifted(1, missing="zero").scaled(0.5)
      >>> tx = gs.smooth_over_depth(gs.scanned("blocks/"), Downwards())
      >>> updates = {"blocks": {"w": jnp.array([[1.0], [2.0], [4.0]])}}
      >>> tx.update(updates, tx.init(updates))[0]["blocks"]["w"].ravel().tolist()
      [2.0, 4.0, 4.0]
    """

    _groups: tuple[DepthGroup, ...]
    _arrays: tuple[tuple[jax.Array | _Zero, ...], ...]  # per group, per member
    _scales: tuple[tuple[jax.Array, ...] | None, ...]  # of arrays, not yet applied
    norm_scope: NormScope = "param"
    _norm_axes: tuple[Hashable, ...] = ()
    _fewest: int = 2  # layers of a run that is coupled
    _halos: tuple[_Halo | None, ...] | None = None
    _of: Layers | None = None  # whose layers at `_offset` these are
    _offset: int = 0

    # -- Where a layer is --------------------------------------------------------------

    def exists(self, offset: int) -> LayerValues:
        """1 where the run of a layer has one at `offset`, else 0."""
        return slot_values(self._groups, lambda g, m: g.has_neighbor(m, offset))

    def positions(self) -> tuple[LayerValues, LayerValues]:
        """(l, n): where in its run a layer is, from 0, and how many layers that has."""
        position = slot_values(self._groups, lambda g, m: g.positions(m)[0])
        return position, slot_values(self._groups, lambda g, m: g.positions(m)[1])

    @property
    def longest_run(self) -> int:
        """How many layers the longest run has, over all stages."""
        return max(int(g.whole.run_lengths.max()) for g in self._groups)

    def prefers_shifts(self, radius: int) -> bool:
        """Whether shifted copies this far are cheaper than a product with a matrix."""
        return all(
            min(radius, int(group.whole.run_lengths.max()) - 1)
            <= widest_shifted_band(group)
            for group in self._groups
        )

    # -- Other layers ------------------------------------------------------------------

    def shifted(self, offset: int, missing: Literal["self", "zero"] = "self") -> Layers:
        """u_{l+offset} in the place of u_l.

        Args:
          offset: how many layers on, negative for layers before.
          missing: what stands where the run has no such layer: u_l "self", so that the
            share of a neighbor that does not exist stays home, or "zero".
        """
        check_choice("missing", missing, ("self", "zero"))
        if offset == 0:
            return self
        arrays = []
        for g, group in enumerate(self._groups):
            source, xs, scales = self._around(g, abs(offset))
            own = self._arrays[g]
            arrays.append([])
            for m in range(len(own)):
                other: Any = neighbor(source, m, offset, xs, scales)
                if other is None:
                    raw = own[m] if self._scales[g] is None else self._value(g, m)
                    other = raw if missing == "self" else _zero_like(raw)
                elif missing == "self":
                    has = group.has_neighbor(m, offset)
                    if isinstance(has, jax.Array) or not has.all():
                        mask = group.members[m].along(has, other.ndim)
                        other = jnp.where(mask, other, self._value(g, m))
                arrays[-1].append(other)
        if self._of is not None:
            return self._with(arrays)
        return dataclasses.replace(self._with(arrays), _of=self, _offset=offset)

    def difference(self, offset: int, weights: Any = 1.0) -> Layers:
        """weights · u_{l+offset} - weights · u_l, and 0 where the run has none such.

        Scaled before it is subtracted: added to u_l it overflows only where the sum
        does, for weights between 0 and 1. It is 0 where the two are equal.

        Args:
          offset: how many layers on, negative for layers before.
          weights: a number, a scalar array, or the `LayerValues` of the layers l.
        """
        if not isinstance(weights, LayerValues):
            check_one_number("weights", weights)
        there = self.shifted(offset, "self")

        def one(g: int, m: int) -> Any:
            if there._arrays[g][m] is self._arrays[g][m]:
                return _zero_like(self._arrays[g][m])  # no layer of it has one
            own = self._value(g, m)
            found = weights
            if isinstance(weights, LayerValues):
                found = weights._arrays[g][m]
            weight: Any = in_dtype(found, own.dtype)
            return weight * there._value(g, m) - weight * own

        return self._each(one)

    def reaching(self, radius_of: Callable[[int], int]) -> Layers:
        """The same, with all layers that an operator of this radius looks at.

        Across stages they come in one message, and without it in one for each
        `shifted`.

        Args:
          radius_of: num_layers of a run -> how many layers to each side.
        """
        if not any(isinstance(group, Stage) for group in self._groups):
            return self
        halos: list[_Halo | None] = []
        for g, group in enumerate(self._groups):
            radius = radius_of(int(group.whole.run_lengths.max()))
            fits = isinstance(group, Stage) and 0 < radius <= width_of(group)
            halos.append(_Halo(radius, *self._around(g, radius)) if fits else None)
        return dataclasses.replace(self, _halos=tuple(halos))

    def matmul(
        self, matrix_of: MatrixOf, offsets_of: OffsetsOf | None = None
    ) -> Layers:
        """S u of every run, with the matrix S for its number of layers.

        Shifted copies where S is a narrow band, else one product.

        Args:
          matrix_of: num_layers -> (L, L), a NumPy array where its values are known.
          offsets_of: num_layers -> the offsets d at which S[l, l+d] may be other than
            0, for matrices whose values are not known; None for all.
        """
        matrices: dict[int, Any] = {}

        def once(num_layers: int) -> Any:
            if num_layers not in matrices:
                matrices[num_layers] = matrix_of(num_layers)
            return matrices[num_layers]

        return self._with(
            [
                coupled_by_matrix(
                    group,
                    self._own(g),
                    self._scales[g],
                    once,
                    offsets_of or (lambda n: range(1 - n, n)),
                    self._fewest,
                )
                for g, group in enumerate(self._groups)
            ]
        )

    # -- Arithmetic --------------------------------------------------------------------

    def scaled(self, weights: Any) -> Layers:
        """weight · u.

        Args:
          weights: a number, a scalar array, `LayerValues`, or a function of the number
            of layers of a run to the weights (L,) of these.
        """
        if isinstance(weights, LayerValues):
            return self._scaled_by_values(weights)
        if is_function(weights):
            return self._scaled_by_values(self.values_of_runs(weights))
        check_one_number("weights", weights)
        return self._each(lambda g, m: self._times(weights, g, m))

    def _scaled_by_values(self, weights: LayerValues) -> Layers:
        # Not applied yet where neighbors are copied: what crosses devices then is u in
        # its own dtype and a number per layer.
        waits = [
            (isinstance(group, Stage) or group.is_stacked)
            and self._scales[g] is None
            and not any(isinstance(x, _Zero) for x in self._arrays[g])
            for g, group in enumerate(self._groups)
        ]

        def applied(g: int, m: int) -> Any:
            if waits[g]:
                return self._arrays[g][m]
            return self._times(weights._arrays[g][m], g, m)

        pairs = zip(waits, weights._arrays, strict=True)
        scales = [tuple(group_arrays) if wait else None for wait, group_arrays in pairs]
        return self._with(self._each(applied)._arrays, scales)

    def _times(self, weight: Any, g: int, m: int) -> Any:
        x = self._arrays[g][m]
        if isinstance(x, _Zero):
            return x
        u = self._value(g, m)
        return in_dtype(weight, u.dtype) * u

    def map(self, function: Callable[..., jax.Array], *others: Layers) -> Layers:
        """`function` of these layers and of the `others`.

        Args:
          function: of arrays of equal shape, elementwise, to an array of that shape.
          *others: further layers, for its further arguments.
        """
        every = (self, *others)
        return self._each(lambda g, m: function(*(x._value(g, m) for x in every)))

    def where(self, condition: LayerValues, other: Layers) -> Layers:
        """These layers where the condition is not 0, and those of `other` elsewhere."""

        def chosen(g: int, m: int) -> jax.Array:
            holds = condition._arrays[g][m] != 0
            return jnp.where(holds, self._value(g, m), other._value(g, m))

        return self._each(chosen)

    def __add__(self, other: Layers) -> Layers:
        return self._combined(other, operator.add)

    def __sub__(self, other: Layers) -> Layers:
        return self._combined(other, operator.sub)

    def __neg__(self) -> Layers:
        return self.map(jnp.negative)

    def _combined(self, other: Layers, operation: Callable) -> Layers:
        if not isinstance(other, Layers):
            return NotImplemented
        arrays = []
        for g, (xs, ys) in enumerate(zip(self._arrays, other._arrays, strict=True)):
            same = self._scales[g] is other._scales[g]
            arrays.append([])
            for m, (x, y) in enumerate(zip(xs, ys, strict=True)):
                if operation is operator.sub and x is y and same:
                    found = _zero_like(x)
                elif isinstance(y, _Zero):
                    found = x if self._scales[g] is None else self._value(g, m)
                elif isinstance(x, _Zero) and operation is operator.add:
                    found = other._value(g, m)
                else:
                    found = operation(self._value(g, m), other._value(g, m))
                arrays[-1].append(found)
        return self._with(arrays)

    # -- Numbers per layer -------------------------------------------------------------

    def values_of_runs(self, of_run: Callable[[int], Any]) -> LayerValues:
        """Numbers that follow from where in its run a layer is.

        Args:
          of_run: num_layers of a run -> (L,), one for each of its layers.
        """

        def along(group: DepthGroup, m: int) -> Any:
            return along_depth(group, m, weights_per_layer(group, m, of_run))

        return values_of(self._groups, along)

    def norms(self, scope: NormScope | None = None) -> LayerValues:
        """‖u_l‖ of every layer.

        Args:
          scope: of one "param", or of the "block": all roles of the stack that the
            layer has. None for the `norm_scope` of the transformation.
        """
        return self.from_squares(
            lambda squares, factors: squares[0].map(norms.root, *factors), [self], scope
        )

    def squared_norms(self, scope: NormScope | None = None) -> LayerValues:
        """‖u_l‖² of every layer, as far as the dtype can hold it: see `norms`."""
        return self.norms(scope) ** 2

    def inner(self, other: Layers, scope: NormScope | None = None) -> LayerValues:
        """Re⟨u_l, v_l⟩ of every layer.

        Where one of the two is `shifted`, over the roles in which both layers are: 0
        where there is none. It holds for updates of about 1e-16 to 1e14.

        Args:
          other: v.
          scope: as in `norms`.
        """
        return self._summed(self._products(other), other, scope)

    def cosine(self, other: Layers, scope: NormScope | None = None) -> LayerValues:
        """Cosine of u_l and v_l, with norms over the roles in which both layers are.

        0 where there is none, and where one of the norms is 0.

        Args:
          other: v, such as `layers.shifted(1)`.
          scope: as in `norms`.
        """

        def sums_of(factors: Sequence[LayerValues]) -> list[LayerValues]:
            u, v = self, other
            if factors:
                u, v = (x.scaled(f) for x, f in zip((u, v), factors, strict=True))
            own, dots = u._products(u), u._products(v)
            if not factors and other._of is self and self._of is None:
                there = own.shifted(other._offset)  # without looking at them again
            else:
                there = v._products(v)
            return [self._summed(x, other, scope) for x in (own, there, dots)]

        def finish(sums: Sequence[LayerValues], factors: Any) -> LayerValues:
            own, there, dots = sums
            return dots.map(norms.cosine, own, there)

        return self._in_range(sums_of, finish, 2, other, scope)

    def with_norms_of(
        self,
        other: Layers | Callable[[Layers], Layers],
        scope: NormScope | None = None,
    ) -> Layers:
        """u_l ‖v_l‖ / ‖u_l‖: these layers at the norms of others, 0 where one is 0.

        Args:
          other: v, or a function of these layers to v, which is then not kept.
          scope: as in `norms`.
        """
        make = (lambda _: other) if isinstance(other, Layers) else other

        def finish(squares: Sequence[LayerValues], factors: Any) -> LayerValues:
            own, wanted = squares
            return wanted.map(norms.ratio, own, *factors[::-1])

        every = [self, make(self)]
        ratios = self.from_squares(finish, every, scope, lambda u: u, make)
        zero = self - self
        return zero.where(ratios < 0, self.scaled(ratios))

    def from_squares(
        self,
        finish: norms.Finish,
        every: Sequence[Layers],
        scope: NormScope | None,
        *functions: Callable[[Layers], Layers],
    ) -> Any:
        """What follows from the squared norms of layers of any size: see `in_range`.

        Args:
          finish: (squared norms of each, factors of each or none) -> what follows.
          every: several of the same layers.
          scope: as in `norms`.
          *functions: of these layers to each of them, which are applied again where
            squares leave the range; none where they are given as they are.
        """

        def sums_of(factors: Sequence[LayerValues]) -> list[LayerValues]:
            found = every
            if factors:
                found = [function(self) for function in functions] or every
                found = [x.scaled(f) for x, f in zip(found, factors, strict=True)]
            return [self._summed(x._products(x), self, scope) for x in found]

        return self._in_range(sums_of, finish, len(every), self, scope)

    def _in_range(
        self,
        sums_of: norms.SumsOf,
        finish: norms.Finish,
        num_squares: int,
        other: Layers,
        scope: NormScope | None,
    ) -> Any:
        names = {g.axis_name for g in self._groups if isinstance(g, Stage)}
        names |= set(self._norm_axes)
        is_in = self._is_in(other, scope)
        return norms.in_range(sums_of, finish, num_squares, is_in, names)

    def _products(self, other: Layers) -> LayerValues:
        """Re⟨u, v⟩ of every layer of every role."""
        place = {group: g for g, group in enumerate(self._groups)}

        def product(group: DepthGroup, m: int) -> jax.Array:
            x, y = (of._value(place[group], m) for of in (self, other))
            depth_axes = group.members[m].axes
            axes = tuple(axis for axis in range(x.ndim) if axis not in depth_axes)
            sums = _inner_product(x, y, axes, group.is_stacked)
            return summed_over(self._norm_axes, sums)

        return values_of(self._groups, product)

    def _summed(
        self, products: LayerValues, other: Layers, scope: NormScope | None
    ) -> LayerValues:
        """Sums over the roles of a block, of what is there at both offsets."""
        products = masked(products, self._is_in(other, scope))
        if (self.norm_scope if scope is None else scope) == "param":
            return products
        offsets = self._offset, other._offset
        return summed_by_name(products, lambda g, m: _names(g, m, offsets))

    def _is_in(self, other: Layers, scope: NormScope | None) -> IsIn | None:
        """Which slots are in such sums; None for all."""
        scope = self.norm_scope if scope is None else scope
        check_choice("scope", scope, ("param", "block"))
        first, second = self._offset, other._offset
        if first or second:
            return lambda g, m: g.has_neighbor(m, first) & g.has_neighbor(m, second)
        if scope == "block":  # a layer without neighbors is in no block
            return lambda g, m: g.positions(m)[1] >= self._fewest
        return None

    # -- Arrays ------------------------------------------------------------------------

    def _value(self, g: int, m: int) -> jax.Array:
        """scale · u of one member, in the dtype of the arithmetic."""
        x = self._arrays[g][m]
        if isinstance(x, _Zero):
            return jnp.zeros_like(widened(x.like))
        u, scales = widened(x), self._scales[g]
        return u if scales is None else in_dtype(scales[m], u.dtype) * u

    def _around(self, g: int, radius: int) -> tuple[Group, Any, Any]:
        """The layers of a group, their scales, and those beside up to a radius."""
        group, scales = self._groups[g], self._scales[g]
        halo = self._halos[g] if self._halos else None
        if halo is not None and radius <= halo.radius:
            return halo.group, halo.arrays, halo.scales
        if isinstance(group, Group):
            return group, self._own(g), scales
        beside, (xs, scales) = with_halos(group, radius, self._own(g), scales)
        return beside, xs, scales

    def _own(self, g: int) -> list[jax.Array]:
        """The arrays of a group, without their scales."""
        return [
            self._value(g, m) if isinstance(x, _Zero) else x
            for m, x in enumerate(self._arrays[g])
        ]

    def _each(self, function: Callable[[int, int], Any]) -> Layers:
        """`function(g, m)` in the place of every array, with no scale to be applied."""
        return self._with(
            [
                [function(g, m) for m in range(len(group_arrays))]
                for g, group_arrays in enumerate(self._arrays)
            ]
        )

    def _with(self, arrays: Any, scales: Any = None) -> Layers:
        return dataclasses.replace(
            self,
            _arrays=tuple(map(tuple, arrays)),
            _scales=tuple(scales or [None] * len(self._groups)),
            _halos=None,
            _of=None,
            _offset=0,
        )

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """For `jax.tree_util`."""
        static = (self._groups, self.norm_scope, self._norm_axes, self._fewest)
        return (self._arrays, self._scales), static

    @classmethod
    def tree_unflatten(cls, static: tuple, children: tuple) -> Layers:
        """For `jax.tree_util`."""
        groups, *rest = static
        return cls(groups, *children, *rest)


def _zero_like(x: Any) -> _Zero:
    return x if isinstance(x, _Zero) else _Zero(x)


def _inner_product(
    x: jax.Array, y: jax.Array, axes: tuple[int, ...], keepdims: bool
) -> jax.Array:
    """Re⟨x, y⟩ over these axes."""
    product = x.real * y.real + x.imag * y.imag if jnp.iscomplexobj(x) else x * y
    return jnp.sum(product, axis=axes, keepdims=keepdims)


def _names(group: DepthGroup, m: int, offsets: tuple[int, int]) -> Names:
    """The layers at these offsets from every slot of member m; None where one is not.

    Relative to the stage, in which names have to be the same as in all others.
    """
    if offsets == (0, 0):
        return tuple(group.members[m].layers.ravel().tolist())
    whole, members, width = group.whole, [m], 0
    if isinstance(group, Stage):
        members, width = group.members_of_whole(m), group.width
    names: list[tuple[int, int] | None] = [None] * group.members[m].layers.size
    for stage, i in enumerate(members):
        has = np.logical_and(*(whole.has_neighbor(i, d) for d in offsets)).ravel()
        for slot, rank in enumerate(whole.ranks[i].ravel()):
            if has[slot] and names[slot] is None:
                first, second = (
                    whole.layers[rank + d] - stage * width for d in offsets
                )
                names[slot] = first, second
    return tuple(names)


# -- From a tree and back --------------------------------------------------------------


def layers_of(
    groups: Sequence[DepthGroup],
    leaves: Sequence[Any] | Mapping[int, Any],
    norm_scope: NormScope = "param",
    norm_axes: Sequence[Hashable] = (),
    fewest: int = 2,
) -> Layers:
    """The leaves of every group's members, those that are stacked behind a barrier.

    Behind it an update is computed once and not again for each shifted copy. And the
    partitioner is free to split it as the result is: it computes wrong numbers for the
    negative padding of an array that has to be replicated where the result is split.

    Args:
      groups: of the tree.
      leaves: of the tree, by position.
      norm_scope: of the transformation.
      norm_axes: names of mesh axes that other axes of the leaves are split over.
      fewest: layers of a run that is coupled.
    """
    arrays = tuple(
        tuple(
            lax.optimization_barrier(x) if member.axes else x
            for member in group.members
            for x in [jnp.asarray(leaves[member.leaf])]
        )
        for group in groups
    )
    scales = (None,) * len(groups)
    axes = tuple(norm_axes)
    return Layers(tuple(groups), arrays, scales, norm_scope, axes, fewest)


def leaves_of(new: Layers, old: Layers) -> dict[int, jax.Array]:
    """{position of leaf: new leaf}, in the dtype of the old.

    Slots that nothing is coupled to keep what they had, and leaves of nothing but such
    slots are left out.
    """
    found = {}
    for g, group in enumerate(new._groups):
        for m, member in enumerate(group.members):
            is_in = group.positions(m)[1] >= new._fewest
            known = not isinstance(is_in, jax.Array)
            if known and not is_in.any():
                continue
            x: Any = old._arrays[g][m]
            y = new._value(g, m).astype(x.dtype)
            if not (known and is_in.all()):
                y = jnp.where(member.along(is_in, x.ndim), y, x)
            found[member.leaf] = y
    return found
