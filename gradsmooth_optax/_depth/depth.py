"""`Depth`: which layers of which stack one leaf holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

from gradsmooth_optax._checks import LARGEST_LAYER, hashable, integer, integers


@dataclasses.dataclass(frozen=True)
class Depth:
    """Says which layers of which stack one leaf holds.

    All leaves of equal `(stack, role)`, per-layer shape and dtype form one *group*,
    the unit that is coupled along depth. A group may mix leaves that hold one layer
    with leaves that hold many.

    Args:
      stack: hashable name of one sequence of repeated blocks, such as "decoder".
      role: hashable name of the parameter inside the block, such as "mlp/kernel".
      layer: depth of the leaf's first (or only) layer.
      axis: None for a leaf that is one layer, else the array axis, or the tuple of
        array axes, that run over depth. Negative axes count from the end.
      stride: depth step along each of these axes; an int, or one int per axis. The
        default is contiguous layers, row-major over `axis` in the order given.

    Raises:
      TypeError: at construction, for a name that is not hashable or a number that is
        not an int.
      ValueError: at construction, for an axis named twice, a stride without an axis,
        or another number of strides than of axes.

    Example:
      >>> import gradsmooth_optax as gs
      >>> gs.Depth("decoder", "mlp/kernel", 3)  # one leaf that is layer 3
      Depth(stack='decoder', role='mlp/kernel', layer=3, axis=None, stride=None)
      >>> third_of_six = gs.Depth("decoder", "mlp/kernel", 3, axis=1, stride=6)
      >>> third_of_six.layers((64, 4, 256))  # axis 1 holds layers 3, 9, 15, 21
      array([ 3,  9, 15, 21])
    """

    stack: Hashable
    role: Hashable
    layer: int = 0
    axis: int | tuple[int, ...] | None = None
    stride: int | tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("stack", "role"):
            hashable(name, getattr(self, name))
        layer = integer("layer", self.layer)
        if abs(layer) > LARGEST_LAYER:
            raise ValueError(
                f"`layer` of a Depth must fit into 32 bits, but is {layer}. It is "
                f"probably a hash and no layer number: take another one."
            )
        object.__setattr__(self, "layer", layer)
        axis, stride = self.axis, self.stride
        if axis is not None:
            axis = integers("axis", axis)
            object.__setattr__(self, "axis", axis)
        if stride is not None:
            stride = integers("stride", stride)
            if any(abs(step) > LARGEST_LAYER for step in as_tuple(stride)):
                raise ValueError(
                    f"`stride` of a Depth must fit into 32 bits, but is {stride}. It "
                    f"is the step in depth along an axis, such as the length of a "
                    f"cycle: `axis=1, stride=6`."
                )
            object.__setattr__(self, "stride", stride)
            num_axes = 0 if axis is None else len(as_tuple(axis))
            if len(as_tuple(stride)) != num_axes:
                raise ValueError(
                    f"`stride` of a Depth needs one number per depth axis, but "
                    f"stride={stride} was given with axis={axis}. For one axis write "
                    f"`axis=1, stride=6`, for two `axis=(0, 1), stride=(4, 1)`."
                )
        if isinstance(axis, tuple) and (not axis or len(set(axis)) < len(axis)):
            raise ValueError(
                f"`axis` of a Depth names no axis or names one twice: {axis}. Write "
                f"`axis=None` for a leaf that is one layer."
            )

    def layers(self, shape: Sequence[int]) -> np.ndarray:
        """Layer numbers along the depth axes of a leaf of this `shape`.

        Args:
          shape: the leaf's shape. Its depth axes must exist.

        Returns:
          An int array with one dimension per depth axis, in the order of `axis`.
        """
        sizes = [shape[axis] for axis in as_tuple(self.axis)]
        if self.stride is None:
            return self.layer + np.arange(int(np.prod(sizes, dtype=int))).reshape(sizes)
        layers = np.full(sizes, self.layer)
        for index, step in zip(np.indices(sizes), as_tuple(self.stride), strict=True):
            layers = layers + index * step
        return layers


def as_tuple(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)
