"""Arrays, knowing nothing of depth: dtypes, shardings and mesh axes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gradsmooth_optax._checks import is_traced

# -- The dtype of the arithmetic: float32 at least, whatever that of the updates -------


def widened(x: jax.Array) -> jax.Array:
    """`x` in at least float32 (complex64)."""
    return x if num_bits(x.dtype) >= 32 else x.astype(jnp.float32)


def num_bits(dtype: Any) -> int:
    """Bits of a floating dtype, or of the parts of a complex one."""
    return jnp.finfo(dtype).bits


def in_dtype(number: Any, dtype: Any) -> Any:
    """An array in this dtype; a Python number stays weakly typed."""
    return number.astype(dtype) if hasattr(number, "dtype") else number


def inexact_dtype(leaf: Any) -> Any:
    """The dtype of a floating or complex leaf as jax computes it, else None."""
    if isinstance(leaf, float | complex):
        return jnp.result_type(leaf)
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return None
    return jax.dtypes.canonicalize_dtype(dtype)  # float64 is float32 without x64


# -- Results that keep the sharding of a leaf, on Auto and on Explicit mesh axes -------


def like(y: jax.Array, x: jax.Array) -> jax.Array:
    """`y` with the sharding that the type of `x` has, as it is on a mesh without one.

    Args:
      y: of as many axes as `x`.
    """
    return _resharded(y, _spec(x), x)


def laid_out_like(y: jax.Array, x: Any) -> jax.Array:
    """`y` with the sharding of `x`, of its type or, where it has a value, of the array.

    Args:
      y: of the shape of `x`.
    """
    if isinstance(x, jax.Array) and not is_traced(x) and not is_traced(y):
        return jax.device_put(y, x.sharding) if x.committed else y
    return like(y, x)


def is_split(x: Any, axes: Sequence[int]) -> bool:
    """Whether the type of `x` says that it is split along one of these axes."""
    spec = _spec(x)
    return any(spec[axis] is not None for axis in axes if axis < len(spec))


def split_like(
    y: jax.Array, axes: Sequence[int], x: jax.Array, of_axes: Sequence[int]
) -> jax.Array:
    """`y` split along `axes` as `x` is along `of_axes`, where its type tells."""
    wanted, spec = _spec(x), list(_spec(y)) or [None] * y.ndim
    for axis, of_axis in zip(axes, of_axes, strict=True):
        spec[axis] = wanted[of_axis]
    return _resharded(y, tuple(spec), x)


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


# -- Mesh axes inside `jax.shard_map` and `jax.pmap` -----------------------------------


def axis_size(axis_name: Hashable, argument: str) -> int:
    """How many devices a mesh axis has, or an error if it is not there."""
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"`{argument}` names the mesh axis {axis_name!r}, which is not bound where "
            f"the updates are. It is for updates inside `jax.shard_map` or `jax.pmap` "
            f"over that axis. Under plain `jit`, and for an axis that `shard_map` "
            f"leaves to the compiler, leave it out: there the compiler exchanges what "
            f"is needed."
        ) from None


def manual_axes() -> tuple[Hashable, ...]:
    """The mesh axes that `jax.shard_map` has split the program over."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def may_vary(x: Any, axis_name: Hashable) -> bool:
    """Whether `x` may differ along a mesh axis: False where it is known not to."""
    # `shard_map` knows of everything, or, with `check_vma=False`, of nothing.
    known = axis_name in _varying_axes(lax.axis_index(axis_name))
    return not known or axis_name in _varying_axes(x)


def summed_over(axis_names: Sequence[Hashable], number: jax.Array) -> jax.Array:
    """The sum over the mesh axes along which the number may vary."""
    varying = tuple(name for name in axis_names if may_vary(number, name))
    return lax.psum(number, varying) if varying else number


def _varying_axes(x: Any) -> frozenset:
    aval: Any = jax.typeof(x)
    # Its name before jax 0.10 was `vma`.
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying
