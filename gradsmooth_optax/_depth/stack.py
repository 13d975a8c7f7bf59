"""What a tree shows: stacks of layers, and what looks like one and is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gradsmooth_optax._depth.depth import Depth
from gradsmooth_optax._depth.paths import Path


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers that a tree shows, and the call that finds them.

    Attributes:
      function: the spec's.
      patterns: for it, from the shortest end of the path to the whole path.
      options: its other arguments.
      depths: the `Depth` of each of its leaves, by path.
      reason: what the reading rests on.
      is_named: whether they, or their axis, are called layers.
      doubts: what a person has to decide.
      ranked: whether the call is `ranked(...)` of that.
      rivals: other readings of the same leaves.
      kinds: such as "local" and "global", if each holds all its parts in each kind.
      num_axes: how many axes its vectors have beside their own, where that is known.
      is_equal: whether its layers are of equal structure, and not partly alike.
      is_minor: whether they are single modules that are no layers beside others.
      is_one_layer: whether there is nothing to couple in it.
      is_on_axis: whether there is no doubt of its axis.
      may_be_cycle: whether its parts may be positions in a cycle of layers.
    """

    function: Literal["unrolled", "scanned"]
    patterns: tuple[str, ...]
    options: dict[str, Any]
    depths: dict[Path, Depth]
    reason: str
    is_named: bool
    doubts: tuple[str, ...] = ()
    ranked: bool = False
    rivals: tuple[Stack, ...] = ()
    kinds: tuple[str, ...] = ()
    num_axes: int = 0
    is_equal: bool = True
    is_minor: bool = False
    is_one_layer: bool = False
    is_on_axis: bool = True
    may_be_cycle: bool = False

    @property
    def is_cycle(self) -> bool:
        """Whether its leaves are positions in a cycle of layers."""
        return "stride" in self.options

    @property
    def is_certain(self) -> bool:
        """Whether there is nothing to decide."""
        return not self.doubts and not self.rivals


class LeftOut(NamedTuple):
    """What looks like layers and is none.

    Attributes:
      reason: why.
      stack: what they would be as layers.
      is_apart: whether they should not be coupled, whoever says so; parts of a layer
        may be the layers of a small model.
    """

    reason: str
    stack: Stack
    is_apart: bool


class Reading(NamedTuple):
    """What a tree shows; no leaf is in two of the stacks."""

    stacks: tuple[Stack, ...]
    left_out: tuple[LeftOut, ...]
