"""The state of `per_layer`: that of `inner` for every layer, in trees like all."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from gradsmooth_optax._transforms.blocks import Block, Blocks

# What is not like the parameters, of the rest of the tree.
_REST = "(rest)"


class PerLayerState(NamedTuple):
    """State of `per_layer` where the rest has a transformation of its own.

    Attributes:
      inner_state: of the layers, in the structure of the state of `inner`.
      rest_state: of the rest of the tree.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> depth, params = gs.scanned("blocks/"), {"blocks": {"w": jnp.ones((3, 2))}}
      >>> tx = gs.per_layer(optax.scale_by_adam(), depth, rest=optax.sgd(0.1))
      >>> tx.init(params).inner_state.mu["blocks"]["w"].shape
      (3, 2)
    """

    inner_state: optax.OptState
    rest_state: optax.OptState


class StatesByStack(NamedTuple):
    """State of the layers where `inner` does not say what is like the parameters.

    Attributes:
      states: for each stack the state of its layers, with layers in front; or one for
        each layer.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> def init(params):
      ...     return jnp.linalg.norm(params["w"])  # not of optax's placeholder
      >>> inner = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
      >>> tx = gs.per_layer(inner, gs.scanned("blocks/"))
      >>> print(tx.init({"blocks": {"w": jnp.ones((3, 4))}}).states["blocks"])
      [2. 2. 2.]
    """

    states: dict[str, Any]


class Unit(NamedTuple):
    """A part of a state: a tree like the parameters, or something else."""

    is_like_params: bool
    value: Any


def is_unit(node: Any) -> bool:
    return isinstance(node, Unit)


# What is raised where a state does not say what in it is like the parameters.
NO_STRUCTURE = (TypeError, ValueError, AttributeError, KeyError, IndexError)


def units_of(inner: Any, state: Any) -> Any:
    """The state with its parts as units."""
    return optax.tree_utils.tree_map_params(
        inner,
        lambda tree: Unit(True, tree),
        state,
        transform_non_params=lambda value: Unit(False, value),
        is_leaf=lambda _: True,
    )


def joined(
    inner: Any, blocks: Blocks, states: Sequence[Any], by_stack: bool = False
) -> Any:
    """One state of those of the blocks, and of the rest if it is the last one."""
    if by_stack:
        return StatesByStack(_by_stack(blocks, states))

    def of_all(*units):
        if not units[0].is_like_params:
            return _by_stack(blocks, [unit.value for unit in units])
        found: list[Any] = [optax.MaskedNode()] * len(blocks.grouping.leaves)
        for block, unit in zip(blocks.blocks, units, strict=False):
            subtrees = block.treedef.flatten_up_to(unit.value)
            for part, subtree in zip(block.parts, subtrees, strict=True):
                found[part.member.leaf] = subtree
        if len(units) > len(blocks.blocks):
            subtrees = blocks.treedef.flatten_up_to(units[-1].value)
            for i in blocks.rest:
                found[i] = subtrees[i]
        return jax.tree.unflatten(blocks.treedef, found)

    try:
        units = [units_of(inner, state) for state in states]
        return jax.tree.map(of_all, *units, is_leaf=is_unit)
    except NO_STRUCTURE:
        return StatesByStack(_by_stack(blocks, states))


def split(inner: Any, blocks: Blocks, state: Any, has_rest: bool) -> list[Any]:
    """The states of the blocks, and of the rest."""
    wanted: list[Block | None] = list(blocks.blocks)
    if has_rest and blocks.rest:
        wanted.append(None)
    try:
        if isinstance(state, StatesByStack):
            return [_of_block(blocks, state.states, block) for block in wanted]
        units = units_of(inner, state)
        flat = jax.tree.map(
            lambda unit: (
                Unit(True, blocks.treedef.flatten_up_to(unit.value))
                if unit.is_like_params
                else unit
            ),
            units,
            is_leaf=is_unit,
        )

        def pick(unit: Any, block: Block | None) -> Any:
            if not unit.is_like_params:
                return _of_block(blocks, unit.value, block)
            if block is None:
                return blocks.of_rest(unit.value)
            return block.nested([unit.value[p.member.leaf] for p in block.parts])

        return [
            jax.tree.map(lambda unit, b=block: pick(unit, b), flat, is_leaf=is_unit)
            for block in wanted
        ]
    except NO_STRUCTURE as error:
        raise TypeError(of_another_grouping(f"does not fit: {error}")) from error


def _by_stack(blocks: Blocks, values: Sequence[Any]) -> dict[str, Any]:
    """One value for each block, by stack, and that of the rest."""
    found: dict[str, Any] = {}
    stacks = {block.stack for block in blocks.blocks}
    if len({_key(stack) for stack in stacks} | {_REST}) <= len(stacks):
        raise ValueError(
            f"stacks of `per_layer` need names that differ as text, and none may be "
            f"{_REST!r}, but they are {sorted(map(repr, stacks))}. Name another "
            f"`stack=`."
        )
    for block, value in zip(blocks.blocks, values, strict=False):
        if _is_whole(blocks, block):
            found[_key(block.stack)] = value
        else:
            found.setdefault(_key(block.stack), {})[block.first] = value
    if len(values) > len(blocks.blocks):
        found[_REST] = values[-1]
    return found


def _of_block(blocks: Blocks, values: dict[str, Any], block: Block | None) -> Any:
    if block is None:
        return values[_REST]
    if not isinstance(values, dict):
        raise TypeError(
            "has one value for all layers. To set a rate, inject it outside, "
            "`inject_hyperparams(lambda learning_rate: per_layer(...))`, or set it for "
            "each stack"
        )
    found = values[_key(block.stack)]
    if _is_whole(blocks, block):
        return found
    # Some checkpoints give keys back as strings.
    return found[block.first] if block.first in found else found[str(block.first)]


def _is_whole(blocks: Blocks, block: Block) -> bool:
    """Whether a block is stacked and all of its stack."""
    is_alone = sum(other.stack == block.stack for other in blocks.blocks) == 1
    return bool(block.num_axes) and is_alone


def _key(stack: Hashable) -> str:
    return stack if isinstance(stack, str) else repr(stack)


def halves(state: Any) -> tuple[Any, Any]:
    if not isinstance(state, PerLayerState):
        raise TypeError(
            f"`state` of `per_layer` with a `rest` of its own must be a PerLayerState, "
            f"but is of type {type(state).__name__}: it was made by other settings. "
            f"Start anew with `init(params)`, or pass `PerLayerState(state, "
            f"rest.init(params))`."
        )
    return state


def of_another_grouping(found: str) -> str:
    return (
        f"`state` of `per_layer` was made for another grouping or by other settings: "
        f"it {found}. Start anew with `init(params)`, or pass the same `inner` and "
        f"`depth` that made it."
    )
