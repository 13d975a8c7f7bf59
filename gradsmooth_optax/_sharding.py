"""Results that keep the sharding of a leaf, on Auto and on Explicit mesh axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def like(y: jax.Array, x: jax.Array) -> jax.Array:
    """`y` with the sharding that the type of `x` has, as it is on a mesh without one.

    Args:
      y: of as many axes as `x`.
    """
    return _resharded(y, _spec(x), x)


def replicated(y: jax.Array) -> jax.Array:
    """`y`, a small array, on all devices of a mesh that its type tells of.

    What it is computed from keeps its sharding then, whatever `y` is combined with.
    """
    mesh = jax.typeof(y).sharding.mesh
    kinds = set(mesh.axis_types)
    if not mesh.empty and kinds == {AxisType.Auto}:
        everywhere = NamedSharding(mesh, PartitionSpec())
        return lax.with_sharding_constraint(y, everywhere)
    return _resharded(y, (None,) * y.ndim, y)


def whole_along(y: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`y` not split along these axes, where its type says that it is."""
    spec = (None if i in axes else part for i, part in enumerate(_spec(y)))
    return _resharded(y, tuple(spec), y)


def anchored(y: jax.Array, x: jax.Array) -> jax.Array:
    """`y`, of the shape of a stacked `x`, so that the compiler gives it x's sharding.

    What a matmul over a split axis returns would be on all devices. The choice between
    y and x tells the partitioner that both are laid out alike; where nothing is split
    the compiler removes it.
    """
    y = like(y, x)
    rows = lax.broadcasted_iota(jnp.int32, (x.shape[0],) + (1,) * (x.ndim - 1), 0)
    return jnp.where(rows >= 0, y, x)


def _spec(x: jax.Array) -> tuple:
    sharding = jax.typeof(x).sharding
    return tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()


def _resharded(y: jax.Array, spec: tuple, of: jax.Array) -> jax.Array:
    if _spec(y) == spec or not any((*spec, *_spec(y))):
        return y
    mesh = jax.typeof(of).sharding.mesh
    if mesh.empty:
        mesh = jax.typeof(y).sharding.mesh
    return jax.sharding.reshard(y, NamedSharding(mesh, PartitionSpec(*spec)))
