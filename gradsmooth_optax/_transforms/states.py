"""States that were made by other settings: an error that says how to go on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

# What makes the states whose settings are ours.
_MADE_BY = {
    "EmptyState": "a strength that is no schedule",
    "DepthSmoothingState": "a strength that is a schedule",
    "WithDepthSmoothingState": "`with_depth_smoothing` with a schedule",
    "MonitorDepthState": "`monitor_depth`",
    "LearnAlphaState": "`learn_alpha`",
    "LearnOperatorState": "`learn_operator`",
}
# What a state may be made of: the fields that hold other states.
_PARTS = ("inner_state", "smoothing_state")


def with_checked_state(
    name: str,
    init_fn: optax.TransformInitFn,
    update_fn: Callable[..., tuple[Any, Any]],
) -> optax.GradientTransformationExtraArgs:
    """The transformation, which refuses a state that other settings have made.

    A state is known by its spine: the named tuples and tuples that it is made of, down
    to what is like the parameters. The spine to hold it against is asked of `init_fn`,
    of an empty tree once, since that costs nothing at a step. Only where that is no
    answer (`init_fn` may hold a mask as a tree), or another one, it is asked of the
    updates.

    Args:
      name: of the transformation, for the error.
      init_fn: that of the transformation.
      update_fn: that of the transformation.
    """
    try:
        of_nothing = _made(init_fn, ())
    except Exception:
        of_nothing = None

    def checked_update_fn(updates, state, params=None, **extra_args):
        if of_nothing is None or not _fits(state, of_nothing, ()):
            _check(name, init_fn, updates, state)
        return update_fn(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, checked_update_fn)


def _check(name: str, init_fn: Any, updates: Any, state: Any) -> None:
    """Raises if the state fits neither that of the updates nor that of no leaves."""
    masked = jax.tree.map(lambda _: optax.MaskedNode(), updates)
    expected = []
    wrong_updates = None
    for tree in (updates, masked, ()):
        try:
            made = _made(init_fn, tree)
        except Exception as error:
            if tree is updates and isinstance(error, ValueError):
                wrong_updates = error
            continue
        if _fits(state, made, tree):
            return
        expected.append((made, tree))
    if wrong_updates:
        raise wrong_updates  # for another reason than the state
    if expected:
        raise TypeError(_message(name, state, *expected[0]))


def _made(init_fn: Any, tree: Any) -> Any:
    """The state that `init_fn` makes, without memory for it, and without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jax.eval_shape(lambda: init_fn(tree))


# -- The spine of a state --------------------------------------------------------------


def _kind(node: Any) -> tuple | None:
    """What a named tuple is called, and its fields; None of anything else."""
    # By name: a module may have been loaded again since the state was made.
    fields = getattr(node, "_fields", None)
    return None if fields is None else (type(node).__name__, fields)


def _fits(found: Any, expected: Any, tree: Any) -> bool:
    """Whether a state is made of the same states as one that was made for `tree`."""
    return next(_differences(found, expected, jax.tree.structure(tree)), None) is None


def _differences(
    found: Any, expected: Any, of_tree: Any, at: str = "state"
) -> Iterator[tuple[str, Any, Any]]:
    """(where, found, expected) of the parts that differ in kind."""
    if jax.tree.structure(expected) == of_tree:
        return  # like the parameters, whatever these are
    if isinstance(expected, optax.EmptyState):
        # Nothing is as good as any other nothing.
        if jax.tree.leaves(found):
            yield at, found, expected
    elif (isinstance(expected, dict) and _is_leaf(found)) or (
        isinstance(found, dict) and _is_leaf(expected)
    ):
        yield at, found, expected  # `per_layer` has a count for each stack
    elif isinstance(expected, dict):
        if isinstance(found, dict):
            for key in expected.keys() & found.keys():
                yield from _differences(
                    found[key], expected[key], of_tree, f"{at}[{key!r}]"
                )
    elif isinstance(expected, tuple) and expected:
        kind = _kind(expected)
        same = _kind(found) == kind if kind else _is_plain(found)
        if not same or len(found) != len(expected):
            yield at, found, expected
            return
        for i, parts in enumerate(zip(found, expected, strict=True)):
            step = f".{kind[1][i]}" if kind else f"[{i}]"
            yield from _differences(*parts, of_tree, at + step)


def _is_leaf(node: Any) -> bool:
    return jax.tree_util.all_leaves([node])


def _is_plain(node: Any) -> bool:
    """Whether it is what the state of a chain is."""
    return isinstance(node, tuple | list) and _kind(node) is None


# -- What to do ------------------------------------------------------------------------


def _message(name: str, state: Any, made: Any, tree: Any) -> str:
    of_tree = jax.tree.structure(tree)
    at, found, expected = next(_differences(state, made, of_tree))
    return (
        f"`state` of `{name}` was made by other settings: `{at}` is {_shown(found)}, "
        f"but these settings make {_shown(expected)}. Start anew with `init(params)`, "
        f"or convert it: in its place pass `{_conversion(at, found, expected, tree)}`."
    )


def _shown(state: Any) -> str:
    """Its kind, what it is made of, and what makes it."""
    made_by = _MADE_BY.get(type(state).__name__)
    return f"{_called(state)}" + (f" (of {made_by})" if made_by else "")


def _called(state: Any) -> str:
    if _is_leaf(state):
        return "an array"
    if _is_plain(state):
        return f"({', '.join(map(_called, state))})"
    parts = ", ".join(
        f"{field}={_called(getattr(state, field))}"
        for field in getattr(state, "_fields", ())
        if field in _PARTS
    )
    return type(state).__name__ + (f"({parts})" if parts else "")


def _conversion(at: str, found: Any, expected: Any, tree: Any) -> str:
    """The expression that makes the expected state, of what was found or anew."""
    fresh = "init(params)" + at.removeprefix("state")
    if isinstance(expected, optax.EmptyState):
        return "optax.EmptyState()"
    if converted := _converted(at, found, expected, tree, fresh):
        return converted
    if type(expected).__name__ == "DepthSmoothingState":
        return "DepthSmoothingState(jnp.int32(number_of_updates_so_far))"
    return fresh


def _converted(at: str, found: Any, expected: Any, tree: Any, fresh: str) -> str | None:
    """The expression where it keeps something of what was found."""
    called = type(expected).__name__
    if not isinstance(expected, tuple) or not expected:
        return None  # it has no kind to be known by
    for place, part in _places(at, found):
        if _fits(part, expected, tree):
            return place
    if called not in _MADE_BY:
        return None
    inner, smoothing = (
        _converted(at, found, getattr(expected, part, None), tree, f"{fresh}.{part}")
        for part in _PARTS
    )
    if called == "WithDepthSmoothingState":
        inner = inner or f"{fresh}.inner_state"
        return f"{called}({inner}, {smoothing or 'smoothing.init(params)'})"
    return f"{fresh}._replace(inner_state={inner})" if inner else None


def _places(at: str, state: Any) -> Iterator[tuple[str, Any]]:
    """A state and the states that it is made of, with the expressions for them."""
    yield at, state
    if _is_plain(state):
        for i, part in enumerate(state):
            yield from _places(f"{at}[{i}]", part)
    for field in _PARTS:
        if hasattr(state, field):
            yield from _places(f"{at}.{field}", getattr(state, field))
