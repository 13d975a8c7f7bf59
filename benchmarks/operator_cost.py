"""What every operator costs, next to one read and one write of the updates.

    python -m benchmarks.operator_cost
    python -m benchmarks.operator_cost --megabytes 512 --layers 24

Times in one process, in turns, as medians of ratios to `u -> 0.9 u`, which is the
limit; once for layers stacked in one array, once with one array per layer. The second
table is why the library goes from shifted copies to one matmul where it does.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Without these, glibc returns large arrays to the system and their pages are faulted in
# afresh: a third of the time of every operator, and all of the noise.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "30000000000",
    "MALLOC_TOP_PAD_": "67108864",
}


def operators() -> dict[str, Any]:
    """Returns every operator at a usual strength, by the call that makes it."""
    import gradsmooth_optax as gs

    window = gs.window(0.2)
    return {
        "window(0.2)": window,
        "window(0.2, radius=3)": gs.window(0.2, radius=3),
        "window(0.2, radius=8)": gs.window(0.2, radius=8),
        "gaussian(1.0)": gs.gaussian(1.0),
        "gaussian(3.0)": gs.gaussian(3.0),
        "laplacian(0.2)": gs.laplacian(0.2),
        "ema(0.5)": gs.ema(0.5),
        "tikhonov(1.0)": gs.tikhonov(1.0),
        "mean_over_depth()": gs.mean_over_depth(),
        "repeat(window(0.2), 8)": gs.repeat(window, 8),
        "similarity_window(0.2)": gs.similarity_window(0.2),
        "controls.norm_matched(window(0.2))": gs.controls.norm_matched(window),
        "controls.shuffled(window(0.2), 0)": gs.controls.shuffled(window, 0),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark with the options `argv` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operator_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--megabytes", type=int, default=64, help="of updates")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results/operator_cost.json"))
    options = parser.parse_args(argv)

    from benchmarks.provenance import provenance
    from benchmarks.report import write_json

    report = {
        "benchmark": "operator_cost",
        "megabytes": options.megabytes,
        "layers": options.layers,
        "rounds": options.rounds,
        "load_before": os.getloadavg()[0],
        **provenance(),
        "operators": {
            layout: measure(operators(), options, layout)
            for layout in ("stacked", "unrolled")
        },
        "crossover": crossover(options),
        "load_after": os.getloadavg()[0],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(report, options.out)
    print(f"{tables(report)}\n\nwrote {options.out}")
    return 0


def measure(
    ops: Mapping[str, Any], options: argparse.Namespace, layout: str
) -> dict[str, Any]:
    """Returns the median time of every operator, as a ratio to that of `u -> 0.9 u`."""
    import gradsmooth_optax as gs

    depth = gs.scanned("blocks/") if layout == "stacked" else gs.unrolled()

    def smoothing(operator: Any) -> Callable:
        tx = gs.apply_over_depth(depth, operator)
        return lambda updates: tx.update(updates, tx.init(updates))[0]

    return timed(
        {name: smoothing(op) for name, op in ops.items()},
        updates_of(options.megabytes, options.layers, layout),
        options.rounds,
    )


def updates_of(megabytes: int, layers: int, layout: str) -> dict[str, Any]:
    """Returns float32 updates of this size in all, as one leaf or one per layer."""
    import jax
    import jax.numpy as jnp

    width = 1024
    rows = max(1, megabytes * 2**20 // (4 * layers * width))
    stacked = jax.random.normal(jax.random.key(0), (layers, rows, width), jnp.float32)
    if layout == "stacked":
        return {"blocks": {"w": stacked}}
    return {f"layers_{i}": {"w": jnp.copy(layer)} for i, layer in enumerate(stacked)}


def timed(
    functions: Mapping[str, Callable], updates: Any, rounds: int
) -> dict[str, Any]:
    """Returns medians of the times in turns, as ratios to `u -> 0.9 u` in that turn."""
    import jax
    import numpy as np

    def limit(updates: Any) -> Any:
        return jax.tree.map(lambda u: 0.9 * u, updates)

    compiled = {
        name: jax.jit(function).lower(updates).compile()
        for name, function in {"limit": limit, **functions}.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for turn in range(rounds + 1):
        for name, function in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(function(updates))
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    base = np.array(seconds.pop("limit"))
    ratios = {name: np.array(of_name) / base for name, of_name in seconds.items()}
    return {
        name: {
            "median": float(np.median(ratio)),
            "quartiles": [float(q) for q in np.quantile(ratio, (0.25, 0.75))],
        }
        for name, ratio in ratios.items()
    }


def crossover(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the times of stacked windows as shifts and as a matmul, by layers."""
    import jax

    import gradsmooth_optax as gs
    from gradsmooth_optax import _apply

    found = {}
    for layers in (12, options.layers, 2 * options.layers):
        functions = {}
        for radius in (1, 2, 3, 4, 8):
            tx = gs.apply_over_depth(
                gs.scanned("blocks/"), gs.window(0.2, radius=min(radius, layers - 1))
            )
            for way, widest in (("shifts", layers), ("matmul", 0)):

                def smooth(updates: Any, tx=tx, widest=widest) -> Any:
                    before = _apply._WIDEST_SHIFTED_BAND
                    _apply._WIDEST_SHIFTED_BAND = widest  # read while tracing
                    try:
                        return tx.update(updates, tx.init(updates))[0]
                    finally:
                        _apply._WIDEST_SHIFTED_BAND = before

                functions[f"radius {radius}, {way}"] = smooth
        updates = updates_of(options.megabytes, layers, "stacked")
        found[str(layers)] = timed(functions, updates, options.rounds)
        jax.clear_caches()
    return found


def tables(report: Mapping[str, Any]) -> str:
    """Returns both tables of a report, also as read back from JSON."""
    from benchmarks.comparison import format_table

    of_layout = report["operators"]
    costs = format_table(
        ["operator", "stacked", "one leaf per layer"],
        [
            [name, *(f"{of_layout[k][name]['median']:.1f}×" for k in of_layout)]
            for name in of_layout["stacked"]
        ],
    )
    by_layers = report["crossover"]
    ways = format_table(
        ["stacked window", *(f"{layers} layers" for layers in by_layers)],
        [
            [way, *(f"{of_ways[way]['median']:.1f}×" for of_ways in by_layers.values())]
            for way in next(iter(by_layers.values()))
        ],
    )
    return f"{costs}\n\n{ways}"


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in _ALLOCATOR.items()):
        os.environ.update(_ALLOCATOR)  # read by the C library when a process starts
        os.execv(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:]])
    sys.exit(main())
