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
    all_megabytes: tuple[float, ...],
    layers: int,
    rounds: int,
    most_seconds: float = float("inf"),
    compile_torch: bool = True,
) -> dict[str, Any]:
    """Returns {size: {layout: {"who: variant": time}}}.

    Args:
      all_megabytes: sizes of all updates.
      layers: L.
      rounds: of every comparison,
      most_seconds: and about the longest it may take.
      compile_torch: also run the twins under `torch.compile`.
    """
    costs: dict[str, Any] = {}
    for megabytes in all_megabytes:
        costs[f"{megabytes:g} MB"] = {}
        for layout in LAYOUTS:
            updates = updates_of(megabytes, layers, layout)
            calls = {LIMIT: partial(compiled(limit, updates), updates)}
            calls |= _smoothings(updates, layout) | _yardsticks(updates)
            if has_torch():
                calls |= _twins(updates, layout, compile_torch)
            seconds = in_turns(calls, rounds, f"peers, {layout}", most_seconds)
            costs[f"{megabytes:g} MB"][layout] = relative_to(LIMIT, seconds)
    return costs


def _smoothings(updates: Any, layout: str) -> dict[str, Callable[[], Any]]:
    depth = depth_of(layout)
    return _updates_of(
        {
            f"{OURS}: window": gs.smooth_over_depth(depth, _ALPHA),
            f"{OURS}: norm_preserving": gs.smooth_over_depth(
                depth, _ALPHA, variant="norm_preserving"
            ),
        },
        updates,
    )


def _yardsticks(updates: Any) -> dict[str, Callable[[], Any]]:
    transformations = {
        "optax: trace": optax.trace(0.9),
        "optax: ema": optax.ema(0.9),
        "optax: scale_by_adam": optax.scale_by_adam(),
    }
    return _updates_of(transformations, updates)


def _updates_of(
    transformations: dict[str, optax.GradientTransformation], updates: Any
) -> dict[str, Callable[[], Any]]:
    calls = {}
    for name, tx in transformations.items():
        state = tx.init(updates)
        run = compiled(tx.update, updates, state)
        calls[name] = partial(run, updates, state)
    return calls


def _twins(
    updates: Any, layout: str, compile_torch: bool
) -> dict[str, Callable[[], Any]]:
    import torch  # pyright: ignore[reportMissingImports] # optional

    from benchmarks.cost.cpu import torch_twins

    us: Any = [torch.tensor(np.asarray(leaf)) for leaf in in_order(updates, layout)]
    if layout == "stacked":
        (us,) = us
        ways = {"PyTorch": torch_twins.STACKED}
    else:
        ways = {"PyTorch, foreach": torch_twins.LISTED, HOOK: torch_twins.HOOK}
    calls = {}
    for way, twins in ways.items():
        for variant, twin in twins.items():
            # A hook writes into its tensors, which changes numbers, but no times.
            calls[f"{way}: {variant}"] = partial(twin, us, _ALPHA)
            if compile_torch:
                of_compiled = partial(torch.compile(twin), us, _ALPHA)
                calls[f"{way}, compiled: {variant}"] = of_compiled
    return calls


def in_order(updates: Any, layout: str) -> list[jax.Array]:
    """Returns the leaves by layer; a tree sorts `layers_10` before `layers_2`."""
    if layout == "stacked":
        return [updates["blocks"]["w"]]
    return [updates[f"layers_{i}"]["w"] for i in range(len(updates))]
