"""The window next to PyTorch twins and to optax's own transformations.

All times are ratios to `u -> 0.9 u` in jax, on the same numbers in the same turns.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
import optax

import gradsmooth_optax as gs
from benchmarks.cost.cpu.timing import compiled, in_turns, relative_to
from benchmarks.cost.cpu.updates import LAYOUTS, LIMIT, depth_of, limit, updates_of

_ALPHA = 0.2
OURS, HOOK = "gradsmooth_optax", "PyTorch, hook"


def has_torch() -> bool:
    """Returns whether the PyTorch twins can run."""
    return find_spec("torch") is not None


def peer_costs(
    all_megabytes: tuple[float, ...], layers: int, rounds: int, most_seconds: float
) -> dict[str, Any]:
    """Returns {size: {layout: {"who: variant": time}}}."""
    costs: dict[str, Any] = {}
    for megabytes in all_megabytes:
        of_size = costs.setdefault(f"{megabytes:g} MB", {})
        for layout in LAYOUTS:
            updates = updates_of(megabytes, layers, layout)
            calls = {LIMIT: partial(compiled(limit, updates), updates)}
            for name, tx in _transformations(layout).items():
                state = tx.init(updates)
                run = compiled(tx.update, updates, state)
                calls[name] = partial(run, updates, state)
            if has_torch():
                calls |= _twins(updates, layout)
            seconds = in_turns(calls, rounds, f"peers, {layout}", most_seconds)
            of_size[layout] = relative_to(LIMIT, seconds)
    return costs


def _transformations(layout: str) -> dict[str, optax.GradientTransformation]:
    smooth = partial(gs.smooth_over_depth, depth_of(layout), _ALPHA)
    return {
        f"{OURS}: window": smooth(),
        f"{OURS}: norm_preserving": smooth(variant="norm_preserving"),
        "optax: trace": optax.trace(0.9),
        "optax: ema": optax.ema(0.9),
        "optax: scale_by_adam": optax.scale_by_adam(),
    }


def _twins(updates: Any, layout: str) -> dict[str, Callable[[], Any]]:
    import torch  # pyright: ignore[reportMissingImports] # optional

    us: Any = [torch.tensor(np.asarray(leaf)) for leaf in in_order(updates, layout)]
    calls = {}
    for name, twin in twins_of(layout).items():
        way, _, variant = name.partition(": ")
        arguments = (us[0] if layout == "stacked" else us), _ALPHA
        # A hook writes into its tensors, which changes numbers, but no times.
        calls[name] = partial(twin, *arguments)
        calls[f"{way}, compiled: {variant}"] = partial(torch.compile(twin), *arguments)
    return calls


def twins_of(layout: str) -> dict[str, Callable]:
    """Returns the PyTorch twins for updates of a layout, by way and variant."""
    from benchmarks.cost.cpu import torch_twins

    ways = {HOOK: torch_twins.HOOK, "PyTorch, foreach": torch_twins.LISTED}
    if layout == "stacked":
        ways = {"PyTorch": torch_twins.STACKED}
    return {f"{way}: {v}": twin for way, of in ways.items() for v, twin in of.items()}


def in_order(updates: Any, layout: str) -> list[jax.Array]:
    """Returns the leaves by layer; a tree sorts `layers_10` before `layers_2`."""
    if layout == "stacked":
        return [updates["blocks"]["w"]]
    return [updates[f"layers_{i}"]["w"] for i in range(len(updates))]
