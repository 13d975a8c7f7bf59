"""Nodes as Equinox, Flax and haliax have them, for trees without these packages."""

import dataclasses
from typing import Any, NamedTuple

from jax.tree_util import (
    GetAttrKey,
    register_dataclass,
    register_pytree_node_class,
    register_pytree_with_keys_class,
)


@register_pytree_with_keys_class
class Attributes:
    """A node whose children are attributes, such as an Equinox module."""

    def __init__(self, children):
        vars(self).update(children)

    def tree_flatten_with_keys(self):
        return [(GetAttrKey(k), x) for k, x in vars(self).items()], tuple(vars(self))

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(dict(zip(names, children, strict=True)))


@register_pytree_with_keys_class
class Box:
    """Like `nn.LogicallyPartitioned` and NNX's variables: an array with axis names."""

    def __init__(self, value, names):
        self.value = value
        self.names = names

    def tree_flatten_with_keys(self):
        return [(GetAttrKey("value"), self.value)], self.names

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(children[0], names)


class Axis(NamedTuple):
    name: str


@register_pytree_node_class
class NamedArray:
    """Like haliax's: its array has no key, and its axes have names."""

    def __init__(self, array, names):
        self.array = array
        self.axes = tuple(map(Axis, names))

    def tree_flatten(self):
        return [self.array], tuple(axis.name for axis in self.axes)

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(children[0], names)


@register_dataclass
@dataclasses.dataclass
class Variable:
    """Like Flax NNX's: it holds an array, or a tree, and metadata."""

    value: Any

    def get_metadata(self):
        return {}
