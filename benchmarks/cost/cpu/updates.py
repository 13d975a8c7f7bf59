"""What every operator costs, next to one read and one write of the updates.

All times are ratios to `u -> 0.9 u`, which is the limit.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import gradsmooth_optax as gs
from benchmarks.cost.cpu.timing import compiled, in_turns, relative_to, temporaries
from benchmarks.cost.operators import operators

LAYOUTS = ("stacked", "unrolled")
LIMIT = "0.9 u"
_WIDTH = 1024
# Private to the library, which reads it while it traces: the widest band of shifts.
_WIDEST_AS_SHIFTS = "gradsmooth_optax._coupling.matmul.WIDEST_SHIFTED_BAND"


def smoothings(layout: str) -> dict[str, Callable]:
    """Returns functions of the updates: every operator, and the window's variants."""
    depth = depth_of(layout)

    def smoothing(operator: Any, **options: Any) -> Callable:
        tx = gs.smooth_over_depth(depth, operator, **options)
        return lambda updates: tx.update(updates, tx.init(updates))[0]

    window = gs.window(0.2)
    return {name: smoothing(operator) for name, operator in operators().items()} | {
        f"window(0.2), {variant}": smoothing(window, variant=variant)
        for variant in ("norm_preserving", "directional")
    }


def depth_of(layout: str) -> gs.DepthSpec:
    """Returns where depth is in `updates_of` this layout."""
    return gs.scanned("blocks/") if layout == "stacked" else gs.unrolled()


def updates_of(
    megabytes: float, layers: int, layout: str, dtype: str = "float32"
) -> dict[str, Any]:
    """Returns updates of this size in all, as one leaf or one per layer."""
    numbers = megabytes * 2**20 / jnp.dtype(dtype).itemsize
    shape = (layers, max(1, round(numbers / (layers * _WIDTH))), _WIDTH)
    if layout == "stacked":
        return {"blocks": {"w": jax.random.normal(jax.random.key(0), shape, dtype)}}
    keys = jax.random.split(jax.random.key(0), layers)
    return {
        f"layers_{i}": {"w": jax.random.normal(key, shape[1:], dtype)}
        for i, key in enumerate(keys)
    }


def limit(updates: Any) -> Any:
    """Returns 0.9 u."""
    return jax.tree.map(lambda u: 0.9 * u, updates)


def operator_costs(
    cases: Iterable[tuple[float, str]], layers: int, rounds: int, most_seconds: float
) -> dict[str, Any]:
    """Returns {size and dtype: {layout: {operator: time and temporaries}}}.

    Temporaries are in units of the updates' size.
    """
    costs: dict[str, Any] = {}
    for megabytes, dtype in cases:
        case = case_name(megabytes, dtype)
        for layout in LAYOUTS:
            updates = updates_of(megabytes, layers, layout, dtype)
            costs.setdefault(case, {})[layout] = _costs(
                *(smoothings(layout), updates, f"{case}, {layout}"),
                *(rounds, most_seconds),
            )
    return costs


def case_name(megabytes: float, dtype: str) -> str:
    """Returns the name of a case of `operator_costs`."""
    return f"{megabytes:g} MB {dtype}"


def crossover(
    megabytes: float, all_layers: Iterable[int], rounds: int
) -> dict[str, Any]:
    """Returns {layers: {radius and way: time}}: windows as shifts and as a matmul.

    Why the library goes from shifted copies to one matmul where it does.
    """
    found = {}
    for layers in all_layers:
        functions = {
            f"radius {radius}, {way}": _window(min(radius, layers - 1), widest)
            for radius in (1, 2, 3, 4, 8)
            for way, widest in (("shifts", layers), ("matmul", 0))
        }
        updates = updates_of(megabytes, layers, "stacked")
        found[str(layers)] = _costs(functions, updates, f"{layers} layers", rounds)
    return found


def _window(radius: int, widest_as_shifts: int) -> Callable:
    tx = gs.smooth_over_depth(depth_of("stacked"), gs.window(0.2, radius=radius))

    def smooth(updates: Any) -> Any:
        with mock.patch(_WIDEST_AS_SHIFTS, widest_as_shifts):
            return tx.update(updates, tx.init(updates))[0]

    return smooth


def _costs(
    functions: Mapping[str, Callable],
    updates: Any,
    label: str,
    rounds: int,
    most_seconds: float = float("inf"),
) -> dict[str, Any]:
    executables = {
        name: compiled(function, updates)
        for name, function in {LIMIT: limit, **functions}.items()
    }
    calls = {name: partial(run, updates) for name, run in executables.items()}
    costs = relative_to(LIMIT, in_turns(calls, rounds, label, most_seconds))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(updates))
    for name in functions:
        costs[name]["temporaries"] = temporaries(executables[name]) / size
    return costs
