"""Axis names in the metadata of Flax's and haliax's arrays, read without them."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np

from gradsmooth_optax._depth.paths import Path, plain_path

# Where `nnx.Variable` keeps them, by version of Flax; `nn.Partitioned` has `names`, and
# a haliax `NamedArray` has `axes` with a name each.
_NNX_METADATA = ("out_sharding", "sharding_names", "sharding")

# What nn.PARTITION_NAME is set to: "layers", "dense_layers", "layers_per_stage", …
_DEPTH_AXIS = re.compile(r"(?:.*_)?layers(?:_.*)?|scanned_blocks|circular_repeats")


def named_axes(tree: Any) -> dict[Path, tuple[Any, ...]]:
    """The axis names of every leaf whose box or variable carries them."""
    named = {}
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_carries_names)
    for key_path, box in flat:
        names = _names(box)
        for rest, leaf in jax.tree_util.tree_flatten_with_path(box)[0]:
            if len(names) == np.ndim(leaf) > 0:
                named[plain_path((*key_path, *rest))] = names
    return named


def is_depth_axis(name: Any) -> bool:
    """Whether an axis of this name runs, or may run, over layers."""
    return names_depth(name) or name == "blocks"


def names_depth(name: Any) -> bool:
    """Whether it surely does: "blocks" is also what a block-diagonal matrix has."""
    return isinstance(name, str) and _DEPTH_AXIS.fullmatch(name) is not None


def _carries_names(node: Any) -> bool:
    return bool(_names(node))


def _names(node: Any) -> tuple[Any, ...]:
    if hasattr(node, "get_metadata"):
        metadata = node.get_metadata()
        found = next((metadata[k] for k in _NNX_METADATA if metadata.get(k)), ())
    elif hasattr(node, "array") and hasattr(node, "axes"):
        found = tuple(getattr(axis, "name", None) for axis in node.axes)
    else:
        found = getattr(node, "names", ()) if hasattr(node, "value") else ()
    found = getattr(found, "spec", found)  # of a NamedSharding
    return tuple(found) if isinstance(found, tuple | jax.sharding.PartitionSpec) else ()
