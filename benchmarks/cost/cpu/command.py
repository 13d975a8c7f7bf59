"""How fast smoothing runs and compiles, next to what it is part of and to its peers.

    python -m benchmarks.speed
    python -m benchmarks.speed --preset full
    python -m benchmarks.speed --sections operators chains --megabytes 64

Everything is timed in one process, in turns, as medians of ratios within a turn. Prints
a page of tables, the last one with the bars that speed is held to, and writes a JSON
with all figures. PyTorch twins run where `torch` is installed.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.json_files import RESULTS, write_json
from benchmarks.provenance import provenance
from benchmarks.speed.compile_time import (
    compile_times,
    learning_optimizers,
    optimizers,
)
from benchmarks.speed.peers import has_torch, peer_costs
from benchmarks.speed.report import failures, tables
from benchmarks.speed.steps import (
    chains,
    default_config,
    optimizer_steps,
    training_steps,
)
from benchmarks.speed.timing import restart_with_steady_memory
from benchmarks.speed.updates import crossover, operator_costs

# Defaults of the options: what takes some ten minutes on two cores, and the whole grid.
_PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "cases": ((64, "float32"), (64, "bfloat16"), (512, "float32")),
        "depths": (12, 48, 96),
        "most_seconds": 15,
    },
    "full": {
        "cases": tuple(
            (megabytes, dtype)
            for megabytes in (1, 8, 64, 512, 1024)
            for dtype in ("float32", "bfloat16")
        ),
        "depths": (12, 24, 48, 96, 200),
        "most_seconds": 60,
    },
}


def sections(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Returns what measures each section of the report."""
    preset = _PRESETS[options.preset]
    cases = preset["cases"]
    if options.megabytes is not None:
        cases = [(size, kind) for size in options.megabytes for kind in options.dtypes]
    megabytes, layers = options.of_chains, options.layers
    rounds, most_seconds = options.rounds, preset["most_seconds"]
    return {
        "operators": lambda: operator_costs(cases, layers, rounds, most_seconds),
        "crossover": lambda: crossover(
            megabytes, (max(2, layers // 4), layers, 2 * layers), rounds
        ),
        "chains": lambda: chains(megabytes, layers, rounds, most_seconds),
        "steps": lambda: optimizer_steps(megabytes, layers, rounds, most_seconds),
        "training": lambda: training_steps(default_config(), max(30, rounds)),
        "compile": lambda: compile_times(
            options.depths or preset["depths"], options.repetitions, optimizers()
        ),
        "learning": lambda: compile_times((8, 16), 1, learning_optimizers()),
        "peers": lambda: peer_costs(
            tuple(options.of_peers), layers, rounds, most_seconds
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark with the options `argv` and returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    wanted = options.sections or list(SECTIONS)
    report: dict[str, Any] = {
        "benchmark": "speed",
        "options": {
            name: value for name, value in vars(options).items() if name != "out"
        },
        **provenance(),
        "torch": torch_version(),
        "load_before": os.getloadavg(),
        "seconds": {},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    run = sections(options)
    for name in wanted:
        began = time.perf_counter()
        report[name] = run[name]()
        report["seconds"][name] = time.perf_counter() - began
        report["load_after"] = os.getloadavg()
        write_json(report, options.out)  # so that an interruption loses one section
        print(f"{name}: {report['seconds'][name]:.0f} s", flush=True)
    print(f"\n{tables(report)}\n\nwrote {options.out}")
    return 1 if options.check and failures(report) else 0


SECTIONS = (
    "operators",
    "crossover",
    "chains",
    "steps",
    "training",
    "compile",
    "learning",
    "peers",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        help="what to measure (default: all)",
    )
    parser.add_argument(
        "--preset",
        choices=_PRESETS,
        default="quick",
        help="sizes, dtypes and depths (default: %(default)s)",
    )
    parser.add_argument(
        "--megabytes",
        type=float,
        nargs="+",
        help="of the updates of operators, in place of the preset's",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=("float32",),
        help="of the updates, with --megabytes (default: float32)",
    )
    parser.add_argument(
        "--of-chains",
        type=float,
        default=64,
        metavar="MEGABYTES",
        help="of the updates of chains, steps and crossover (default: %(default)s)",
    )
    parser.add_argument(
        "--of-peers",
        type=float,
        nargs="+",
        default=(64, 225),
        metavar="MEGABYTES",
        help="of the updates of peers (default: 64 225)",
    )
    parser.add_argument(
        "--layers", type=int, default=48, help="of these updates (default: %(default)s)"
    )
    parser.add_argument(
        "--depths",
        type=int,
        nargs="+",
        metavar="LAYERS",
        help="of the compile times, in place of the preset's",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=15,
        help="of every comparison, at least 30 of training (default: %(default)s)",
    )
    parser.add_argument(
        "--repetitions", type=int, default=1, help="of compilation (default: 1)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a bar does not hold"
    )
    return parser


def torch_version() -> str | None:
    """Returns the version of PyTorch, None where it is not installed."""
    return metadata.version("torch") if has_torch() else None


if __name__ == "__main__":
    restart_with_steady_memory("benchmarks.speed")
    sys.exit(main())
