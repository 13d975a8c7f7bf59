"""Mesh axes inside `jax.shard_map` and `jax.pmap`: their sizes, and sums over them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
from jax import lax


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
    of_x: Any = jax.typeof(x)
    # Its name before jax 0.10 was `vma`.
    return of_x.vma if hasattr(of_x, "vma") else of_x.manual_axis_type.varying
