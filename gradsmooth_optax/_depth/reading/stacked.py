"""Layers stacked along axes, detected by the axis names in Flax's metadata."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import numpy as np

from gradsmooth_optax._depth.paths import Path, show_path, some
from gradsmooth_optax._depth.reading.boxes import is_depth_axis, names_depth
from gradsmooth_optax._depth.reading.found_stack import (
    VECTOR_NAMES,
    DetectedStack,
    common_axes,
    layer_kinds,
    leaves_by_child,
    patterns_of,
)
from gradsmooth_optax._depth.reading.siblings import (
    children_of,
    holders_of,
    numbered_patterns,
)
from gradsmooth_optax._depth.reading.words import names_layers
from gradsmooth_optax._depth.specs import DepthSpec, Leaves, ranked, scanned


def scanned_stacks(
    node: Path, leaves: Leaves, names: dict[Path, tuple]
) -> Iterator[DetectedStack]:
    """The highest nodes whose leaves all run over layers on the same axes."""
    if not any(_depth_axes(path, names) for path, _ in leaves):
        return
    axes = next(a for path, _ in leaves if (a := _depth_axes(path, names)))
    # A leaf without axis names belongs to the stack if its shape fits.
    fits = all(
        _depth_axes(path, names) == axes if path in names else np.ndim(leaf) > max(axes)
        for path, leaf in leaves
    )
    sizes = {tuple(np.shape(leaf)[a] for a in axes) for _, leaf in leaves if fits}
    if node and len(sizes) == 1 and not _holds_named_stacks(node, leaves):
        yield _scanned_stack(node, leaves, axes, names)
        return
    for child, child_leaves in leaves_by_child(node, leaves).items():
        yield from scanned_stacks((*node, child), child_leaves, names)


def _depth_axes(path: Path, names: dict[Path, tuple]) -> tuple[int, ...]:
    return tuple(i for i, n in enumerate(names.get(path, ())) if is_depth_axis(n))


def _holds_named_stacks(node: Path, leaves: Leaves) -> bool:
    """Whether the leaves rather belong to nodes below that are called layers."""
    return not names_layers(node[-1]) and all(
        any(map(names_layers, path[len(node) : -1])) for path, _ in leaves
    )


def _scanned_stack(
    node: Path, leaves: Leaves, axes: tuple[int, ...], names: dict[Path, tuple]
) -> DetectedStack:
    called = next([names[path][a] for a in axes] for path, _ in leaves if path in names)
    size = np.shape(leaves[0][1])[axes[0]]
    on = f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}"
    reason = (
        f"{show_path(node)}: {on} named {some(called)} in "
        f"{sum(path in names for path, _ in leaves)} of its {len(leaves)} leaves"
    )
    axis = axes[0] if len(axes) == 1 else axes
    doubts = []
    if not all(map(names_depth, called)):
        doubts.append(
            f"{show_path(node)}: an axis named {some(called)} may be of layers or of "
            f"a block-diagonal matrix"
        )
    if strangers := _strangers(leaves, names):
        doubts.append(
            f"{some(strangers)}: no leaf of the module has axis names; its size on "
            f"{on} may be that of the layers by chance"
        )
    if len(axes) > 1:
        doubts.append(
            f"{show_path(node)}: several axes are named after layers "
            f"({some(called)}). Does depth run over them in this order?"
        )
    families, others = children_of(node, leaves)
    cycle = next((f for f in families if names_layers(f.word)), None)
    if cycle and not others and len(families) == len(axes) == 1:
        length = len(cycle.children)
        doubts.append(
            f"{cycle}: taken for a cycle of {length} layers, repeated {size} times"
        )
        spec = functools.partial(scanned, axis=axis, stride=length)
        if any(len(numbers) < length for numbers in holders_of(cycle).values()):
            doubts.append(
                f"{cycle}: not all of them have the same parameters, and `ranked` "
                f"couples those of the same shape over the others"
            )
            spec = _ranked(spec)
        return DetectedStack(
            spec, numbered_patterns(cycle), leaves, reason, tuple(doubts)
        )
    if cycle:
        doubts.append(f"{cycle}: each holds layers of the stack. Is this a cycle?")
    elif kinds := layer_kinds(node, leaves, len(axes)):
        doubts.append(
            f"{show_path(node)}: all parts are there as {some(kinds)}. Are they layers "
            f"of a cycle? Then write one `scanned(pattern, axis={axis}, start=..., "
            f"stride={len(kinds)})` for each"
        )
    ending = "(?:/|$)" if any(path == node for path, _ in leaves) else "/"
    patterns = patterns_of(node[:-1], re.escape(str(node[-1])) + ending)
    spec = functools.partial(scanned, axis=axis)
    return DetectedStack(spec, patterns, leaves, reason, tuple(doubts))


def _strangers(leaves: Leaves, names: dict[Path, tuple]) -> list[str]:
    """Leaves in modules without axis names, except vectors that a scan stacked."""
    known = {path[:-1] for path, _ in leaves if path in names}
    return [
        show_path(path)
        for path, leaf in leaves
        if path[:-1] not in known
        and not (str(path[-1]) in VECTOR_NAMES and np.ndim(leaf) == 2)
    ]


def _ranked(spec: Callable[[str], DepthSpec]) -> Callable[[str], DepthSpec]:
    return lambda pattern: ranked(spec(pattern))


# -- Without axis names: nobody can tell -----------------------------------------------


def perhaps_scanned(node: Path, leaves: Leaves) -> Iterator[str]:
    """Nodes that may be stacked layers by their name or their vectors of rank 2."""
    children = leaves_by_child(node, leaves)
    axes = common_axes(leaves)
    if node and axes and not _holds_named_stacks(node, leaves):
        vectors = [path for path, _ in leaves if str(path[-1]) in VECTOR_NAMES]
        num_modules = len({path[:-1] for path, _ in leaves})
        if names_layers(node[-1]) or (vectors and num_modules > 1):
            pattern = f"{show_path(node)}/"
            yield (
                f"{pattern}: all {len(leaves)} leaves have one size on axis "
                f"{some(axes)}. Layers stacked by a scan look like that, and so do "
                f"experts or heads. If they are layers, write "
                f"`scanned({pattern!r}, axis={axes[0]})`"
            )
            return
    for child, child_leaves in children.items():
        yield from perhaps_scanned((*node, child), child_leaves)
