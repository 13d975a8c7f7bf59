"""Where arrays are on several devices: weights and batches split over all of them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.evidence.task import Task

_DEVICES = "devices"


def shardings(state: Any) -> Any:
    """Returns a sharding for every leaf of a state that is stacked over seeds.

    Matrices are split along their last axis, which is never the layers; where the
    devices do not divide it, and for vectors, every device holds all of it.

    Args:
      state: arrays or `jax.ShapeDtypeStruct`s.
    """
    mesh = _mesh()

    def of_leaf(leaf: Any) -> NamedSharding:
        is_split = leaf.ndim > 2 and leaf.shape[-1] % mesh.size == 0
        spec = P(*[None] * (leaf.ndim - 1), _DEVICES) if is_split else P()
        return NamedSharding(mesh, spec)

    return jax.tree.map(of_leaf, state)


def placed(tree: Any) -> Any:
    """Returns traced arrays of a state with these shardings asked for."""
    if _mesh().size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(tree))


def with_split_batches(task: Task) -> Task:
    """Returns the task with every batch split by its examples, where they divide."""
    mesh = _mesh()
    if mesh.size == 1:
        return task

    def of_leaf(leaf: jax.Array) -> jax.Array:
        if leaf.shape[0] % mesh.size:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P(_DEVICES)))

    def draw(data: Any, key: jax.Array, step: jax.Array) -> Any:
        return jax.tree.map(of_leaf, task.draw(data, key, step))

    return task._replace(draw=draw)


def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), (_DEVICES,))
