"""Boxes: nodes that hold one array and say something of it, such as its axes' names.

Told by their class and read without importing Flax, haliax or penzai.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

# How a box calls its array, and what else only boxes have.
_MARKS = {
    "value": ("get_metadata", "unbox", "names", "label", "meta"),
    "data_array": ("named_axes",),
    "array": ("axes",),
}
# Where `nnx.Variable` keeps the names, by version of Flax.
_NNX_METADATA = ("out_sharding", "sharding_names", "sharding")


def is_box(node: Any) -> bool:
    """Whether the key of what the node holds is no name.

    So it is of Flax's variables and partitioned arrays, and of haliax's and penzai's
    named arrays and parameters, but not of a module that calls a parameter `value`.
    """
    if isinstance(node, jax.Array | np.ndarray | tuple | list | dict):
        return False
    return any(
        _has(node, array) and any(_has(node, mark) for mark in marks)
        for array, marks in _MARKS.items()
    )


def _has(node: Any, name: str) -> bool:
    # Not by `hasattr`: some nodes have a `__getattr__` that finds anything.
    return hasattr(type(node), name) or name in getattr(node, "__dict__", ())


def axis_names(node: Any) -> tuple[Any, ...]:
    """The names of an array's axes, of the box that carries them; else ()."""
    if not is_box(node):
        return ()
    if _has(node, "get_metadata"):
        metadata = node.get_metadata()
        found = next((metadata[k] for k in _NNX_METADATA if metadata.get(k)), ())
    elif _has(node, "axes"):
        found = tuple(getattr(axis, "name", None) for axis in node.axes)
    else:
        found = getattr(node, "names", ())
    found = getattr(found, "spec", found)  # of a NamedSharding
    return tuple(found) if isinstance(found, tuple | jax.sharding.PartitionSpec) else ()
