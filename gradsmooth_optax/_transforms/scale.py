"""Rates along depth: every layer's update times a factor of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradsmooth_optax._arrays import inexact_dtype, widened
from gradsmooth_optax._calls import reduce_by_name, shown_call
from gradsmooth_optax._checks import (
    check_flag,
    factors_in,
    is_function,
    is_traced,
    scalar,
    shown,
)
from gradsmooth_optax._depth.paths import Path, show_path
from gradsmooth_optax._depth.specs import DepthLike, as_spec
from gradsmooth_optax._transforms.blocks import Blocks, Part, blocks_of
from gradsmooth_optax._transforms.smooth import DepthSmoothingState
from gradsmooth_optax._transforms.states import with_checked_state

Rest: TypeAlias = "float | Literal['first'] | Callable[[Path, Any], float] | None"


class LayerFactors:
    """One factor for each layer of a stack, whatever its depth.

    Made by `layer_wise_decay` and `factors_fn`. Frozen and not callable, and hashable
    where it holds no array of jax.

    Example:
      >>> import gradsmooth_optax as gs
      >>> gs.layer_wise_decay(0.5).of(3)
      array([0.25, 0.5 , 1.  ])
    """

    def of(self, num_layers: int) -> Any:
        """The factors of a stack of so many layers, an array (L,)."""
        raise NotImplementedError

    def below_first(self, num_layers: int) -> Any:
        """The factor of one more layer below the first, as embeddings are."""
        raise ValueError(
            f"`rest='first'` of `scale_over_depth` needs factors that go on below the "
            f"first layer, as those of `layer_wise_decay` do, but they are {self!r}. "
            f"Pass the number itself: `rest=0.1`."
        )


@dataclasses.dataclass(frozen=True, repr=False)
class _LayerWiseDecay(LayerFactors):
    rate: Any

    def of(self, num_layers: int) -> Any:
        return self.rate ** np.arange(num_layers)[::-1]

    def below_first(self, num_layers: int) -> Any:
        return self.rate**num_layers

    def __repr__(self) -> str:
        return shown_call("layer_wise_decay", (self.rate,))


@dataclasses.dataclass(frozen=True, repr=False)
class _FactorsFn(LayerFactors):
    function: Callable[[int], Any]

    def of(self, num_layers: int) -> Any:
        found = self.function(num_layers)
        if np.shape(found) != (num_layers,):
            raise ValueError(
                f"the function of {self!r} must return one factor for each layer, of "
                f"shape ({num_layers},), but returned shape {np.shape(found)}."
            )
        return factors_in("factors", found)

    def __repr__(self) -> str:
        return shown_call("factors_fn", (self.function,))

    def __reduce__(self):
        return reduce_by_name(self, self.function)


def layer_wise_decay(rate: Any) -> LayerFactors:
    """Layer-wise learning-rate decay: 1 for the last layer, `rate` less for each below.

        factor_l = rate^(L-1-l)        for layer l = 0 .. L-1 of a stack

    Args:
      rate: a number > 0, such as 0.75, or a traced scalar.

    Returns:
      Factors for `scale_over_depth`, which with `rest="first"` gives embeddings
      `rate^L`.

    Raises:
      TypeError, ValueError: at construction, for a rate that is no positive number.

    Example:
      >>> import gradsmooth_optax as gs
      >>> tx = gs.scale_over_depth("maxtext", gs.layer_wise_decay(0.75), rest="first")

    References:
      Howard, Ruder, "Universal Language Model Fine-tuning for Text Classification",
      arXiv 1801.06146; Clark et al., "ELECTRA", arXiv 2003.10555, appendix A.
    """
    if is_function(rate):
        raise TypeError(
            f"`rate` of `layer_wise_decay` must be a number, but is the function "
            f"{shown(rate)}. For a schedule write `scale_over_depth(depth, lambda "
            f"count: rate(count) ** jnp.arange(num_layers)[::-1])`."
        )
    rate = factors_in("rate", rate)
    if np.shape(rate) or not (is_traced(rate) or rate > 0):
        raise ValueError(
            f"`rate` of `layer_wise_decay` must be one number > 0, but is "
            f"{shown(rate)}. Write `layer_wise_decay(0.75)`."
        )
    return _LayerWiseDecay(rate)


def factors_fn(function: Callable[[int], Any]) -> LayerFactors:
    """Factors by a function of the number of layers.

    Args:
      function: num_layers -> array (L,), called at trace time.

    Returns:
      Factors for `scale_over_depth`.

    Raises:
      TypeError: for what is no function.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import numpy as np
      >>> gs.factors_fn(lambda num_layers: 1 / np.arange(1, num_layers + 1)).of(2)
      array([1. , 0.5])
    """
    if not is_function(function):
        raise TypeError(
            f"`factors_fn` wraps a function of the number of layers, but got "
            f"{shown(function)}. An array (L,) can be passed to `scale_over_depth` as "
            f"it is."
        )
    return _FactorsFn(function)


def scale_over_depth(
    depth: DepthLike,
    factors: Any,
    *,
    rest: Rest = None,
    strict: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the update of every layer by a factor of its own.

        u'_l = factors_l u_l         for layer l = 0 .. L-1 of its stack

    With one number it is the rate of the blocks relative to the rest of the model, with
    `layer_wise_decay(0.75)` the layer-wise decay of fine-tuning, which no mask can give
    where layers are stacked. L and l are those of the stack, over all roles: layer 0
    is the first that the stack has, whatever its number.

    Place it last: after the learning rate it scales the decay too, before
    `add_decayed_weights` it does not. Arithmetic is in float32 (float64 for float64
    leaves), rounded once to the dtype of the leaf. Inside `jax.shard_map` over stages
    it sees the layers of one stage only: scale outside of it.

    Args:
      depth: where depth is, as in `smooth_over_depth`.
      factors: a number, an array (L,), a schedule of either, or `LayerFactors`. A
        function is always a schedule: wrap one of the number of layers in
        `factors_fn`.
      rest: what leaves outside of `depth` are multiplied by: None leaves them as they
        are; a number; "first" for `rate^L`, as one layer below the first; or a function
        `(path, leaf) -> number`.
      strict: as in `per_layer`.

    Returns:
      A transformation with `optax.EmptyState()`, or `DepthSmoothingState` where the
      factors are a schedule.

    Raises:
      TypeError: at construction, for an argument of the wrong kind.
      ValueError: at construction, for factors that are not finite or have more than one
        axis; in `init` and at trace of `update`, for a grouping that does not fit the
        tree, factors for another number of layers, `rest="first"` where there are
        stacks of several depths or the factors do not go on below the first layer.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> updates = {"embed": jnp.ones(1), "blocks": {"w": jnp.ones((3, 1))}}
      >>> tx = gs.scale_over_depth(
      ...     gs.scanned("blocks/"), gs.layer_wise_decay(0.5), rest="first"
      ... )
      >>> scaled, _ = tx.update(updates, tx.init(updates))
      >>> print(scaled["blocks"]["w"].ravel(), scaled["embed"])
      [0.25 0.5  1.  ] [0.125]
    """
    spec = as_spec(depth)
    if not isinstance(factors, LayerFactors):
        factors = factors_in("factors", factors)
    is_first = isinstance(rest, str) and rest == "first"
    if rest is not None and not is_first and not is_function(rest):
        rest = _number("rest", rest)
    if is_first and not isinstance(factors, LayerFactors):
        raise ValueError(
            f"`rest='first'` needs factors that go on below the first layer, as those "
            f"of `layer_wise_decay` do, but `factors` is {shown(factors)}. Pass the "
            f"number itself: `rest=0.1`."
        )
    check_flag("strict", strict)
    schedule = cast(Any, factors) if is_function(factors) else None
    said: set[Hashable] = set()

    def init_fn(params):
        blocks = blocks_of(spec, params, strict, said)
        if schedule is None:
            _scales(blocks, factors, rest)
            return optax.EmptyState()
        return DepthSmoothingState(jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        blocks, now = blocks_of(spec, updates, strict, said), factors
        if schedule is not None:
            now = factors_in("factors", schedule(state.count))
            state = DepthSmoothingState(optax.safe_increment(state.count))
        leaves = blocks.grouping.leaves
        new = {
            i: _scaled(leaves[i], scale)
            for i, scale in _scales(blocks, now, rest).items()
            if inexact_dtype(leaves[i]) is not None and not _is_one(scale)
        }
        return blocks.grouping.replaced(new), state

    return with_checked_state("scale_over_depth", init_fn, update_fn)


def _scales(blocks: Blocks, factors: Any, rest: Any) -> dict[int, Any]:
    """What every leaf is multiplied by, of a shape that broadcasts to it."""
    scales: dict[int, Any] = {}
    depths: dict[Hashable, np.ndarray] = {}
    for stack, layers in (
        *blocks.masked,
        *((b.stack, b.layers) for b in blocks.blocks),
    ):
        known = depths.get(stack, np.zeros(0, int))
        depths[stack] = np.union1d(known, np.ravel(layers))
    for block in blocks.blocks:
        of_stack = _of_stack(block.stack, len(depths[block.stack]), factors)
        ranks = np.searchsorted(depths[block.stack], block.layers)
        for part in block.parts:
            scales[part.member.leaf] = _along(of_stack, ranks, part, blocks)
    if rest is None:
        return scales
    if isinstance(rest, str):
        sizes = {len(layers) for layers in depths.values()}
        if not sizes and blocks.rest:
            raise ValueError(
                "`rest='first'` of `scale_over_depth` is not clear: all layers are "
                "masked here, so that the depth is not known. Scale outside of the "
                "mask, or pass the number itself."
            )
        if len(sizes) > 1:
            raise ValueError(
                f"`rest='first'` is not clear: there are stacks of {sorted(sizes)} "
                f"layers. Pass a function that tells their embeddings apart: "
                f"`rest=lambda path, leaf: 0.75**12 if 'encoder' in path else 1.0`."
            )
        rest = factors.below_first(sizes.pop()) if sizes else None
    for i in blocks.rest if rest is not None else ():
        path, leaf = blocks.grouping.paths[i], blocks.grouping.leaves[i]
        scale = rest(path, leaf) if callable(rest) else rest
        scales[i] = _number(f"rest({show_path(path)!r}, leaf)", scale)
    return scales


def _number(argument: str, value: Any) -> Any:
    """The value, if it is one finite number, or an array that may hold one."""
    more = ", 'first' or a function (path, leaf) -> number" * (argument == "rest")
    value = scalar(argument, value, more)
    if not is_traced(value) and not np.isfinite(value):
        raise ValueError(f"`{argument}` must be finite, but is {shown(value)}.")
    return value


def _of_stack(stack: Hashable, num_layers: int, factors: Any) -> Any:
    if isinstance(factors, LayerFactors):
        return factors.of(num_layers)
    if np.shape(factors) not in ((), (num_layers,)):
        raise ValueError(
            f"`factors` of `scale_over_depth` has {np.shape(factors)[0]} numbers, but "
            f"stack {stack!r} has {num_layers} layers. Pass one for each layer, or "
            f"what holds for every depth: `layer_wise_decay(0.75)`, `factors_fn(...)`."
        )
    return factors


def _along(of_stack: Any, ranks: np.ndarray, part: Part, blocks: Blocks) -> Any:
    if np.shape(of_stack) == ():
        return of_stack
    found = of_stack[ranks]
    leaf = blocks.grouping.leaves[part.member.leaf]
    return part.member.along(found, np.ndim(leaf)) if part.axes else found


def _scaled(leaf: Any, scale: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    wide = widened(leaf)
    factor = jnp.asarray(scale).astype(jnp.finfo(wide.dtype).dtype)
    if jnp.iscomplexobj(wide):  # part by part: infinities stay what they are
        return lax.complex(wide.real * factor, wide.imag * factor).astype(leaf.dtype)
    return (wide * factor).astype(leaf.dtype)


def _is_one(scale: Any) -> bool:
    return not isinstance(scale, jax.Array) and bool(np.all(np.asarray(scale) == 1))
